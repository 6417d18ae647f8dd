"""Decode and streams on the host's own VAE: bit-equal splits, resume, join, interrupts, kept files."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.decode.wan_vae import VaeStream, cache_bytes, pictures_of
from adastate_pack.adastate_core.files import whole_file
from adastate_pack.adastate_core.passes import NonFiniteError
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes import stream as stream_nodes
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.codec import HostDecoder
from conftest import random_vae


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def latents(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(
        **({"filename_prefix": "video/take", "preview": True, "autosave_seconds": 60.0, "join": False} | inputs)
    )


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("split", [[7], [1] * 7, [1, 3, 3], [3, 3, 1], [2, 5], [4, 1, 2]], ids=str)
def test_any_split_decodes_to_the_bits_of_one_whole_decode(vae, split):
    z = latents(7)
    whole = vae.decode(z)[0]
    decoder = HostDecoder(vae)
    parts = [decoder.step(part)[0] for part in z.split(split, dim=2)]
    assert [len(p) for p in parts] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(parts), whole)


@torch.no_grad()
def test_the_decoders_cache_moves_to_another_run(vae):
    z = latents(6)
    for cut in (1, 2, 3):
        first, second = HostDecoder(vae), HostDecoder(vae)
        head = first.step(z[:, :, :cut])
        saved = first.snapshot()
        reference = first.step(z[:, :, cut:])
        second.restore(json.loads(json.dumps({k: v for k, v in saved.items() if not torch.is_tensor(v)})) | saved)
        assert torch.equal(second.step(z[:, :, cut:]), reference)
        assert torch.equal(torch.cat([head, reference], 1), vae.decode(z))


@torch.no_grad()
def test_several_latents_a_call_are_exact_to_rounding(vae):
    z = latents(8)
    for count in (2, 3, 7):
        torch.testing.assert_close(HostDecoder(vae, count).step(z)[0], vae.decode(z)[0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_cache_does_not_grow_and_is_what_was_planned(vae):
    decoder = HostDecoder(vae)
    sizes = [(decoder.step(latents(1)), decoder.stream.nbytes)[1] for _ in range(12)]
    assert len(set(sizes[2:])) == 1
    assert sizes[-1] == decoder.cache_bytes(1, 4, 4) == cache_bytes(4, 4, 4, 1, torch.float32)


class NewerDecoder(torch.nn.Module):
    """The newer generation's behaviour on the same weights: pieces in a list, and of what came in only the last two
    frames are kept, so that layers which see one frame a call keep one."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x, feat_cache=None, feat_idx=None):
        assert len(feat_cache) >= 34
        out = self.decoder(x, feat_cache=feat_cache, feat_idx=feat_idx.copy())
        for i, entry in enumerate(feat_cache):
            if torch.is_tensor(entry) and entry.shape[-2:] == x.shape[-2:]:  # before the first temporal upsampling
                feat_cache[i] = entry[:, :, -min(2, x.shape[2]) :]
        pieces = out if isinstance(out, list) else [out]
        return [part for piece in pieces for part in piece.split(1, dim=2)]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_the_newer_decoders_work_too(vae, count):
    module = vae.first_stage_model
    newer = torch.nn.Module()
    newer.conv2, newer.decoder = module.conv2, NewerDecoder(module.decoder)
    z = latents(9)
    reference = VaeStream(module, count).step(z)
    stream = VaeStream(newer, count)
    parts = [stream.step(part) for part in z.split([1, 3, 2, 3], dim=2)]
    if count == 1:
        assert torch.equal(torch.cat(parts, 1), reference)
        assert stream.nbytes == cache_bytes(4, 4, 4, 1, torch.float32)
    else:
        torch.testing.assert_close(torch.cat(parts, 1), reference, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_decode_that_fails_leaves_the_stream_where_it_was(vae, monkeypatch):
    z = latents(6)
    reference = VaeStream(vae.first_stage_model).step(z)
    stream = VaeStream(vae.first_stage_model)
    head = stream.step(z[:, :, :2])
    original, calls = VaeStream._call, []

    def fail(self, *given):
        calls.append(1)
        if len(calls) == 3:
            original(self, *given)
            raise MemoryError
        return original(self, *given)

    monkeypatch.setattr(VaeStream, "_call", fail)
    with pytest.raises(MemoryError):
        stream.step(z[:, :, 2:])
    assert torch.equal(torch.cat([head, stream.step(z[:, :, 2:])], 1), reference)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"vae_markers": [99]}, "vae_markers"),
        ({"vae_markers": [True]}, "vae_markers"),
        ({"vae_markers": [3]}, "vae_feature_3 is marked as empty too"),
        ({"vae_latents_seen": 1.5}, "vae_latents_seen is 1.5"),
        ({"vae_feature_-1": torch.zeros(1, 1, 1, 1, 1)}, "vae_feature_-1"),
        ({"vae_feature_63": torch.zeros(1, 1, 1, 1, 1)}, "vae_feature_63"),
        ({"vae_feature_3": torch.zeros(2, 2)}, "vae_feature_3"),
        ({"vae_feature_3": None}, "vae_feature_3"),
        ({"vae_feature_3": "float16"}, "vae_feature_3 has another dtype"),
        ({"vae_feature_3": "int64"}, "vae_feature_3"),
        ({"vae_feature_3": "nan"}, "vae_feature_3 holds NaN"),
    ],
    ids=str,
)
def test_damaged_decoder_caches_are_refused(vae, damage, words):
    stream = VaeStream(vae.first_stage_model)
    with torch.no_grad():
        stream.step(latents(2))
    saved = stream.snapshot()
    change = {"float16": torch.Tensor.half, "int64": torch.Tensor.long, "nan": lambda t: t * float("nan")}
    damage = {n: change[v](saved[n]) if isinstance(v, str) else v for n, v in damage.items()}
    with pytest.raises(ValueError, match=f"damaged: .*{words}"):
        stream.restore(saved | damage, "cpu", torch.float32)


