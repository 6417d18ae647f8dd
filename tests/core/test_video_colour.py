"""Colours of frames and files, judged by arithmetic: known RGB through the formulas in float64."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
import torch
from colours import PATCHES, codes_of, container_tags, made, middles, patches, rgb_of, stream_tags, yuv_of

from adastate_core.video.colour import rgb
from adastate_core.video.sink import VideoSink

DATA = Path(__file__).parent / "data"
BT709 = (1, 1, 1, False)
FORMATS = {
    "yuv420p": (8, 2, 2),
    "yuv422p": (8, 1, 2),
    "yuv444p": (8, 1, 1),
    "yuv440p": (8, 2, 1),
    "yuv411p": (8, 1, 4),
    "yuva420p": (8, 2, 2),
    "yuvj420p": (8, 2, 2),
    "yuv420p10le": (10, 2, 2),
    "yuv420p10be": (10, 2, 2),
    "yuv444p12le": (12, 1, 1),
    "yuv422p16le": (16, 1, 2),
}


def noise(height: int, width: int) -> numpy.ndarray:
    """Random colours in blocks of 4 pixels, uint8 [height, width, 3]."""
    blocks = numpy.random.default_rng(0).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=numpy.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def coded(picture: numpy.ndarray, name: str, matrix: int, full: bool) -> av.VideoFrame:
    bits, down, across = FORMATS[name]
    kind = numpy.dtype("u1" if bits == 8 else ">u2" if name.endswith("be") else "<u2")
    codes = yuv_of(picture, matrix, full, bits).round().clip(0, 2**bits - 1).astype(kind)
    planes = [codes[..., 0], codes[::down, ::across, 1], codes[::down, ::across, 2]]
    return made(name, planes, picture.shape[1], picture.shape[0])


def judged(picture: numpy.ndarray, name: str, matrix: int, full: bool) -> numpy.ndarray:
    bits, down, across = FORMATS[name]
    codes = yuv_of(picture, matrix, full, bits).round().clip(0, 2**bits - 1)
    chroma = codes[::down, ::across].repeat(down, 0).repeat(across, 1)[: picture.shape[0], : picture.shape[1], 1:]
    return rgb_of(numpy.concatenate([codes[..., :1], chroma], -1), matrix, full, bits)


@pytest.mark.parametrize("size", [(64, 64), (61, 127)], ids=["even", "odd"])
@pytest.mark.parametrize("matrix", [1, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_a_frame_is_read_by_its_own_tags(name, matrix, size):
    for full in (True,) if "yuvj" in name else (False, True):
        picture = noise(*size)
        frame = coded(picture, name, matrix, full)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        found = rgb(frame)
        assert found.dtype == numpy.uint8 and found.shape == picture.shape
        assert abs(found - judged(picture, name, matrix, full)).max() < 0.56
        assert abs(found.astype(int) - picture).max() <= 2


@pytest.mark.parametrize(("name", "full"), [("yuv420p", False), ("yuv420p10le", False), ("yuvj420p", True)])
@pytest.mark.parametrize("matrix", [0, 2, 3])
@pytest.mark.parametrize("height", [64, 720])
def test_what_is_not_tagged_is_bt601(name, full, matrix, height):
    """At every size: in a ComfyUI the untagged files are its own savers' and this pack's of before, and they hold BT.601."""
    picture = noise(height, 64)
    frame = coded(picture, name, 5, full)
    frame.colorspace, frame.color_range = matrix, 0
    assert abs(rgb(frame) - judged(picture, name, 5, full)).max() < 0.56


@pytest.mark.parametrize("name", ["nv12", "nv21", "yuyv422", "uyvy422", "p010le", "nv24"])
def test_other_layouts_hold_the_same(name):
    planar = {"p010le": "yuv420p10le", "yuyv422": "yuv422p", "uyvy422": "yuv422p", "nv24": "yuv444p"}.get(
        name, "yuv420p"
    )
    picture = noise(62, 126)
    frame = coded(picture, planar, 1, False)
    codes = [numpy.frombuffer(p, numpy.uint8).reshape(-1, p.line_size)[: p.height] for p in frame.planes]
    y, u, v = (c[:, : p.width * (2 if "10" in planar else 1)] for c, p in zip(codes, frame.planes, strict=True))
    if name == "p010le":
        y, u, v = (numpy.ascontiguousarray(p).view("<u2") << 6 for p in (y, u, v))
    pairs = {"nv21": (v, u)}.get(name, (u, v))
    planes = [y, numpy.stack(pairs, -1).reshape(u.shape[0], -1)]
    if "422" in name:
        four = (y[:, ::2], u, y[:, 1::2], v) if name == "yuyv422" else (u, y[:, ::2], v, y[:, 1::2])
        planes = [numpy.stack(four, -1).reshape(y.shape[0], -1)]
    other = made(name, planes, 126, 62)
    for each in (frame, other):
        each.colorspace, each.color_range = 1, 1
    assert numpy.array_equal(rgb(other), rgb(frame))
    assert other.format.name == name and other.colorspace == 1 and other.color_range == 1


@pytest.mark.parametrize("tag", [0, 1, 2])
def test_rgb_is_full_whatever_its_tag(tag):
    picture = noise(62, 126)
    for name, planes in {
        "rgb24": [picture.reshape(62, -1)],
        "bgr24": [picture[..., ::-1].reshape(62, -1)],
        "gbrp": [picture[..., 1], picture[..., 2], picture[..., 0]],
        "gbrp16le": [picture[..., i].astype("<u2") * 257 for i in (1, 2, 0)],
        "rgb48le": [(picture.astype("<u2") * 257).reshape(62, -1)],
        "rgba": [numpy.concatenate([picture, numpy.full((62, 126, 1), 9, "u1")], -1).reshape(62, -1)],
    }.items():
        frame = made(name, planes, 126, 62)
        frame.color_range = tag
        assert numpy.array_equal(rgb(frame), picture), name


@pytest.mark.parametrize(("tag", "full"), [(0, True), (1, False), (2, True)])
def test_gray_is_full_unless_it_says_otherwise(tag, full):
    levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    expected = levels if full else ((levels.astype(float) - 16) / 219 * 255).clip(0, 255)
    frames = [made("gray", [levels], 16, 16)]
    if full:
        frames.append(made("gray16le", [levels.astype("<u2") * 257], 16, 16))
    for frame in frames:
        frame.color_range = tag
        assert abs(rgb(frame) - expected[..., None].repeat(3, 2)).max() < 0.56


def encoded(path: Path, name: str, matrix: int, full: bool, tags: dict[str, int]) -> None:
    """A video of the patches in an encoder's own words, from codes that arithmetic made."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, name
        stream.time_base = stream.codec_context.time_base = Fraction(1, 16)
        for tag, value in tags.items():
            setattr(stream.codec_context, tag, value)
        for number in range(3):
            frame = coded(patches(1)[0], name, matrix, full)
            frame.colorspace, frame.color_range = tags.get("colorspace", 2), tags.get("color_range", 0)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov", "ts"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
