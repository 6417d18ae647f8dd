"""States kept on the way: which, how many, and the video made again from one of them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive
from adastate_pack.adastate_core.files import tensor_file
from adastate_pack.adastate_core.states import kept_states as state_history
from adastate_pack.adastate_core.states import state_file as rollout_file
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes import saved_states
from adastate_pack.nodes.host import model as adapter

LENGTH = 81  # seven chunks of three latent frames


@pytest.fixture
def rollout(rollout):
    """One step a chunk is enough here."""
    return lambda **inputs: rollout(**({"steps": 1} | inputs))


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"filename_prefix": "video/take", "history_chunks": 2} | inputs))


def slices(packet: bytes) -> list[bytes]:
    """The coded pictures in an mp4's packet of H.264, without parameter sets and remarks."""
    units = []
    while packet:
        size = int.from_bytes(packet[:4], "big")
        units, packet = [*units, packet[4 : 4 + size]], packet[4 + size :]
    return [unit for unit in units if unit[0] & 31 in (1, 5)]


def packets_of(path: Path) -> list[list[bytes]]:
    with av.open(str(path)) as container:
        return [slices(bytes(packet)) for packet in container.demux(video=0) if packet.dts is not None]


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_points_stay_even_and_few_on_disk(rollout, stream, folders, monkeypatch):
    folder, seen = folders / "output" / "video" / "take_00001_.history", []
    original = rollout_file.write_tensors

    def write_tensors(path, *more):
        written = original(path, *more)
        if folder.is_dir():
            seen.append(len(names_in(folder)))
        return written

    monkeypatch.setattr(rollout_file, "write_tensors", write_tensors)
    report = json.loads(rollout(length=117, stream=stream(history_chunks=1, history_states=3)).args[2])
    assert report["history"] == [4, 8]  # 1 2 3, then 2 4 6, then 4 8
    assert names_in(folder) == ["chunk_000004.state.safetensors", "chunk_000008.state.safetensors"]
    assert max(seen) == 3  # the one being written among them
    for chunk in (4, 8):
        state = load_state(folder / f"chunk_{chunk:06}.state.safetensors")
        assert (state.next_chunk, state.emitted, state.stream["frames_written"]) == (chunk, 3 * chunk, 12 * chunk - 3)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_a_history_of_any_length_is_bounded_and_covers_all_of_it(tmp_path, monkeypatch, every, most):
    class State:
        def __init__(self, chunk):
            self.next_chunk = chunk

    monkeypatch.setattr(state_history, "save_state", lambda state, path, **more: (path.touch(), path)[1])
    history = state_history.StateHistory(tmp_path / "a.history", every, most)
    for chunk in range(1, 400):
        if history.wants(chunk):
            history.keep(State(chunk))
        kept = list(state_history.kept_states(tmp_path / "a.history"))
        assert kept == history.kept and len(kept) <= most
        if kept:
            gaps = {b - a for a, b in zip([0, *kept], kept, strict=False)}
            assert len(gaps) == 1 and gaps.pop() == history.step
            assert most == 1 or len(kept) == chunk // history.step or len(kept) == most
            assert chunk - kept[-1] < 2 * history.step