@pytest.mark.parametrize("seen", [1, 2, 3])
def test_a_decoder_cache_without_one_of_its_entries_or_with_another_is_refused(vae, seen):
    """What the decoder has at its end cannot be known before it runs; the first call tells, and leaves the stream alone."""
    source = VaeStream(vae.first_stage_model)
    with torch.no_grad():
        source.step(latents(seen))
        saved = source.snapshot()
        entries = [n for n in saved if n.startswith("vae_feature_")]
        for name in entries:
            stream = VaeStream(vae.first_stage_model)
            less = {n: value for n, value in saved.items() if n != name}
            with pytest.raises(
                ValueError, match=f"damaged: {name} is missing|vae_feature_[0-9]+ is there, but not all"
            ):
                stream.restore(less, "cpu", torch.float32)
                stream.step(latents(1))
        more = saved | {f"vae_feature_{len(entries) + len(saved['vae_markers'])}": saved["vae_feature_0"]}
        stream = VaeStream(vae.first_stage_model)
        stream.restore(more, "cpu", torch.float32)
        with pytest.raises(ValueError, match="is not one of this decoder's"):
            stream.step(latents(1))
        stream = VaeStream(vae.first_stage_model)
        stream.restore(saved, "cpu", torch.float32)
        assert torch.equal(stream.step(latents(2)), source.step(latents(2)))


@pytest.mark.quick
def test_the_decode_node_gives_what_the_hosts_decode_gives(vae, node):
    z = latents(4, batch=2)
    ours = node("AdaStateDecode")(latent={"samples": z}, vae=vae).args[0]
    with torch.no_grad():
        assert torch.equal(ours, torch.cat([vae.decode(item[None])[0] for item in z]))
    quick = node("AdaStateDecode")(latent={"samples": z}, vae=vae, frames_per_call=3).args[0]
    torch.testing.assert_close(quick, ours, atol=2e-5, rtol=2e-5)


def test_render_video_writes_the_frames_of_the_decode(vae, node, folders):
    z = latents(5)
    video = node("AdaStateRenderVideo")(
        latent={"samples": z}, vae=vae, filename_prefix="a", fps=12.0, codec="h264", quality=1
    ).args[0]
    components = video.get_components()
    assert components.images.shape == (17, 32, 32, 3) and float(components.frame_rate) == 12.0
    with torch.no_grad():
        assert (components.images - vae.decode(z)[0]).abs().mean() < 0.1
    assert Path(video.get_stream_source()).parent == folders / "temp"


