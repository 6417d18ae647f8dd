"""Streams that are enlarged: frames against the host's own nodes on the whole video, resume, redo, join, refusals, memory, plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import comfy.model_management
import comfy.utils
import numpy
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes.host.codec import HostDecoder
from adastate_pack.nodes.host.enlarger import HostEnlarger
from conftest import NODES
from small_enlargers import FlowOnce, enlarged, interpolator, load_upscaler

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from picture_files import read_exr

FILES = {"fps": 16.0, "preview": False, "autosave_seconds": 0.0}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def video(vae, node):
    """Stream To Video; inputs given win."""
    files = FILES | {"filename_prefix": "video/take", "codec": "ffv1", "quality": 18}
    return lambda **inputs: node("AdaStateStreamOutput")(**({"vae": vae} | files | inputs)).args[0]


@pytest.fixture
def frames(vae, node):
    """Stream To Frames; inputs given win."""
    files = FILES | {"filename_prefix": "frames/take", "format": "exr"}
    return lambda **inputs: node("AdaStateStreamFrames")(**({"vae": vae} | files | inputs)).args[0]


@pytest.fixture
def both(video, frames):
    """A video and frames of one run; `join` counts for both."""
    return lambda join=False, **inputs: frames(stream=video(join=join, **inputs), vae=None, join=join)


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1} | inputs))


@pytest.fixture
def upscaler(tmp_path):
    return load_upscaler(tmp_path)


def report(result) -> dict:
    return json.loads(result.args[2])


def exr_frames(folder: Path) -> dict[int, torch.Tensor]:
    """The frames of a folder by their numbers."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".exr")
    return {int(path.stem): torch.from_numpy(read_exr(path).copy()) for path in files}


