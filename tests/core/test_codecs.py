"""The codecs beside H.264: depth, colours, growth, joining and what a kill leaves, each as H.264 is tested."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
import torch
from colours import rgb_of, yuv_of

from adastate_core.video.colour import rgb
from adastate_core.video.deep_frames import deep_frame
from adastate_core.video.encoder import CODECS, Encoding
from adastate_core.video.sink import VideoSink
from adastate_core.video.tail import tail_frames

ROOT = Path(__file__).resolve().parents[2]
OTHERS = [name for name in CODECS if name != "h264"]
DEEP = [name for name, codec in CODECS.items() if codec.takes == "float"]
# at 64x64 the HEVC encoder does not make the same bits twice; at this size it does
SIDE = 128


def moving(frames: int, start: int = 0) -> torch.Tensor:
    """float32 [frames, 128, 128, 3]: slow waves that drift, so that no two frames are alike."""
    t = torch.arange(start, start + frames)[:, None, None] / 20
    y, x = (torch.linspace(0, 3, SIDE)[None, :, None], torch.linspace(0, 3, SIDE)[None, None, :])
    waves = [0.5 + 0.45 * torch.sin(a * x + b * y + t * c) for a, b, c in ((1, 2, 1), (2, 1, 2), (1.5, 0.5, 3))]
    return torch.stack(waves, -1)


def given(codec: str, pictures: torch.Tensor) -> torch.Tensor:
    return pictures if CODECS[codec].takes == "float" else (pictures * 255).to(torch.uint8)


def sink(path: Path, codec: str, **options) -> VideoSink:
    return VideoSink(path.with_suffix(CODECS[codec].suffix), SIDE, SIDE, 16, codec=codec, **options)


def written(path: Path, codec: str, counts=(9, 12), start: int = 0, **options) -> Path:
    with sink(path, codec, **options) as growing:
        for count in counts:
            growing.write(given(codec, moving(count, start)))
            start += count
    assert not growing.warning
    return growing.path


def planes_of(frame: av.VideoFrame) -> numpy.ndarray:
    """The codes of a planar frame [height, width, 3], chroma repeated."""
    kind, out = ("<u2" if frame.format.components[0].bits > 8 else "u1"), []
    for plane in frame.planes[:3]:
        size = numpy.dtype(kind).itemsize
        rows = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width * size]
        values = rows.view(kind)
        down, across = frame.height // plane.height, frame.width // plane.width
        out.append(values.repeat(down, 0).repeat(across, 1))
    return numpy.stack(out, -1)


def floats(path: Path) -> numpy.ndarray:
    """[frames, height, width, 3] in 0..255, by the formulas in float64 and at the depth of the file."""
    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            codes, bits = planes_of(frame).astype(numpy.float64), frame.format.components[0].bits
            if frame.format.name.startswith("gbrp"):
                found.append(codes[..., [2, 0, 1]] / (2**bits - 1) * 255)
            else:
                assert int(frame.colorspace) == 1
                found.append(rgb_of(codes, 1, False, bits))
    return numpy.stack(found)


def packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.dts is not None]


def coded(packet: av.Packet, codec: str) -> list[bytes]:
    """What is coded in a packet; of HEVC without parameter sets, which older builds put into keyframes as they copy them."""
    data, units = bytes(packet), []
    if CODECS[codec].named != "hevc":
        return [data]
    while data:
        size = int.from_bytes(data[:4], "big")
        units, data = [*units, data[4 : 4 + size]], data[4 + size :]
    return [unit for unit in units if unit[0] >> 1 < 32]


def test_this_build_carries_what_the_list_says():
    assert list(CODECS)[0] == "h264" and {"hevc", "hevc_10bit", "prores", "ffv1"} <= set(CODECS)
    for name in OTHERS:
        assert Encoding(SIDE, SIDE, Fraction(16), name).signature() is not None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fps", [16, 24000 / 1001])
def test_a_finished_file_of_any_length_shows_its_last_frame(tmp_path, codec, fps):
    for frames in (1, 2, 9, 10):
        path = tmp_path / f"{frames}{CODECS[codec].suffix}"
        with VideoSink(path, SIDE, SIDE, fps, codec=codec) as growing:
            growing.write(given(codec, moving(frames)))
        assert not growing.warning and len(floats(path) if codec != "h264" else packets(path)) == frames


@pytest.mark.parametrize("codec", OTHERS)
def test_frames_metadata_keyframes_and_pace(tmp_path, codec):
    path = written(tmp_path / "a", codec, (9, 12, 12), metadata={"workflow": {"nodes": []}})
    assert len(floats(path)) == 33
    with av.open(str(path)) as container:
        assert {key.lower(): value for key, value in container.metadata.items()}["workflow"] == '{"nodes": []}'
        assert container.streams.video[0].average_rate == 16
        assert container.streams.video[0].codec_context.pix_fmt == CODECS[codec].pixels
    found = packets(path)
    times = [float(packet.pts * packet.time_base) for packet in found]
    assert numpy.allclose(times, numpy.arange(33) / 16, atol=0.001)
    keys = [i for i, packet in enumerate(found) if packet.is_keyframe]
    assert keys == (list(range(33)) if codec in ("prores", "ffv1") else [0, 9, 21])
    taken = tail_frames(path, 5)
    assert numpy.abs(taken.astype(float) - moving(5, 28).numpy() * 255).mean() < 3  # Continue Video reads it


@pytest.mark.parametrize("pixels, chroma", [("yuv420p10le", (2, 2)), ("yuv422p10le", (2, 1))])
def test_ten_bit_codes_are_those_of_bt709(pixels, chroma):
    """Against the formulas in float64: every code is the nearest one; colour is the mean of those that share it."""
    picture = torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(2)).numpy()
    picture[0], picture[1], picture[2] = 0, 1, (0, 1, 0)
    wanted = yuv_of(picture.astype(numpy.float64) * 255, 1, False, 10)
    across, down = chroma
    shared = wanted[..., 1:].reshape(32 // down, down, 64 // across, across, 2).mean((1, 3))
    wanted[..., 1:] = shared.repeat(down, 0).repeat(across, 1)
    frame = deep_frame(picture, pixels, chroma)
    assert numpy.abs(planes_of(frame) - wanted).max() <= 0.5 + 1e-3
    assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
    flat = deep_frame(numpy.full((32, 64, 3), 0.4, numpy.float32), pixels, chroma)
    assert numpy.all(rgb(flat) == 102)


def test_ffv1_is_within_half_a_step_of_the_floats(tmp_path):
    pictures = torch.rand(4, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))
    pictures[0, 0], pictures[0, 1] = 0, 1
    pictures[1, 0, :, 0] = (torch.arange(SIDE) + 0.5) / 65535
    with sink(tmp_path / "a", "ffv1") as growing:
        growing.write(pictures)
    with av.open(str(growing.path)) as container:
        for frame, picture in zip(container.decode(video=0), pictures, strict=True):
            codes = planes_of(frame)[..., [2, 0, 1]]
            assert numpy.abs(codes - picture.double().numpy() * 65535).max() <= 0.5


def ramp() -> torch.Tensor:
    """Black to white over 1024 columns, and slow colours below."""
    line = torch.linspace(0, 1, 1024)
    gray = line[None, :, None].expand(32, 1024, 3)
    hues = torch.stack([line, 1 - line, 0.5 + 0.4 * torch.sin(9 * line)], -1)[None].expand(32, 1024, 3)
    return torch.cat([gray, hues])[None].expand(6, 64, 1024, 3).contiguous()


def ramp_read(path: Path, codec: str) -> numpy.ndarray:
    path = path.with_suffix(CODECS[codec].suffix)
    with VideoSink(path, 1024, 64, 16, codec=codec, quality=10) as growing:
        growing.write(given(codec, ramp()))
    return floats(path) / 255


@pytest.mark.parametrize("codec", DEEP)
def test_deep_codecs_show_more_levels_and_are_nearer_than_eight_bits(tmp_path, codec):
    plain = codec.removesuffix("_10bit") if codec.endswith("_10bit") else "h264"
    deep, shallow = ramp_read(tmp_path / "deep", codec), ramp_read(tmp_path / "plain", plain)
    for channel in range(3):
        levels = len(numpy.unique(numpy.round(deep[-1, :32, :, channel] * 1e4)))
        assert levels > 256 and len(numpy.unique(numpy.round(shallow[-1, 8, :, channel] * 1e4))) <= 256
    wanted = ramp().double().numpy()
    off, other = (numpy.abs(found - wanted)[:, :32].mean() for found in (deep, shallow))
    assert off < other
    assert numpy.abs(deep - wanted).mean() < numpy.abs(shallow - wanted).mean()


@pytest.mark.parametrize("codec", OTHERS)
def test_a_joined_file_holds_the_old_packets_unchanged(tmp_path, codec):
    old = written(tmp_path / "old", codec, (9, 12, 12))
    new = written(tmp_path / "new", codec, (12, 12), 21, prefix=old, prefix_frames=21)
    third = written(tmp_path / "third", codec, (12,), 45, prefix=new, prefix_frames=45)
    before, after = ([coded(packet, codec) for packet in packets(path)] for path in (old, third))
    assert len(after) == 57 and before[:21] == after[:21]
    whole = written(tmp_path / "whole", codec, (9, 12, 12, 12, 12))
    assert numpy.array_equal(floats(third)[:21], floats(whole)[:21])
    assert numpy.abs(floats(third) - floats(whole)).mean() < 3
    with pytest.raises(ValueError, match=r"has (16|15\.99[0-9]*|16\.00[0-9]*) fps and fps is 24; use the same fps"):
        VideoSink(tmp_path / "x", SIDE, SIDE, 24, codec=codec, prefix=old, prefix_frames=21)
    other = "hevc" if codec != "hevc" else "h264"
    with pytest.raises(ValueError, match=f"was made with codec {codec} and codec is {other}; use the same codec"):
        sink(tmp_path / "y", other, prefix=old, prefix_frames=21)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from fractions import Fraction
from pathlib import Path
from test_codecs import given, moving, sink
growing = sink(Path({path!r}), {codec!r})
for start in range(0, 100000, 12):
    growing.write(given({codec!r}, moving(12, start)))
    print(start + 12, flush=True)
"""