@pytest.mark.parametrize("bad", [torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 0, 4, 4), torch.zeros(1, 32, 3, 4, 4)])
def test_latents_of_another_kind_are_refused(vae, node, bad):
    for name, more in (
        ("AdaStateDecode", {}),
        ("AdaStateRenderVideo", {"filename_prefix": "a", "fps": 16.0, "codec": "h264", "quality": 18}),
    ):
        with pytest.raises(ValueError, match="needs a Wan 2.1 video latent"):
            node(name)(latent={"samples": bad}, vae=vae, **more)


def test_another_vae_is_refused_by_name(node, rollout, stream):
    import comfy.sd

    other = comfy.sd.VAE(sd=random_vae())
    other.first_stage_model = torch.nn.Identity()
    with pytest.raises(ValueError, match="the vae is a Identity; streaming decode needs a Wan 2.1 VAE"):
        node("AdaStateDecode")(latent={"samples": latents(2)}, vae=other)
    with pytest.raises(ValueError, match="the vae is a Identity"):
        rollout(stream=stream(vae=other))


def test_a_stream_holds_the_frames_of_the_rollout(rollout, stream, vae, folders):
    plain = rollout(length=45).args[0]["samples"]
    streamed = rollout(length=45, stream=stream(quality=1))
    assert torch.equal(streamed.args[0]["samples"], plain)
    path = folders / "output" / "video" / "take_00001_.mp4"
    assert streamed.ui["images"][0] == {"filename": path.name, "subfolder": "video", "type": "output"}
    with torch.no_grad():
        assert (frames_of(path).float() / 255 - vae.decode(plain)[0]).abs().mean() < 0.1
    assert streamed.args[3].get_frame_count() == 45
    report = json.loads(streamed.args[2])
    assert report["frames"] == 45 and report["kv_bytes_used"] == report["kv_bytes_planned"]
    assert report["plan_bytes"]["vae_cache"] == HostDecoder(vae).cache_bytes(1, 4, 4)
    assert report["text_kv_bytes_used"] == report["plan_bytes"]["text_kv"]
    with av.open(str(path)) as container:
        keyframes = [i for i, p in enumerate(q for q in container.demux(video=0) if q.dts is not None) if p.is_keyframe]
    assert keyframes == [0, 9, 21, 33]


def test_a_stream_holds_nothing_of_the_chunks_that_are_done(rollout, stream, monkeypatch):
    held, most = [], []
    chunks = Rollout.chunks

    def watched(self, *arguments):
        for chunk in chunks(self, *arguments):
            held.extend(weakref.ref(tensor) for tensor in (chunk.latents, chunk.hidden))
            yield chunk
            del chunk
            most.append(sum(tensor() is not None for tensor in held))

    monkeypatch.setattr(Rollout, "chunks", watched)
    report = json.loads(rollout(length=93, anchor=AnchorAdaptive(1), stream=stream(), keep_latents=False).args[2])
    assert report["chunks"] == len(most) == 8
    assert max(most) <= 4  # of 16: a chunk under way, and perhaps the one whose pictures another thread still writes


@pytest.mark.parametrize("cut", [17, 25, 33])
def test_a_streamed_resume_gives_the_frames_of_the_uninterrupted_run(rollout, stream, folders, cut, node):
    anchor = AnchorAdaptive(1)
    whole = rollout(length=49, anchor=anchor, stream=stream(filename_prefix="whole"), keep_latents=False)
    first = rollout(length=cut, anchor=anchor, stream=stream(filename_prefix="part"), keep_latents=False)
    saved = node("AdaStateSaveState")(state=first.args[1], filename_prefix="states/a").args[0]
    state = node("AdaStateLoadState")(file=saved).args[0]
    rest = rollout(length=49, anchor=anchor, resume=state, stream=stream(filename_prefix="part"), keep_latents=False)
    joined = rollout(
        length=49, anchor=anchor, resume=state, stream=stream(filename_prefix="part", join=True), keep_latents=False
    )
    out = folders / "output"
    parts = [frames_of(out / f"part_0000{i}_.mp4") for i in (1, 2)]
    reference = frames_of(out / "whole_00001_.mp4")
    assert [len(p) for p in parts] == [cut, 49 - cut]
    assert torch.equal(parts[0], reference[:cut])
    assert (torch.cat(parts).float() - reference.float()).abs().mean() < 3
    everything = frames_of(out / "part_00003_.mp4")
    assert len(everything) == 49 and torch.equal(everything[:cut], parts[0]) and torch.equal(everything[cut:], parts[1])
    assert json.loads(joined.args[2])["warnings"] == json.loads(whole.args[2])["warnings"]
    assert type(rest.args[0]).__name__ == "ExecutionBlocker"


