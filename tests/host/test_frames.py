"""Stream To Frames in the host: the decoder's own values in files, one sequence over several runs, beside a video, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes import frames_node, preflight
from adastate_pack.nodes.host.codec import HostDecoder
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from picture_files import png_texts, read_exr, read_png

FILES = {"filename_prefix": "frames/take", "fps": 16.0, "preview": False, "autosave_seconds": 0.0}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def frames(vae, node):
    return lambda **inputs: node("AdaStateStreamFrames")(**({"vae": vae, "format": "png16"} | FILES | inputs)).args[0]


@pytest.fixture
def video(vae, node):
    def make(**inputs):
        files = FILES | {"filename_prefix": "video/take", "codec": "h264", "quality": 18}
        return node("AdaStateStreamOutput")(**({"vae": vae} | files | inputs)).args[0]

    return make


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1} | inputs))


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.name != "sequence.json")


def report(result) -> dict:
    return json.loads(result.args[2])


def test_frames_are_the_decoders_own_values(rollout, frames, folders, vae):
    result = rollout(stream=frames(), batch_size=2)
    out = folders / "output" / "frames"
    assert report(result)["frame_folders"] == ["frames/take_00001_b0.frames", "frames/take_00001_b1.frames"]
    both = HostDecoder(vae, fast=True).step(result.args[0]["samples"]).double().numpy()
    for item, floats in enumerate(both):
        folder = out / f"take_00001_b{item}.frames"
        assert names(folder) == [f"{number:06}.png" for number in range(33)]
        for number in (0, 7, 32):
            off = read_png(folder / f"{number:06}.png") - floats[number] * 65535
            assert numpy.abs(off).max() <= 0.5
    exact = rollout(stream=frames(format="exr"))
    floats = HostDecoder(vae, fast=True).step(exact.args[0]["samples"])[0].numpy()
    for number in (0, 20, 32):
        assert numpy.array_equal(read_exr(out / "take_00002_.frames" / f"{number:06}.exr"), floats[number])


def test_without_a_video_the_folder_lends_its_name(rollout, frames, folders):
    result = rollout(stream=frames(keep_state=True))
    told = report(result)
    assert (told["videos"], told["files"], told["ended"]) == ([], [], "whole")
    assert told["state"] == "frames/take_00001_.state.safetensors [output]"
    assert names(folders / "output" / "frames") == [
        "take_00001_.frames", "take_00001_.report.json", "take_00001_.state.safetensors",
    ]  # fmt: skip
    assert "this stream writes frames alone" in result.args[3].message
    assert result.ui["images"] == [
        {"filename": "000032.png", "subfolder": "frames/take_00001_.frames", "type": "output"}
    ]
    assert result.ui["animated"] == (False,)
    page = rollout(stream=frames(format="webp", filename_prefix="page"))
    assert page.ui["images"][0]["filename"] == "000000.webp" and page.ui["animated"] == (True,)
    with Image.open(folders / "output" / "page_00001_.frames" / "000000.webp") as image:
        assert image.n_frames == 33 and image.size == (32, 32)
    assert "images" not in rollout(stream=frames(format="exr", filename_prefix="deep")).ui


def test_png_frames_open_the_graph(node, frames, folders, model, positive):
    clone = node("AdaStateRollout").node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    graph = {"workflow": {"nodes": [{"id": 5}]}}
    clone.hidden = SimpleNamespace(prompt={"5": {"inputs": {}}}, extra_pnginfo=graph, unique_id="5", dynprompt=None)
    with torch.inference_mode():
        clone.execute(
            model=model, positive=positive, width=32, height=32, length=5, batch_size=1, seed=5, steps=1, shift=5.0,
            chunk_frames=1, window_frames=1, positions="packed", stream=frames(format="png"),
        )  # fmt: skip
    for name in ("000000.png", "000004.png"):
        texts = png_texts(folders / "output" / "frames" / "take_00001_.frames" / name)
        assert {key: json.loads(text) for key, text in texts.items()} == {"prompt": {"5": {"inputs": {}}}} | graph


@pytest.mark.parametrize("stream", ["frames", "video"])
@pytest.mark.parametrize(
    "info",
    [
        "abc", [1, 2], ["ab", "cd"], 5, {"\ud800": 1}, {"a": "\ud800"}, {"a\0b": "a"}, {"": 1}, {"x" * 300: 1},
        {"\u96ea": {"a": 1}}, {"workflow": "abc"},
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_sent_beside_a_prompt_cannot_fail_a_run(node, frames, vae, folders, model, positive, stream, info):
    """extra_pnginfo may be anything; what a file can hold of it is embedded, and the prompt always is."""
    if stream == "frames":
        given = frames(format="png")
    else:
        given = node("AdaStateStreamOutput")(
            vae=vae, filename_prefix="sent", fps=0.0, codec="h264", quality=18, preview=False
        ).args[0]
    clone = node("AdaStateRollout").node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    clone.hidden = SimpleNamespace(prompt={"5": {"inputs": {}}}, extra_pnginfo=info, unique_id="5", dynprompt=None)
    with torch.inference_mode():
        clone.execute(
            model=model, positive=positive, width=32, height=32, length=1, batch_size=1, seed=5, steps=1, shift=5.0,
            chunk_frames=1, window_frames=1, positions="packed", stream=given,
        )  # fmt: skip
    if stream == "frames":
        texts = png_texts(folders / "output" / "frames" / "take_00001_.frames" / "000000.png")
    else:
        with av.open(str(folders / "output" / "sent_00001_.mp4")) as container:
            texts = container.metadata
    assert json.loads(texts["prompt"]) == {"5": {"inputs": {}}}


@pytest.mark.parametrize("form", ["png", "webp"])
def test_resume_and_redo_make_one_sequence(rollout, frames, folders, form):
    """81 frames at once; 33 of them, and on from there; and again from a state that was kept on the way."""
    out = folders / "output" / "frames"
    whole = rollout(length=81, stream=frames(format=form))
    first = rollout(length=33, stream=frames(format=form, history_chunks=1))
    alone = rollout(length=81, resume=first.args[1], stream=frames(format=form))
    joined = rollout(length=81, resume=first.args[1], stream=frames(format=form, join=True))
    kept = load_state(out / "take_00002_.history" / "chunk_000002.state.safetensors")
    redone = rollout(length=81, resume=kept, stream=frames(format=form, join=True), seed=6)
    again = rollout(length=81, resume=kept, stream=frames(format=form, join=True))
    paths = [folders / "output" / report(each)["frame_folders"][0] for each in (whole, alone, joined, redone, again)]
    if form == "webp":
        assert names(paths[1]) == ["000033.webp"]
        files = [(path / "000000.webp").read_bytes() for path in paths if path != paths[1]]
        assert files[0] == files[1] == files[3] != files[2]
        return
    wanted = [f"{number:06}.png" for number in range(81)]
    assert names(paths[0]) == names(paths[2]) == names(paths[3]) == names(paths[4]) == wanted
    assert names(paths[1]) == wanted[33:]
    for name in wanted:
        one = (paths[0] / name).read_bytes()
        assert one == (paths[2] / name).read_bytes() == (paths[4] / name).read_bytes()
        assert name < wanted[33] or one == (paths[1] / name).read_bytes()
        assert (one == (paths[3] / name).read_bytes()) == (name < wanted[21]), name


def test_beside_a_video_both_are_as_alone(rollout, frames, video, folders):
    out = folders / "output"
    rollout(stream=video(filename_prefix="alone"))
    rollout(stream=frames(filename_prefix="still"))
    both = frames(stream=video(keep_state=True), vae=None, format="png16")
    both = frames(stream=both, vae=None, format="tiff16", filename_prefix="deep/take")
    result = rollout(stream=both)
    told = report(result)
    assert (
        told["videos"] == ["video/take_00001_.mp4"] and told["state"] == "video/take_00001_.state.safetensors [output]"
    )
    assert told["frame_folders"] == ["frames/take_00001_.frames", "deep/take_00001_.frames"]
    one, other = ((out / name).read_bytes() for name in ("alone_00001_.mp4", "video/take_00001_.mp4"))
    assert len(one) == len(other)  # but for the run's id, which both carry
    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 32
    for name in names(out / "still_00001_.frames"):
        assert (out / "still_00001_.frames" / name).read_bytes() == (out / told["frame_folders"][0] / name).read_bytes()
    more = frames(stream=video(join=True), vae=None, join=True)
    longer = rollout(length=45, resume=result.args[1], stream=more)
    folder = out / report(longer)["frame_folders"][0]
    assert names(folder) == [f"{number:06}.png" for number in range(45)]
    assert longer.args[3].get_frame_count() == 45


def test_what_cannot_be_joined_is_refused_before_anything_is_written(rollout, frames, video, folders):
    out = folders / "output"
    first = rollout(stream=frames()).args[1]
    plain = rollout(stream=video()).args[1]
    before = sorted(out.rglob("*"))

    def refused(state, message, **inputs):
        with pytest.raises(ValueError, match=message) as told:
            rollout(length=45, resume=state, stream=frames(join=True, **inputs))
        assert "\n" not in str(told.value) and sorted(out.rglob("*")) == before

    refused(plain, "the state names no frames to join to; turn join of Stream To Frames off")
    refused(first, "its format is png16 and the new frames' exr; use the same format", format="exr")
    refused(first, "its fps is 16 and the new frames' 24; use the same fps", fps=24.0)
    about = out / "frames" / "take_00001_.frames" / "sequence.json"
    held = json.loads(about.read_text())
    about.write_text(json.dumps(held | {"run_id": "another"}))
    refused(first, "take_00001_.frames in the output folder is missing or holds frames of another run")
    about.write_text(json.dumps(held | {"width": 64}))
    refused(first, "its size is 64x32 and the new frames' 32x32; use the same size")
    about.write_text(json.dumps(held))
    (about.parent / "000007.png").rename(out / "aside.png")
    before = sorted(out.rglob("*"))
    refused(first, "^000007.png of frames/take_00001_.frames is missing; put it back, or turn join")


def test_what_the_node_refuses(node, frames, vae):
    kind = node("AdaStateStreamFrames")
    assert kind.validate(filename_prefix="frames/take") is True
    for prefix, message in (("../out", "inside the host's folder"), ("a\nb", "control character"), ("x" * 300, "255")):
        assert message in kind.validate(filename_prefix=prefix)
    with pytest.raises(ValueError, match="neither vae nor stream is connected; connect the VAE, or STREAM of"):
        frames(vae=None)
    with pytest.raises(ValueError, match="stream writes png16 frames already; choose another format"):
        frames(stream=frames(), vae=None)


def test_imageio_is_wanted_only_when_the_node_runs(frames, monkeypatch):
    assert "imageio" not in frames_node.__dict__
    monkeypatch.setitem(sys.modules, "imageio.plugins.pyav", None)
    with pytest.raises(RuntimeError, match="needs the package imageio .* run pip install -r requirements.txt"):
        frames()


def test_a_full_disk_is_told_before_and_while(rollout, frames, folders, monkeypatch):
    chunk, whole = 12 * 32 * 32 * 6, 33 * 32 * 32 * 6
    monkeypatch.setattr(preflight, "output_room", lambda: chunk - 1)
    with pytest.raises(ValueError, match="a chunk's frames take 73.7 kB before they are compressed, and the output"):
        rollout(stream=frames())
    assert not list((folders / "output").iterdir())
    monkeypatch.setattr(preflight, "output_room", lambda: whole - 1)
    assert "the frames take up to 202.8 kB" in "".join(report(rollout(stream=frames()))["warnings"])
    monkeypatch.setattr(preflight, "output_room", lambda: whole)
    assert "the frames take" not in "".join(report(rollout(stream=frames()))["warnings"])


def test_frames_that_fail_end_the_run_with_a_state_to_go_on_from(rollout, frames, folders, monkeypatch):
    from adastate_pack.adastate_core.files import whole_file

    write, out = whole_file.WholeFiles.write, folders / "output" / "frames"

    def full(self, path, data):
        if path.name == "000025.png":
            raise OSError(28, "No space left on device")
        write(self, path, data)

    monkeypatch.setattr(whole_file.WholeFiles, "write", full)
    with pytest.raises(OSError, match=r"^frame 25 of take_00001_.frames could not be written \(No space left"):
        rollout(length=57, stream=frames())
    monkeypatch.setattr(whole_file.WholeFiles, "write", write)
    told = json.loads((out / "take_00001_.report.json").read_text())
    assert told["ended"] == "failed" and told["frame_folders"] == ["frames/take_00001_.frames"]
    state = load_state(out / "take_00001_.state.safetensors")
    rollout(length=57, resume=state, stream=frames(join=True))
    rollout(length=57, stream=frames())
    for name in (f"{number:06}.png" for number in range(57)):
        one, other = ((out / f"take_0000{run}_.frames" / name).read_bytes() for run in (2, 3))
        assert one == other
