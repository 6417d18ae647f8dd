"""The door through which videos are read: what is let in, which way up it stands, in what size it comes."""

from __future__ import annotations

import io
import os
import re
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import odd_videos
import pytest
import torch
from av.stream import Disposition

from adastate_core.measure.compare import Comparison
from adastate_core.measure.metrics import read_pictures
from adastate_core.video import frames as video_frames
from adastate_core.video.frames import FileClip, MemoryClip, UnreadableVideo, decoded
from adastate_core.video.tail import tail, tail_frames

SIDE = odd_videos.SIDE
CORNERS = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [180, 180, 180]]], np.uint8)


def corners(path: Path, width: int = 96, height: int = 64, frames: int = 6, **stream_values) -> Path:
    """A still picture whose four quarters have four colours: red, green / blue, grey."""
    picture = CORNERS.repeat(height // 2, 0).repeat(width // 2, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"qp": "4", "g": "4"}
        for name, value in stream_values.items():
            setattr(stream.codec_context, name, value)
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def quarters(picture: np.ndarray) -> np.ndarray:
    """The colours in the middle of the quarters, [2, 2, 3]."""
    height, width = picture.shape[:2]
    return picture[height // 4 :: height // 2, width // 4 :: width // 2]


def close(a: np.ndarray, b: np.ndarray, by: int = 12) -> bool:
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= by


def readers(path: Path, other: Path) -> dict[str, object]:
    """What each reader makes of a file: a number of pictures, or its sentence."""
    found = {}
    for name, read in {
        "tail": lambda: len(tail_frames(str(path), 5)),
        "metrics": lambda: sum(1 for _ in read_pictures(str(path))),
        "compare": lambda: sum(1 for _ in Comparison([str(other), str(path)], ["one", "two"])),
        "stream": lambda: len(tail_frames(io.BytesIO(path.read_bytes()), 5)) if path.is_file() else 0,
    }.items():
        try:
            found[name] = read()
        except ValueError as error:
            found[name] = str(error)
    return found


def is_sentence(text: str, path: Path) -> bool:
    return bool(
        re.fullmatch(
            r"(the video|two) (cannot be read|has no picture track|has no frame in it): [^\n]*; connect a .*", text
        )
        and not re.search(r"Errno|returned \d|Invalid data|Traceback|<|0x", text)
        and str(path.parent) not in text
        and "/" not in text.replace(path.name, "")
    )


def test_a_broken_file_is_read_as_far_as_it_goes_or_refused_in_a_sentence(tmp_path):
    other, read, refused = odd_videos.write(tmp_path / "other.mp4", "libx264", "yuv420p"), 0, 0
    for path in [*odd_videos.broken(tmp_path), *odd_videos.no_videos(tmp_path)]:
        found = readers(path, other)
        said = [each for each in found.values() if isinstance(each, str)]
        assert all(is_sentence(each, path) for each in said), (path.name, said)
        of_file = {name: isinstance(each, str) for name, each in found.items() if name != "stream"}
        assert len(set(of_file.values())) == 1, (path.name, found)
        assert all(path.name in found[name] for name, told in of_file.items() if told), found
        refused, read = refused + of_file["tail"], read + (not of_file["tail"])
    assert refused > 50 and read > 15


@pytest.mark.parametrize("link", [False, True])
def test_no_other_file_is_reached(tmp_path, link):
    """What leads elsewhere is refused, under every name; the file that it leads to is one that is read."""
    other = odd_videos.write(tmp_path / "other.ts", "libx264", "yuv420p")
    assert len(tail_frames(str(other), 5)) == 5
    paths = list(odd_videos.lists(tmp_path, other))
    assert len(paths) > 15
    if link:  # as Load Video finds them: under a name of a video
        named = [tmp_path / f"link{i}.mp4" for i in range(len(paths))]
        for name, path in zip(named, paths, strict=True):
            name.symlink_to(path)
        paths = named
    for path in paths:
        for name, said in readers(path, other).items():
            assert name == "stream" and said == 0 or is_sentence(said, path), (path, name, said)


def test_addresses_and_devices_are_not_opened(tmp_path):
    for source in (
        "http://127.0.0.1:9/a.mp4",
        "pipe:0",
        "lavfi:testsrc",
        "data:video/mp4;base64,AAAA",
        "a\0b",
        "",
        "/",
    ):
        with pytest.raises(UnreadableVideo, match="cannot be read"):
            FileClip(source)
    if hasattr(os, "mkfifo"):  # would wait for a writer for ever
        os.mkfifo(tmp_path / "a.mp4")
        with pytest.raises(UnreadableVideo, match=r"a\.mp4 is a folder or device"):
            tail_frames(str(tmp_path / "a.mp4"), 5)


@pytest.mark.parametrize("kind", odd_videos.KINDS)
@pytest.mark.parametrize("name", ["plain", "ümläut 漢字 %d", "concat:a|b", "-i"])
def test_every_known_container_is_read_whatever_its_name(tmp_path, kind, name):
    codec, pixels = odd_videos.KINDS[kind]
    odd_videos.write(tmp_path / f"a.{kind}", codec, pixels).rename(tmp_path / f"{name}.{kind}")
    found = tail_frames(tmp_path / f"{name}.{kind}", 7)
    assert found.shape == (7, SIDE, SIDE, 3) and found.dtype == np.uint8
    assert sum(1 for _ in read_pictures(str(tmp_path / f"{name}.{kind}"), 5)) == 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_picture_is_a_video_of_one_frame(tmp_path, kind):
    (tmp_path / "a.mp4").write_bytes(odd_videos.picture(kind))
    found = tail_frames(str(tmp_path / "a.mp4"), 13)
    assert found.shape == (1, SIDE, SIDE, 3) and close(found[0, 9, 9], np.array([200, 40, 40], np.uint8), 4)


# What a player shows of a picture [height, width, 3] by the matrix (a, b, c, d): the point (p, q) goes to (a p + c q, b p + d q).
MATRICES = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_turned_video_comes_upright(tmp_path, matrix):
    path = tmp_path / "a.mp4"
    path.write_bytes(odd_videos.turned(corners(path).read_bytes(), matrix))
    expected = MATRICES[matrix](CORNERS)
    shape = (96, 64, 3) if matrix[0] == 0 else (64, 96, 3)
    compared = Comparison([str(path)], ["a"])
    for found in (tail_frames(str(path), 3)[0], next(read_pictures(str(path))), compared.sources[0].frame):
        assert found.shape == shape and close(quarters(found), expected)
    compared.close()
    # where it can be said, by the library's own reading of the angle
    (_, shot), *_ = decoded(str(path), None)
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] == 1:
        assert close(np.rot90(CORNERS, round(shot.frame.rotation / 90)), expected, 0)


def test_a_turn_is_known_beside_data_that_has_no_name(tmp_path):
    """Newer FFmpegs give frames kinds of data that older PyAVs refuse to list; the angle is still told."""

    class Nameless:
        def __init__(self, frame: av.VideoFrame) -> None:
            self.rotation = frame.rotation

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    path = tmp_path / "a.mp4"
    for matrix in ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)):
        path.write_bytes(odd_videos.turned(corners(path).read_bytes(), matrix))
        (_, shot), *_ = decoded(str(path), None)
        assert video_frames._turn(Nameless(shot.frame)) == video_frames._turn(shot.frame)