def test_the_decoded_tensors_of_a_resume_are_bit_equal(rollout, stream, monkeypatch):
    """Before the encoder: what the sinks are given."""
    written = []
    original = stream_nodes.VideoSink.write

    def write(self, pictures):
        written.append(pictures.clone())
        return original(self, pictures)

    monkeypatch.setattr(stream_nodes.VideoSink, "write", write)
    rollout(length=45, stream=stream())
    whole = torch.cat(written)
    written.clear()
    first = rollout(length=21, stream=stream())
    rollout(length=45, stream=stream(), resume=first.args[1])
    assert torch.equal(torch.cat(written), whole)
    written.clear()
    kept = rollout(length=21, keep_latents=True)
    rollout(length=45, stream=stream(), resume=kept.args[1])
    assert torch.equal(torch.cat(written), whole[21:])


@pytest.mark.parametrize("how", ["interrupt", "nan", "oom"])
def test_what_ends_a_stream_early_keeps_everything(rollout, stream, folders, monkeypatch, node, interrupt, how):
    whole = rollout(length=57, stream=stream(filename_prefix="whole"))
    original, calls = adapter.HostModel.velocity, []

    def velocity(self, x, timestep, attention):
        calls.append(timestep)
        if len(calls) != 8:
            return original(self, x, timestep, attention)
        if how == "interrupt":
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        if how == "oom":
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(self, x, timestep, attention) * float("inf")

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    ends = {"interrupt": interrupt, "oom": torch.cuda.OutOfMemoryError, "nan": NonFiniteError}
    with pytest.raises(ends[how]):
        rollout(length=57, stream=stream(filename_prefix="cut"))
    monkeypatch.undo()
    out = folders / "output"
    assert len(frames_of(out / "cut_00001_.mp4")) == 21
    state = load_state(out / "cut_00001_.state.safetensors")
    assert (state.emitted, state.stream["frames_written"]) == (6, 21)
    rest = rollout(length=57, resume=state, stream=stream(filename_prefix="cut"))
    assert torch.equal(rest.args[0]["samples"], whole.args[0]["samples"])
    assert len(frames_of(out / "cut_00002_.mp4")) == 36


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_decode_loses_no_latent(rollout, stream, folders, monkeypatch, when):
    whole = rollout(length=45).args[0]["samples"]
    original, calls = HostDecoder.step, []

    def step(self, z, *takes):
        calls.append(z)
        pictures = original(self, z, *takes) if len(calls) != 3 or when == "after" else None
        if len(calls) == 3:
            raise RuntimeError("decode broke")
        return pictures

    monkeypatch.setattr(HostDecoder, "step", step)
    with pytest.raises(RuntimeError, match="decode broke"):
        rollout(length=45, stream=stream())
    monkeypatch.undo()
    state = load_state(folders / "output" / "video" / "take_00001_.state.safetensors")
    assert state.emitted == 6 and state.pending.shape[2] == 3
    again = rollout(length=45, resume=state, stream=stream())
    assert torch.equal(again.args[0]["samples"], whole)


def test_autosave_is_written_as_often_as_asked(rollout, stream, folders, monkeypatch):
    from adastate_pack.nodes import saved_states

    saves = []
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: saves.append(state.emitted))
    rollout(length=45, stream=stream(autosave_seconds=1e-6))
    assert saves == [3, 6, 9]
    saves.clear()
    rollout(length=45, stream=stream(autosave_seconds=0))
    assert saves == []