KINDS = {
    "adaptive, batch of two, latents not kept": {
        "anchor": AnchorAdaptive(1), "batch_size": 2, "keep_latents": False, "positions": "fixed",
    },
    "latents kept": {"anchor": Anchor(), "keep_latents": True},
    "absorption": {"anchor": Anchor(), "window_frames": 9, "keep_latents": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_made_again_from_a_chunk(rollout, stream, folders, node, written, kind):
    inputs = dict(KINDS[kind])
    if kind == "absorption":
        inputs["absorption"] = node("AdaStateAbsorption")(
            ratio=0.5, warmup_frames=9, local_window_frames=3, sink_frames=1, ridge="auto", scope="head", rank=16,
            select="residual", absorb=True, schedule="once",
        ).args[0]  # fmt: skip
    batch, out = inputs.get("batch_size", 1), folders / "output" / "video"
    whole = rollout(length=LENGTH, stream=stream(), **inputs)
    pictures = torch.cat([torch.cat(written[i::batch]) for i in range(batch)])
    item = "b0" if batch == 2 else ""
    file = f"video/take_00001_{item}.state.safetensors [output]"
    loader = node("AdaStateLoadState")
    assert loader.validate(file=file, chunk=5) is True
    state = loader(file=file, chunk=5).args[0]
    assert (state.next_chunk, state.emitted) == (4, 12)
    redo = {"length": LENGTH, "resume": state} | inputs

    written.clear()
    again = rollout(stream=stream(filename_prefix="again", history_chunks=0), **redo)
    tail = torch.cat([torch.cat(written[i::batch]) for i in range(batch)])
    before = 12 * 4 - 3
    pictures, tail = pictures.unflatten(0, (batch, -1)), tail.unflatten(0, (batch, -1))
    assert torch.equal(tail, pictures[:, before:])
    end = load_state(out / f"take_00001_{item}.state.safetensors")
    assert torch.equal(end.recent, again.args[1].recent) and end.next_chunk == 7
    assert bool(again.args[1].absorption) == (kind == "absorption")
    if inputs["keep_latents"]:
        assert torch.equal(again.args[0]["samples"], whole.args[0]["samples"])

    written.clear()
    rollout(stream=stream(join=True), **(redo | {"seed": 77}))
    other = torch.cat([torch.cat(written[i::batch]) for i in range(batch)]).unflatten(0, (batch, -1))
    for i in range(batch):
        item = f"b{i}" if batch == 2 else ""
        old, new = (packets_of(out / f"take_0000{n}_{item}.mp4") for n in (1, 2))
        assert (
            len(old) == len(new) == LENGTH and all(old) and new[:before] == old[:before] and new[before] != old[before]
        )
        old, new = (frames_of(out / f"take_0000{n}_{item}.mp4") for n in (1, 2))
        assert torch.equal(new[:before], old[:before])
        assert all(not torch.equal(other[i, t], pictures[i, before + t]) for t in range(LENGTH - before))


def test_another_seed_differs_from_the_chunk_on_and_not_before(rollout, stream, node):
    whole = rollout(length=LENGTH, stream=stream(), keep_latents=True).args[0]["samples"]
    for chunk, frames in ((2, 6), (6, 18)):
        state = node("AdaStateLoadState")(file="video/take_00001_.state.safetensors [output]", chunk=chunk).args[0]
        other = rollout(length=LENGTH, resume=state, seed=6, keep_latents=True).args[0]["samples"]
        assert torch.equal(other[:, :, :frames], whole[:, :, :frames])
        assert (other[:, :, frames:] - whole[:, :, frames:]).abs().amin(dim=(0, 1, 3, 4)).max() > 0
        assert all(not torch.equal(other[:, :, f], whole[:, :, f]) for f in range(frames, other.shape[2]))


def test_any_file_of_a_video_leads_to_its_history_and_what_is_kept_is_listed(rollout, stream, folders, node):
    rollout(length=LENGTH, stream=stream(history_chunks=3))
    loader, folder = node("AdaStateLoadState"), folders / "output" / "video"
    own, third = "video/take_00001_.state.safetensors", "video/take_00001_.history/chunk_000003.state.safetensors"
    from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files

    assert {f"{own} [output]", f"{third} [output]"} < set(saved_files(STATE_SUFFIX))
    for file in (own, third):
        loaded = {chunk: loader(file=f"{file} [output]", chunk=chunk).args[0].next_chunk for chunk in (3, 5, 6, 7, 99)}
        assert loaded == {3: 3, 5: 3, 6: 6, 7: 7, 99: 7}
        reason = loader.validate(file=f"{file} [output]", chunk=2)
        assert "at or before chunk 2 is kept, those after chunks 3, 6, 7 are" in reason
    assert loader(file=f"{third} [output]").args[0].next_chunk == 3
    node_class = loader.node
    marks = {node_class.fingerprint_inputs(f"{own} [output]", chunk) for chunk in (-1, 3, 6)}
    assert len(marks) == 3
    (folder / "take_00001_.state.safetensors").write_bytes(b"broken")
    assert loader(file=f"{own} [output]", chunk=7).args[0].next_chunk == 6
    (folder / "take_00001_.state.safetensors").unlink()
    assert loader(file=f"{third} [output]", chunk=8).args[0].next_chunk == 6
    assert "there is no state file" in loader.validate(file=f"{own} [output]", chunk=3)
    assert "chunk is -2" in loader.validate(file=f"{third} [output]", chunk=-2)


def test_hostile_names_are_refused_or_passed_over(rollout, stream, folders, node, tmp_path):
    rollout(length=45, stream=stream())
    folder = folders / "output" / "video" / "take_00001_.history"
    (folder / "chunk_000001.state.safetensors").mkdir()
    good = folder / "chunk_000002.state.safetensors"
    for name in (
        "chunk_-00001.state.safetensors",
        "chunk_000003.state.safetensors.99.tmp",
        "..chunk_000003.state.safetensors",
    ):
        (folder / name).write_bytes(good.read_bytes())
    loader, file = node("AdaStateLoadState"), "video/take_00001_.state.safetensors [output]"
    assert loader(file=file, chunk=3).args[0].next_chunk == 2
    assert "none is" not in loader.validate(file=file, chunk=1) and "chunks 2, 4 are" in loader.validate(
        file=file, chunk=1
    )
    (folder / "chunk_000003.state.safetensors").write_bytes(good.read_bytes())
    assert "chunk_000003.state.safetensors holds the state after chunk 2" in loader.validate(file=file, chunk=3)
    with pytest.raises(ValueError, match="holds the state after chunk 2"):
        loader(file=file, chunk=3)
    for name in ("../../x.history/chunk_000002.state.safetensors [output]", "/etc/passwd", ""):
        assert isinstance(loader.validate(file=name, chunk=2), str)
    plain = node("AdaStateSaveState")(state=loader(file=file).args[0], filename_prefix="a/b").args[0]
    assert loader(file=plain, chunk=9).args[0].next_chunk == 4
    assert "at or before chunk 3 is kept, those after chunks 4 are" in loader.validate(file=plain, chunk=3)


def test_a_write_that_dies_leaves_whole_states_only_and_the_video_goes_on(
    rollout, stream, folders, monkeypatch, caplog
):
    original, calls = tensor_file._write, []

    def write(file, tensor):
        calls.append(Path(file.name).name)
        if len(set(calls)) == 2:
            file.write(b"half a tensor")
            raise OSError("disk full")
        return original(file, tensor)

    monkeypatch.setattr(tensor_file, "_write", write)
    result = rollout(length=LENGTH, stream=stream())
    assert len(frames_of(folders / "output" / "video" / "take_00001_.mp4")) == LENGTH
    assert json.loads(result.args[2])["history"] == [2, 6] and "disk full" in caplog.text
    assert all(name.endswith(".tmp") for name in calls)
    folder = folders / "output" / "video" / "take_00001_.history"
    assert [load_state(folder / name).next_chunk for name in names_in(folder)] == [2, 6]


def test_a_kept_state_never_stands_for_frames_that_the_growing_file_has_not(
    rollout, stream, folders, node, monkeypatch
):
    """At every write the file, read as a kill would leave it, holds the frames of the state, and can be joined to."""
    seen = []
    original = state_history.StateHistory.keep

    def keep(self, state):
        path = folders / "output" / state.stream["files"][0]
        copy = folders / f"{state.next_chunk}.mp4"
        copy.write_bytes(path.read_bytes())
        seen.append((len(frames_of(copy)), state.stream["file_frames"][0]))
        return original(self, state)

    monkeypatch.setattr(state_history.StateHistory, "keep", keep)
    rollout(length=LENGTH, stream=stream())
    assert [states for _, states in seen] == [21, 45, 69]
    assert all(there >= counted for there, counted in seen)
    folder = folders / "output" / "video"
    whole = frames_of(folder / "take_00001_.mp4")
    (folders / "4.mp4").replace(folder / "take_00001_.mp4")
    (folder / "take_00001_.state.safetensors").unlink()
    kept = "video/take_00001_.history/chunk_000002.state.safetensors [output]"
    state = node("AdaStateLoadState")(file=kept, chunk=4).args[0]
    rollout(length=LENGTH, resume=state, stream=stream(join=True))
    joined = frames_of(folder / "take_00002_.mp4")
    assert len(joined) == LENGTH and torch.equal(joined[:45], whole[:45])


def test_an_interrupted_run_keeps_its_history(rollout, stream, folders, monkeypatch, node):
    original, calls = adapter.HostModel.velocity, []

    def velocity(self, x, timestep, attention):
        calls.append(1)
        if len(calls) == 2 * 4 + 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        return original(self, x, timestep, attention)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        rollout(length=LENGTH, stream=stream())
    monkeypatch.undo()
    folder = folders / "output" / "video" / "take_00001_.history"
    assert [load_state(folder / name).next_chunk for name in names_in(folder)] == [2, 4]
    state = node("AdaStateLoadState")(file="video/take_00001_.state.safetensors [output]", chunk=2).args[0]
    assert rollout(length=LENGTH, resume=state, stream=stream(join=True)).args[3].get_frame_count() == LENGTH


def test_without_history_nothing_is_kept_and_given_frames_are_no_chunk(rollout, stream, folders, monkeypatch):
    saves = []
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: saves.append(path.name))
    rollout(length=45, stream=stream(history_chunks=0))
    assert names_in(folders / "output" / "video") == ["take_00001_.mp4", "take_00001_.report.json"] and saves == []
    start = {"samples": torch.randn(1, 16, 7, 4, 4)}
    report = json.loads(rollout(length=69, start_latent=start, stream=stream(history_chunks=1)).args[2])
    assert report["history"] == [1, 2, 3, 4]