def joined(path: Path, *parts: Path) -> Path:
    """MPEG-TS files one after the other, with times that go on."""
    with av.open(str(path), "w") as out:
        stream, offset = None, 0
        for part in parts:
            with av.open(str(part)) as container:
                source, last = container.streams.video[0], 0
                stream = stream or out.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is not None:
                        last = packet.pts + 5625  # 1/16 s
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        out.mux(packet)
                offset += last
    return path


def test_a_size_that_changes_on_the_way_becomes_the_first_pictures(tmp_path):
    first = corners(tmp_path / "1.ts", 96, 64)
    path = joined(tmp_path / "a.ts", first, corners(tmp_path / "2.ts", 64, 96, 9), corners(tmp_path / "3.ts", 96, 64))
    sizes = [shot.size for _, shot in decoded(str(path), None)]
    assert sizes == [(96, 64)] * 6 + [(64, 96)] * 9 + [(96, 64)] * 6
    for count in (3, 10, 21):
        found = tail_frames(str(path), count)
        assert found.shape == (count, 64, 96, 3) and all(close(quarters(each), CORNERS) for each in found)
    pictures = list(read_pictures(str(path)))
    assert {each.shape for each in pictures} == {(64, 96, 3)} and len(pictures) == 21
    comparison = Comparison([str(path), str(path)], ["a", "b"])
    assert len({each.shape for each in comparison}) == 1 and comparison.numbers()[0]["frames"] == 21