def test_batch_items_have_files_of_their_own(rollout, stream, folders, vae, node):
    both = rollout(batch_size=2, length=21, stream=stream())
    names = sorted(p.name for p in (folders / "output" / "video").glob("*.mp4"))
    assert names == ["take_00001_b0.mp4", "take_00001_b1.mp4"]
    first, second = (frames_of(folders / "output" / "video" / name) for name in names)
    assert len(first) == len(second) == 21 and not torch.equal(first, second)
    assert both.args[3].get_stream_source().endswith("b0.mp4")
    image = node("AdaStateDecode")(latent=both.args[0], vae=vae).args[0]
    assert len(image) == 42
    assert (image[21:] - second.float() / 255).abs().mean() < (image[21:] - first.float() / 255).abs().mean()


def test_a_state_without_frames_or_latents_cannot_be_streamed_further(rollout, stream):
    state = rollout(length=21, keep_latents=False).args[1]
    with pytest.raises(ValueError, match="without a stream and without keep_latents"):
        rollout(length=45, resume=state, stream=stream())
    again = rollout(length=45, resume=state, keep_latents=True)
    assert again.args[0]["samples"].shape[2] == 6
    assert "this run's only" in again.args[2]


def test_pictures_of():
    assert [pictures_of(n) for n in (0, 1, 2, 21)] == [0, 1, 5, 81]


@pytest.mark.parametrize("how", ["shorter", "other width"])
def test_refused_runs_leave_nothing(rollout, stream, folders, how):
    state = rollout(length=25, stream=stream(filename_prefix="a")).args[1]
    before = sorted(folders.rglob("*"))
    with pytest.raises(ValueError):
        if how == "shorter":
            rollout(length=25, resume=state, stream=stream(filename_prefix="b"))
        else:
            rollout(length=49, width=48, resume=state, stream=stream(filename_prefix="b"))
    assert sorted(folders.rglob("*")) == before


def test_an_interrupt_before_the_first_frame_leaves_its_report_alone(rollout, stream, folders, monkeypatch):
    state = rollout(length=21, stream=stream(filename_prefix="a")).args[1]
    before = sorted(folders.rglob("*"))

    def velocity(self, x, timestep, attention):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    for inputs in ({}, {"resume": state}):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            rollout(length=45, stream=stream(filename_prefix="a"), **inputs)
    more = set(folders.rglob("*")) - set(before)
    assert sorted(path.name for path in more) == ["a_00002_.report.json", "a_00003_.report.json"]


def test_join_takes_only_the_video_that_the_state_belongs_to(rollout, stream, folders):
    first = rollout(length=21, stream=stream(filename_prefix="one/M"))
    rollout(length=21, seed=9, stream=stream(filename_prefix="two/M"))
    other = rollout(length=45, resume=first.args[1], stream=stream(filename_prefix="two/M", join=True))
    joined = frames_of(folders / "output" / "two" / "M_00002_.mp4")
    assert torch.equal(joined[:21], frames_of(folders / "output" / "one" / "M_00001_.mp4"))
    third = rollout(length=57, resume=other.args[1], stream=stream(filename_prefix="three/M", join=True))
    assert len(frames_of(folders / "output" / "three" / "M_00001_.mp4")) == 57
    assert third.args[3].get_frame_count() == 57
    impostor = folders / "output" / "two" / "M_00001_.mp4"
    impostor.replace(folders / "output" / "one" / "M_00001_.mp4")
    with pytest.raises(ValueError, match="is missing or is not the video that the state belongs to"):
        rollout(length=45, resume=first.args[1], stream=stream(filename_prefix="four/M", join=True))
    assert not (folders / "output" / "four").exists()


def test_a_full_disk_loses_no_finished_chunk(rollout, stream, folders, monkeypatch):
    whole = rollout(length=45, batch_size=2).args[0]["samples"]
    original, calls = stream_nodes.VideoSink.write, []

    def write(self, pictures):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("disk full")
        original(self, pictures)

    monkeypatch.setattr(stream_nodes.VideoSink, "write", write)
    with pytest.raises(OSError, match="disk full"):
        rollout(length=45, batch_size=2, stream=stream(), keep_latents=False)
    monkeypatch.undo()
    state = load_state(folders / "output" / "video" / "take_00001_b0.state.safetensors")
    assert (state.emitted, state.stream["file_frames"]) == (3, [9, 9])
    again = rollout(length=45, batch_size=2, resume=state, stream=stream(join=True))
    torch.testing.assert_close(again.args[0]["samples"], whole[:, :, 3:])
    assert all(len(frames_of(folders / "output" / "video" / f"take_00002_b{i}.mp4")) == 45 for i in (0, 1))