@pytest.mark.parametrize("codec", OTHERS)
def test_a_killed_process_leaves_a_file_that_plays(tmp_path, codec):
    """All frames but the newest."""
    path = tmp_path / "killed"
    code = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path), codec=codec)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    count = 0
    while count < 36:
        count = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    file = path.with_suffix(CODECS[codec].suffix)
    assert len(floats(file)) >= count - 1
    again = written(tmp_path / "again", codec, (12,), 24, prefix=file, prefix_frames=24)
    assert len(floats(again)) == 36


def test_what_a_codec_cannot_take_is_told(tmp_path):
    with pytest.raises(ValueError, match="codec is 'mpeg2'; it must be one of h264, hevc, "):
        Encoding(64, 64, Fraction(16), "mpeg2")
    with pytest.raises(ValueError, match="the video is 63x64; HEVC needs even sides"):
        Encoding(63, 64, Fraction(16), "hevc")
    if "av1" in CODECS:
        with pytest.raises(ValueError, match="the video is 32x64; AV1 needs sides of 64 or more: choose another codec"):
            Encoding(32, 64, Fraction(16), "av1")
    for size in ((8, 8), (2, 2)):
        for codec in CODECS:
            try:
                Encoding(*size, Fraction(16), codec).signature()
            except ValueError as error:
                assert "choose another codec" in str(error) and "\n" not in str(error)