def test_of_a_video_that_changes_its_size_no_more_is_held(tmp_path):
    parts = [corners(tmp_path / f"{i}.ts", *((96, 64), (64, 96))[i % 2], 30) for i in range(4)]
    path, held, most = joined(tmp_path / "a.ts", *parts), set(), [0]

    class Kept:
        def __init__(self, picture: np.ndarray) -> None:
            held.add(id(self))
            most[0] = max(most[0], len(held))

    assert len(tail(str(path), 20, each=Kept)) == 20 and most[0] == 20
    alive: set[int] = set()
    for number, picture in enumerate(read_pictures(str(path))):
        alive.add(number)
        weakref.finalize(picture, alive.discard, number)
        assert len(alive) <= 3


@pytest.mark.parametrize(
    ("aspect", "shape"),
    [
        (Fraction(2), (64, 192)),
        (Fraction(1, 2), (128, 96)),
        (Fraction(16, 15), (64, 102)),
        (Fraction(100, 99), (64, 96)),  # rounding of who wrote it
        (Fraction(200), (64, 96)),  # a damaged header
    ],
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, shape):
    path = corners(tmp_path / "a.mkv", sample_aspect_ratio=aspect)
    found = tail_frames(str(path), 2)
    assert found.shape == (2, *shape, 3) and close(quarters(found[0]), CORNERS)
    if aspect == 2:
        path = corners(tmp_path / "a.mp4", sample_aspect_ratio=aspect)
        path.write_bytes(odd_videos.turned(path.read_bytes(), (0, 1, -1, 0)))
        assert close(quarters(tail_frames(str(path), 1)[0]), np.rot90(CORNERS, -1))
        assert tail_frames(str(path), 1).shape[1:3] == (192, 64)