@pytest.mark.parametrize("how", ["no room", "held open", "moved away", "no frame decodes"])
def test_a_rewrite_that_fails_costs_a_warning_and_no_output(rollout, stream, folders, monkeypatch, how):
    """The last rewrite of the file: all frames are in it by then."""
    whole = rollout(length=33, stream=stream(filename_prefix="whole"))
    original, moved = video_sink._rewrite, folders / "moved.mp4"

    def rewrite(path, new, *beside):
        if how == "no room":
            new.write_bytes(b"a part")
            raise av.error.OSError(28, "no space left on device")
        if how == "moved away":
            path.rename(moved)
        count = original(path, new, *beside)
        if how == "no frame decodes":
            new.write_bytes(bytes(1000))
        return count

    def replace(source, target):
        raise PermissionError(13, "used by another process")

    monkeypatch.setattr(video_sink, "_rewrite", rewrite)
    if how == "held open":
        monkeypatch.setattr(whole_file.os, "replace", replace)
    result = rollout(length=33, stream=stream(filename_prefix="take"))
    monkeypatch.undo()
    latent, state, report, video = result.args
    warnings = [w for w in json.loads(report)["warnings"] if w not in json.loads(whole.args[2])["warnings"]]
    assert len(warnings) == 1 and "take_00001_.mp4 could not be rewritten" in warnings[0]
    assert torch.equal(latent["samples"], whole.args[0]["samples"]) and state.stream["frames_written"] == 33
    path = folders / "output" / "take_00001_.mp4"
    assert video.get_stream_source() == str(path) and not list((folders / "output").glob("*tmp*"))
    if how == "moved away":
        moved.rename(path)
    frames = frames_of(path)
    assert torch.equal(frames, frames_of(folders / "output" / "whole_00001_.mp4"))
    rollout(length=57, resume=state, stream=stream(filename_prefix="more", join=True))
    assert torch.equal(frames_of(folders / "output" / "more_00001_.mp4")[:33], frames)


def test_a_rendered_video_that_cannot_be_rewritten_is_given_as_it_grew(vae, node, monkeypatch, caplog):
    monkeypatch.setattr(video_sink, "_rewrite", lambda *_: 1 / 0)
    inputs = {"filename_prefix": "AdaState", "fps": 16.0, "codec": "h264", "quality": 10}
    video = node("AdaStateRenderVideo")(latent={"samples": latents(4)}, vae=vae, **inputs).args[0]
    # (newer hosts' get_frame_count says 1 of any file in fragments, so their decode is asked)
    assert len(frames_of(video.get_stream_source())) == len(video.get_components().images) == 13
    assert "could not be rewritten" in caplog.text


def test_a_failure_among_the_start_frames_keeps_those_and_the_rest_of_them(rollout, stream, folders, monkeypatch):
    start = {"samples": latents(8)}
    whole = rollout(start_latent=start, length=57, stream=stream(filename_prefix="whole"))
    original, calls = adapter.HostModel.velocity, []

    def velocity(self, x, timestep, attention):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(self, x, timestep, attention)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        rollout(start_latent=start, length=57, stream=stream(filename_prefix="cut"))
    monkeypatch.undo()
    state = load_state(folders / "output" / "cut_00001_.state.safetensors")
    assert len(frames_of(folders / "output" / "cut_00001_.mp4")) == 9 and state.given.shape[2] == 5
    on = rollout(resume=state, length=57, stream=stream(filename_prefix="on", join=True))
    assert torch.equal(on.args[0]["samples"], whole.args[0]["samples"])
    frames, expected = (frames_of(folders / "output" / f"{name}_00001_.mp4") for name in ("on", "whole"))
    assert len(frames) == 57 and torch.equal(frames[:9], expected[:9])