@pytest.mark.parametrize("name", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_a_files_tags_reach_its_frames(tmp_path, name, matrix, full, ending):
    path = tmp_path / f"a.{ending}"
    encoded(path, name, matrix, full, {"colorspace": matrix, "color_range": 2 if full else 1})
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert abs(middles(rgb(frame)) - PATCHES).max() <= 3


def sink_frames(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (832, 480), (1280, 720), (96, 1088)])
def test_new_videos_are_bt709_and_say_so(tmp_path, width, height):
    path, killed = tmp_path / "a.mp4", tmp_path / "killed.mp4"
    with VideoSink(path, width, height, 16) as sink:
        for _ in range(2):
            sink.write(torch.from_numpy(patches(3, width, height)))
        shutil.copy(path, killed)
    for each in (killed, path):
        assert container_tags(each) == stream_tags(each) == BT709
        frames = sink_frames(each)
        assert len(frames) >= 5
        for frame in frames:
            assert abs(middles(codes_of(frame)) - yuv_of(numpy.array(PATCHES), 1, False)).max() <= 2
            assert abs(middles(rgb(frame)) - PATCHES).max() <= 3
            assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)


@pytest.mark.parametrize("name", ["16", "growing"])
def test_a_join_goes_on_in_the_colours_that_its_file_began_with(tmp_path, name):
    """A file of before holds BT.601 without a tag; so does what is joined to it, and what is joined to that."""
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    more = torch.from_numpy(patches(12))
    with VideoSink(first, 64, 64, 16, prefix=DATA / f"91e434f_{name}.mp4", prefix_frames=21) as sink:
        sink.write(more)
        shutil.copy(first, tmp_path / "growing.mp4")
    with VideoSink(second, 64, 64, 16, prefix=first, prefix_frames=33) as sink:
        sink.write(more)
    for path, count in ((tmp_path / "growing.mp4", 32), (first, 33), (second, 45)):
        frames = sink_frames(path)
        assert len(frames) == count and container_tags(path) is stream_tags(path) is None
        for frame in frames:
            assert abs(middles(codes_of(frame)) - yuv_of(numpy.array(PATCHES), 5, False)).max() <= 2
            assert abs(middles(rgb(frame)) - PATCHES).max() <= 3


def test_a_join_to_a_tagged_file_is_tagged(tmp_path):
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    with VideoSink(first, 64, 64, 16) as sink:
        sink.write(torch.from_numpy(patches(9)))
    with VideoSink(second, 64, 64, 16, prefix=first, prefix_frames=9) as sink:
        sink.write(torch.from_numpy(patches(12)))
    frames = sink_frames(second)
    assert len(frames) == 21 and container_tags(second) == stream_tags(second) == BT709
    assert max(abs(middles(rgb(frame)) - PATCHES).max() for frame in frames) <= 3
