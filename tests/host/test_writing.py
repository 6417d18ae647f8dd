"""Frames that are encoded beside a real rollout: the same files, and what fails or is interrupted there loses nothing."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import frame_writer
from adastate_pack.adastate_core.video.picture_forms import to_bytes
from adastate_pack.adastate_core.video.sink import VideoSink
from adastate_pack.nodes.host import codec, live_pictures
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.codec import HostDecoder

LENGTH = 69  # six chunks: 9 frames and 12 each


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert frame_writer.NAME not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1, "length": LENGTH, "keep_latents": False} | inputs))


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"preview": True} | inputs))


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


class Written:
    """What the sinks are given, in order; `fails` is the call (from 1) that raises, `gate` what each waits for."""

    def __init__(self, monkeypatch, fails: int | None = None, error: BaseException | None = None) -> None:
        self.pictures, self.calls, self.threads = [], 0, set()
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        write = VideoSink.write

        def watched(sink, pictures):
            self.calls += 1
            self.threads.add(threading.current_thread().name)
            self.reached.set()
            self.gate.wait(30)
            if self.calls == fails:
                raise error
            write(sink, pictures)
            self.pictures.append(pictures.clone())

        monkeypatch.setattr(VideoSink, "write", watched)

    def all(self) -> torch.Tensor:
        return torch.cat(self.pictures)


@pytest.fixture
def whole(rollout, stream):
    """(latents, pictures, the file's frames) of the run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        written = Written(patch)
        result = rollout(stream=stream(filename_prefix="whole"), keep_latents=True)
        assert written.threads == {frame_writer.NAME}
    return result.args[0]["samples"], written.all(), frames_of(Path(result.args[3].get_stream_source()))


def goes_on(rollout, stream, folders, whole, chunks: int) -> None:
    """The file has the first `chunks` chunks, the state stands behind them, and the rest of it is the whole's."""
    frames = max(0, 12 * chunks - 3)
    state = load_state(folders / "output" / "take_00001_.state.safetensors")
    assert (state.emitted, state.stream["frames_written"]) == (3 * chunks, frames)
    assert torch.equal(frames_of(folders / "output" / "take_00001_.mp4")[:frames], whole[2][:frames])
    with pytest.MonkeyPatch.context() as patch:
        rest = Written(patch)
        joined = rollout(resume=state, stream=stream(filename_prefix="rest", join=True))
    assert torch.equal(rest.all(), whole[1][frames:])
    assert len(frames_of(Path(joined.args[3].get_stream_source()))) == LENGTH


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
def test_an_encoder_that_fails_is_told_and_what_was_before_it_is_kept(
    rollout, stream, folders, monkeypatch, whole, chunk
):
    error = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        Written(patch, chunk, error)
        with pytest.raises(OSError) as raised:
            rollout(stream=stream())
    assert raised.value is error
    report = json.loads((folders / "output" / "take_00001_.report.json").read_text())
    assert (report["ended"], report["error"]["type"]) == ("failed", "disk_full")
    assert report["frames"] == max(0, 12 * (chunk - 1) - 3)
    if chunk == 1:
        assert sorted(path.name for path in (folders / "output").glob("take*")) == ["take_00001_.report.json"]
    else:
        goes_on(rollout, stream, folders, whole, chunk - 1)


def test_a_full_disk_is_told_with_the_frame_and_the_file(rollout, stream, folders, monkeypatch, whole):
    mux, made = av.container.OutputContainer.mux, []
    original = VideoSink._mux

    class Full:
        def __init__(self, container):
            self._container = container

        def mux(self, packet):
            made.append(packet)
            if len(made) == 30:
                raise OSError(28, "No space left on device")
            mux(self._container, packet)

        def __getattr__(self, name):
            return getattr(self._container, name)

    def muxed(sink, packet):
        if sink._container is not None and not isinstance(sink._container, Full):
            sink._container = Full(sink._container)
        original(sink, packet)

    with monkeypatch.context() as patch:
        patch.setattr(VideoSink, "_mux", muxed)
        with pytest.raises(
            OSError, match=r"frame 30 of take_00001_.mp4 could not be written \(No space left on device\)"
        ):
            rollout(stream=stream())
    goes_on(rollout, stream, folders, whole, 2)


@pytest.mark.parametrize("how", ["interrupt", "keyboard", "decode"])
def test_what_is_under_way_at_an_interrupt_is_written(rollout, stream, folders, monkeypatch, interrupt, whole, how):
    """Chunks 3 and 4 wait for a disk that is slow when chunk 5 is given up."""
    with monkeypatch.context() as patch:
        written, velocity, step, calls = Written(patch), adapter.HostModel.velocity, HostDecoder.step, []

        def end():
            assert written.calls == 3 and len(written.pictures) == 2
            threading.Timer(0.1, written.gate.set).start()
            if how == "interrupt":
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            raise KeyboardInterrupt if how == "keyboard" else RuntimeError("decode broke")

        def slower(self, *given):
            calls.append(1)
            if len(calls) == 5:  # the first pass of chunk 3, with two a chunk
                for thread in threading.enumerate():
                    assert thread.name != frame_writer.NAME or not thread.daemon
                while len(written.pictures) < 2:
                    pass
                written.reached.clear()
                written.gate.clear()
            if len(calls) == 9 and how != "decode":
                assert written.reached.wait(20)
                end()
            return velocity(self, *given)

        def broken(self, *given):
            if len(calls) >= 9 and how == "decode":
                raise RuntimeError("decode broke")
            made = step(self, *given)
            if len(calls) >= 7 and how == "decode":
                assert written.reached.wait(20)
                threading.Timer(0.1, written.gate.set).start()
            return made

        patch.setattr(adapter.HostModel, "velocity", slower)
        patch.setattr(HostDecoder, "step", broken)
        with pytest.raises({"interrupt": interrupt, "keyboard": KeyboardInterrupt, "decode": RuntimeError}[how]):
            rollout(stream=stream())
    goes_on(rollout, stream, folders, whole, 4)


def test_a_failure_behind_an_interrupt_leaves_the_interrupt_to_be_told(
    rollout, stream, folders, monkeypatch, interrupt, whole, caplog
):
    """What the interrupted run had under way cannot be written: it is pending in the state."""
    with monkeypatch.context() as patch:
        written, velocity, calls = Written(patch, 3, OSError(28, "full")), adapter.HostModel.velocity, []

        def slower(self, *given):
            calls.append(1)
            if len(calls) == 5:
                while len(written.pictures) < 2:
                    pass
                written.gate.clear()
            if len(calls) == 9:
                threading.Timer(0.1, written.gate.set).start()
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            return velocity(self, *given)

        patch.setattr(adapter.HostModel, "velocity", slower)
        with pytest.raises(interrupt):
            rollout(stream=stream())
    assert f"the end of a stream, after {interrupt.__name__}: full" in caplog.text
    state = load_state(folders / "output" / "take_00001_.state.safetensors")
    assert state.pending.shape[2] == 6
    goes_on(rollout, stream, folders, whole, 2)


def test_autosaves_count_what_is_in_the_file_however_slow_it_is(rollout, stream, folders, monkeypatch, whole):
    from adastate_pack.nodes import saved_states

    saves, save = [], saved_states.save_state
    with monkeypatch.context() as patch:
        written, write = Written(patch), VideoSink.write
        patch.setattr(VideoSink, "write", lambda sink, pictures: (time.sleep(0.05), write(sink, pictures))[1])

        def saved(state, path):
            saves.append((state.stream["frames_written"], sum(len(part) for part in written.pictures)))
            return save(state, path)

        patch.setattr(saved_states, "save_state", saved)
        rollout(stream=stream(autosave_seconds=1e-6))
    # each once the chunk behind its own is written
    assert saves[0][0] == 9 and all(there >= counted + 12 for counted, there in saves)


def test_without_a_thread_the_file_is_the_same(rollout, stream, folders, monkeypatch, whole, caplog):
    start = threading.Thread.start

    def refused(thread):
        if thread.name == frame_writer.NAME:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    written = Written(monkeypatch)
    result = rollout(stream=stream(), keep_latents=True)
    assert torch.equal(result.args[0]["samples"], whole[0]) and torch.equal(written.all(), whole[1])
    assert torch.equal(frames_of(folders / "output" / "take_00001_.mp4"), whole[2])
    assert frame_writer.NAME not in written.threads and "could not be started" in caplog.text


def test_render_video_is_encoded_beside_the_decode(vae, node, monkeypatch):
    z = torch.randn(2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    inputs = dict(latent={"samples": z}, vae=vae, filename_prefix="a", fps=12.0, codec="h264", quality=1)
    with monkeypatch.context() as patch:
        written = Written(patch)
        node("AdaStateRenderVideo")(**inputs)
    with torch.no_grad():
        expected = to_bytes(torch.cat([vae.decode(item[None])[0] for item in z]))
    steps = (written.all().int() - expected.int()).abs()  # decoded the fast way: equal but for a value on an edge
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01 and written.threads == {frame_writer.NAME}
    error = OSError(28, "No space left on device")
    Written(monkeypatch, 3, error)
    with pytest.raises(OSError) as raised:
        node("AdaStateRenderVideo")(**inputs)
    assert raised.value is error


@torch.no_grad()
@pytest.mark.parametrize("takes", ["bytes", "integers", "float"])
def test_a_decoder_gives_each_form_of_the_pictures_that_it_gives_without_one(vae, monkeypatch, takes):
    from adastate_pack.adastate_core.video.picture_forms import in_form

    z = torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = in_form(HostDecoder(vae).step(z), takes)
    for at_once in (1, 2 * 3 * 32 * 32 * 3, 2**30):  # a picture, three, all at a time
        monkeypatch.setattr(codec, "_AT_ONCE", at_once)
        made = HostDecoder(vae).step(z, takes)
        assert made.dtype == expected.dtype and torch.equal(made, expected)


OUTPUTS = {
    "another scale": lambda x: (x * 0.25 + 0.4).clamp(0, 1),
    "by the whole": lambda x: (x - x.amin()) / (x.amax() - x.amin()),
    "in place": lambda x: x.add_(1.0).div_(2.0).clamp_(0, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_vae_with_an_output_of_its_own_is_asked_as_the_host_asks_it(vae, monkeypatch, output):
    z = torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(codec, "_AT_ONCE", 1)
    monkeypatch.setattr(vae, "process_output", OUTPUTS[output])
    assert HostDecoder(vae)._any_device == (output == "in place")
    assert torch.equal(HostDecoder(vae).step(z, "bytes"), to_bytes(HostDecoder(vae).step(z)))


def test_pages_are_shown_the_same_of_bytes_as_of_floats():
    pictures = torch.rand(12, 96, 400, 3, generator=torch.Generator().manual_seed(3))
    told = []
    for shown in (pictures, to_bytes(pictures)):
        seen, ended = [], threading.Event()
        encoder = live_pictures.Encoder(
            lambda *facts, seen=seen: seen.append(facts), lambda *made, seen=seen: seen.append(made)
        )
        encoder.offer({"chunk": 0, "first_frame": 0}, shown)
        encoder.close(ended.set)
        assert ended.wait(20)
        told.append(seen)
    assert told[0] == told[1] and len(told[0]) == 2 and told[0][0][1]