def film(path: Path) -> tuple[torch.Tensor, float]:
    """A video's frames and its rate."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="gbrp16le").astype("float32") for frame in container.decode(video=0)]
        return torch.from_numpy(numpy.stack(pictures)) / 65535, float(container.streams.video[0].average_rate)


@pytest.mark.parametrize(("kind", "times", "batch", "count"), [("compact", 2, 2, 29), ("esrgan", 4, 1, 13)])
def test_the_files_hold_what_the_hosts_nodes_make_of_the_whole_video(
    rollout, both, folders, vae, tmp_path, progress_told, kind, times, batch, count
):
    upscaler, interp, made = load_upscaler(tmp_path, kind), interpolator(), 3 * count - 2
    stream = both(upscale_model=upscaler, interp_model=interp, frame_multiplier=3, preview=True)
    told = report(result := rollout(stream=stream, batch_size=batch, length=count))
    side, shown = 32 * times, [*progress_told]  # the host's nodes tell of theirs below
    assert {
        "width": side, "height": side, "fps": 48.0, "frames": made, "frames_for_one": 3,
    }.items() <= told["enlarged"].items()  # fmt: skip
    assert told["enlarged"]["upscale_model"].split()[1] == f"{times}x"
    assert told["enlarged"]["interp_model"].startswith("Interpolator ")
    assert (told["frames"], told["frames_total"], told["video_seconds"]) == (count, count, count / 16)
    decoded = HostDecoder(vae, fast=True).step(result.args[0]["samples"])
    for item, pictures in enumerate(decoded):
        want = enlarged(pictures, upscaler, interp, 3)
        got = exr_frames(folders / "output" / told["frame_folders"][item])
        assert list(got) == list(range(made)) and want.shape == (made, side, side, 3)
        assert torch.equal(torch.stack([*got.values()]), want)
        shot, rate = film(folders / "output" / told["videos"][item])
        assert rate == 48 and shot.shape[0] == made
        torch.testing.assert_close(shot, want, rtol=0, atol=0.51 / 65535)  # 16 bits without loss
    steps = 2 * told["chunks"] + batch * count
    assert shown[-1][:2] == (steps, steps)
    previews = [preview[1] for *_, preview in shown if preview is not None]
    assert previews and {picture.size for picture in previews} == {(32, 32)}
    memory = told["memory_planned"]
    assert memory["host"]["pictures"] == 2 * batch * 12 * 3 * side * side * 3 * 4
    weights = sum(weight.nbytes for model in (upscaler, interp) for weight in model.model.state_dict().values())
    assert memory["device"]["enlarging"] >= weights
    state = result.args[1]
    assert state.stream["enlarged_held"].shape == (batch, 32, 32, 3) and state.nbytes <= memory["disk"]["state"]


def test_resume_redo_and_join_give_the_frames_of_one_run(rollout, both, folders, upscaler):
    models = {"upscale_model": upscaler, "interp_model": interpolator(), "frame_multiplier": 2}
    out = folders / "output"
    first = rollout(length=21, stream=both(history_chunks=1, **models))
    kept, end = load_state(out / "video" / "take_00001_.history/chunk_000001.state.safetensors"), first.args[1]
    whole = rollout(stream=both(**models))
    alone = rollout(resume=end, stream=both(**models))
    joined = [rollout(resume=state, stream=both(join=True, **models)) for state in (kept, end)]
    other = rollout(resume=kept, stream=both(join=True, **models), seed=6)
    one = exr_frames(out / report(whole)["frame_folders"][0])
    film_of_one, rate = film(out / report(whole)["videos"][0])
    assert list(one) == list(range(65)) and film_of_one.shape[0] == 65 and rate == 32
    for each in joined:
        frames = exr_frames(out / report(each)["frame_folders"][0])
        assert list(frames) == list(one) and all(torch.equal(frames[number], one[number]) for number in one)
        assert torch.equal(film(out / report(each)["videos"][0])[0], film_of_one)
    # the in-between of frames 20 and 21 comes first
    rest = exr_frames(out / report(alone)["frame_folders"][0])
    assert list(rest) == list(range(41, 65)) and all(torch.equal(rest[number], one[number]) for number in rest)
    assert torch.equal(film(out / report(alone)["videos"][0])[0], film_of_one[41:])
    remade = exr_frames(out / report(other)["frame_folders"][0])
    assert [torch.equal(remade[number], one[number]) for number in one] == [number < 17 for number in one]


def test_an_interrupt_within_a_chunk_keeps_the_chunks_before(rollout, both, folders, upscaler, interrupt):
    """Cancelled while the third chunk is being enlarged: the files go on from the state that is left, as in one run."""
    models, out = {"upscale_model": upscaler, "interp_model": interpolator()}, folders / "output"
    whole = exr_frames(out / report(rollout(stream=both(**models)))["frame_folders"][0])
    original, calls = upscaler._call_fn, []

    def cancelled(*args):
        calls.append(1)
        if len(calls) == 26:
            comfy.model_management.interrupt_current_processing()
        return original(*args)

    upscaler._call_fn = cancelled
    with pytest.raises(interrupt):
        rollout(stream=both(**models))
    assert len(calls) == 26
    state = load_state(out / "video" / "take_00002_.state.safetensors")
    assert state.emitted == 6 and state.stream["frames_written"] == 21 and state.stream["file_frames"] == [41]
    left = exr_frames(out / "frames" / "take_00002_.frames")
    assert list(left) == list(range(41))
    joined = exr_frames(out / report(rollout(resume=state, stream=both(join=True, **models)))["frame_folders"][0])
    assert list(joined) == list(whole) and all(torch.equal(joined[number], whole[number]) for number in whole)


def test_what_does_not_go_together_is_refused_and_the_rest_is_told(rollout, both, video, frames, folders, tmp_path):
    upscaler, interp = load_upscaler(tmp_path), interpolator()
    plain, large = rollout(length=9, stream=both()).args[1], {"upscale_model": upscaler}
    doubled = rollout(length=9, stream=both(interp_model=interp, **large)).args[1]

    def refused(words, resume=None, stream=None, **inputs):
        with pytest.raises(ValueError, match=words):
            rollout(length=21, resume=resume, stream=stream or both(join=True, **inputs))

    refused("frames of 32x32 and this stream makes 64x64; connect the upscale_model", plain, **large)
    refused("hold 1 frame for each that is decoded and this stream makes 2", plain, interp_model=interp)
    refused("frames of 64x64 and this stream makes 32x32", doubled)
    refused("hold 2 frames for each .* makes 3", doubled, interp_model=interp, frame_multiplier=3, **large)
    told = report(rollout(length=21, resume=plain, stream=both(interp_model=interp)))
    assert "so there are none of the frames 8 and 9" in " ".join(told["warnings"])
    assert list(exr_frames(folders / "output" / told["frame_folders"][0])) == list(range(18, 41))
    models = {"upscale_model": load_upscaler(tmp_path, seed=1), "interp_model": interp}
    told = " ".join(report(rollout(length=21, resume=doubled, stream=both(join=True, **models)))["warnings"])
    assert "made with upscale_model SRVGGNetCompact 2x" in told and "from frame 9 on" in told
    assert "interp_model" not in told
    smaller = video(codec="h264", upscale_by=1.5, **large)
    told = report(rollout(length=9, stream=smaller))
    assert told["enlarged"]["width"] == told["enlarged"]["height"] == 48
    assert film(folders / "output" / told["videos"][0])[0].shape == (9, 48, 48, 3)

    upscaler.scale = 1024
    refused("encoder of H.264 does not take 32768x32768 at 16 fps", stream=video(codec="h264", **large))
    refused("32768x32768, and webp holds at most 16383", stream=frames(format="webp", **large))
    upscaler.scale, upscaler.input_channels = 2, 1
    refused("upscale_model .* makes 3 channels of 1", stream=video(**large))
    interp.model = upscaler.model
    refused("which has no extract_features; connect Load Frame", stream=video(interp_model=interp))
    types = {one.id: one.get_io_type() for one in NODES["AdaStateStreamFrames"].define_schema().inputs}
    assert (types["upscale_model"], types["interp_model"]) == ("UPSCALE_MODEL", "INTERP_MODEL")
    for name, source in (("upscale_model", "Load Upscale Model"), ("interp_model", "Load Frame Interpolation")):
        with pytest.raises(ValueError, match=f"{name} is 3; it must be an .*: connect {source}"):
            video(**{name: 3})
    with pytest.raises(ValueError, match="connect it to the node that stream comes from"):
        frames(stream=video(), **large)


def test_tiles_are_the_hosts_and_become_smaller_where_memory_does_not_do(tmp_path):
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    upscaler = load_upscaler(tmp_path)
    picture = torch.rand(1, 528, 48, 3, generator=torch.Generator().manual_seed(3))
    whole, size = ImageUpscaleWithModel.execute(upscaler, picture).args[0][0], (48, 528)
    enlarger = HostEnlarger(upscaler, None, 1, size, (96, 1056))
    assert torch.equal(enlarger.enlarge(picture[0]), whole) and enlarger.snapshot() == {}
    # the device is asked for room for what a tile of 512 takes by the host's node, in float32
    assert enlarger.working_bytes >= 4 * 3 * 512 * 48 * 2 * 384
    assert [patcher.model for patcher in enlarger.patchers] == [upscaler.model]
    original, sides = upscaler._call_fn, []

    def small(model, tile):
        sides.append(max(tile.shape[2:]))
        if sides[-1] > 256:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(model, tile)

    upscaler._call_fn = small
    less = enlarger.enlarge(picture[0])
    torch.testing.assert_close(less, whole, rtol=0, atol=0.01)
    assert sides[0] == 512 and max(sides[1:]) == 256 and enlarger.snapshot() == {"enlarged_tile": 256}
    tiles = comfy.utils.tiled_scale(picture.movedim(-1, 1), upscaler, 256, 256, 32, 2)
    assert torch.equal(less, tiles[0].movedim(0, -1))
    again = HostEnlarger(upscaler, None, 1, size, (96, 1056))
    again.restore(enlarger.snapshot())
    assert torch.equal(again.enlarge(picture[0]), less)
    upscaler._call_fn = lambda model, tile: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        again.enlarge(picture[0])


def test_models_that_make_all_in_betweens_at_once_do_so_until_memory_does_not_do():
    patcher = interpolator(FlowOnce)
    pictures = torch.rand(3, 40, 32, 3, generator=torch.Generator().manual_seed(4))
    want = enlarged(pictures, None, patcher, 4)
    enlarger = HostEnlarger(None, patcher, 4, (32, 40), (32, 40))
    patcher.model.passes.clear()
    for fails in (0, 1):
        patcher.model.fails = fails
        got = [*enlarger.between(*pictures[:2]), *enlarger.between(*pictures[1:])]
        enlarger.rest()
        assert torch.equal(torch.stack(got), torch.cat([want[1:4], want[5:8]]))
        assert enlarger.snapshot() == ({"enlarged_singly": True} if fails else {})
    assert patcher.model.passes == [0.25, 0.5, 0.75] * 4


def test_the_plan_says_what_the_files_will_be(node, model, both, tmp_path):
    interp, upscaler = interpolator(), load_upscaler(tmp_path, "esrgan")
    stream = both(upscale_model=upscaler, upscale_by=2.25, interp_model=interp, frame_multiplier=4)
    text, numbers = node("AdaStatePlan")(model=model, width=832, height=480, length=81, stream=stream).args
    planned = json.loads(numbers)
    assert "each file of the stream: 1872x1080 at 64 fps, 321 frames" in text and "enlarging takes" in text
    assert planned["files"] == {"width": 1872, "height": 1080, "fps": 64.0, "frames": 321, "frames_for_one": 4}
    assert planned["memory"]["host"]["pictures"] == 2 * 4 * 12 * 1872 * 1080 * 3 * 4
    assert planned["memory"]["device"]["enlarging"] > 0 and planned["plan_bytes"]["vae_cache"] > 0
    without = json.loads(node("AdaStatePlan")(model=model, width=832, height=480, length=81).args[1])
    assert "files" not in without and "enlarging" not in without["memory"]["device"]