def test_a_cover_is_not_the_video(tmp_path):
    """An mp4 with a cover."""
    path = tmp_path / "a.mp4"
    cover = np.full((32, 32, 3), 250, np.uint8)
    with av.open(str(path), "w") as container:
        first, second = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=16)
        first.width, first.height, first.pix_fmt, first.disposition = 32, 32, "yuvj420p", 1024
        second.width, second.height, second.pix_fmt, second.options = 96, 64, "yuv420p", {"qp": "4"}
        container.mux(first.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
        container.mux(first.encode(None))
        picture = CORNERS.repeat(32, 0).repeat(48, 1)
        for _ in range(5):
            container.mux(second.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(second.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert tail_frames(str(path), 9).shape == (5, 64, 96, 3)
    assert FileClip(str(path)).count == 5
    # the muxer puts the cover last; other writers put it first
    first, second = (SimpleNamespace(disposition=Disposition(flags), codec_context=1) for flags in (1024, 1))
    container = SimpleNamespace(streams=SimpleNamespace(video=[first, second]))
    assert video_frames._track(container, "a.mp4", "the video") is second


def test_what_lies_in_memory_is_taken_as_it_is():
    levels = torch.randint(0, 256, (5, 16, 18, 3), dtype=torch.uint8)
    found = list(MemoryClip(levels / 255.0, Fraction(24)).pictures())
    assert np.array_equal(np.stack([each for _, each in found]), levels.numpy())
    assert [time for time, _ in found] == [Fraction(i, 24) for i in range(5)]
    assert len(list(MemoryClip(levels / 255.0, 24).pictures(2))) == 3
    with pytest.raises(ValueError, match="reference has no frame in it"):
        MemoryClip(torch.zeros(0, 8, 8, 3), 24, "reference")


def test_a_part_of_a_file_is_read_by_the_ticks_of_its_clock(tmp_path):
    path = corners(tmp_path / "a.mkv", frames=48)
    every = [time for time, _ in decoded(str(path), None)]
    for since, until in ((0.5, 1.5), (1.0, 2.0), (2.9, None)):
        times = [time for time, _ in FileClip(str(path), since=since, until=until).pictures()]
        assert times == [t for t in every if t >= Fraction(since) and (until is None or t < Fraction(until))]
        assert abs(FileClip(str(path), since=since, until=until).count - len(times)) <= 1


def test_a_comparison_shows_what_is_on_screen(tmp_path):
    """A video whose second half runs at a quarter of the pace, beside one of an even pace."""
    times = [Fraction(i, 16) for i in range(16)] + [1 + Fraction(i, 4) for i in range(4)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.options = 32, 32, "yuv420p", {"qp": "4"}
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    even = MemoryClip(torch.zeros(32, 32, 32, 3), 16)
    comparison = Comparison([even, str(tmp_path / "a.mkv")], ["even", "odd"])
    shown = [int(frame[60, -60].mean()) // 5 for frame in comparison]
    expected = [sum(1 for time in times if time <= Fraction(i, 16) + Fraction(1, 1000)) - 1 for i in range(32)]
    assert [round(level / 2) for level in shown] == pytest.approx(expected, abs=1)
    assert comparison.numbers()[1]["frames"] == 20


def test_a_comparison_is_no_larger_than_can_be_encoded():
    wide = MemoryClip(torch.zeros(2, 16, 8000, 3), 16)
    width, height = Comparison([wide] * 4, ["a", "b", "c", "d"]).size
    assert width <= 8192 and height <= 8192 and width % 2 == height % 2 == 0
    tall = MemoryClip(torch.zeros(1, 9000, 16, 3), 16)
    assert max(Comparison([tall, tall], ["a", "b"]).size) <= 8192


def test_a_damaged_time_does_not_make_a_comparison_endless(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i * 62 + (90_000_000 if i > 5 else 0), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert 10 <= sum(1 for _ in Comparison([str(tmp_path / "a.mkv")], ["a"])) < 200


def test_what_is_left_out_is_logged(tmp_path, caplog):
    path = odd_videos.write(tmp_path / "a.mov", "mjpeg", "yuvj420p")
    with av.open(str(path)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0)][5]
    data = bytearray(path.read_bytes())
    data[place : place + size] = bytes(size)
    path.write_bytes(bytes(data))
    assert sum(1 for _ in read_pictures(str(path))) == odd_videos.FRAMES - 1
    assert "a.mov is damaged: 1 of its packets did not decode" in caplog.text


def test_the_list_of_containers_names_readers_that_there_are():
    known = {part for name in av.formats_available for part in name.split(",")}
    assert set(video_frames.CONTAINERS) <= known
    assert not {"hls", "concat", "dash", "image2", "sdp", "rtsp", "lavfi", "svg_pipe"} & set(video_frames.CONTAINERS)


@pytest.mark.parametrize("rate", [1, 24, 240, 1000])
def test_a_comparison_has_as_many_frames_as_its_video(rate):
    levels = torch.linspace(0, 1, 12)[:, None, None, None].expand(-1, 16, 16, 3)
    shown = [int(frame[60, 60, 0]) for frame in Comparison([MemoryClip(levels, rate)], ["a"])]
    assert shown == [round(255 * i / 11) for i in range(12)]
