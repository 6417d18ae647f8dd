"""Frames as files: read back by another reader, numbered by the video's frame, joined, and whole after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from picture_files import png_texts, read_exr, read_png, read_tiff
from PIL import Image, ImageSequence

from adastate_core.files import whole_file
from adastate_core.video import frame_folder
from adastate_core.video.frame_folder import ABOUT, FrameFolder, FrameSequence, read_sequence
from adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_core.video.sink_group import SinkGroup

ROOT = Path(__file__).resolve().parents[2]
READERS = {"png": read_png, "png16": read_png, "tiff16": read_tiff, "exr": read_exr}
DEPTH = {"png": 255, "png16": 65535, "tiff16": 65535}
HEIGHT, WIDTH = 18, 34


def pictures(count: int, start: int = 0) -> torch.Tensor:
    """float32 [count, height, width, 3] with every kind of value: random ones, 0, 1, and both sides of steps of 8 and 16 bits."""
    made = []
    for number in range(start, start + count):
        values = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(number))
        values[0], values[1] = 0, 1
        ties = (torch.arange(WIDTH) + 0.5) / 65535
        values[2, :, 0], values[3, :, 1] = ties, (torch.arange(WIDTH) + 0.5) / 255
        values[4, :, 2] = torch.nextafter(ties, torch.ones(()))
        made.append(values)
    return torch.stack(made)


def about(form: str, first: int = 0, run: str = "run") -> FrameSequence:
    return FrameSequence(run, form, WIDTH, HEIGHT, "16", first)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def written(path: Path, form: str, count: int, first: int = 0, run: str = "run", **options) -> FrameFolder:
    sink = FrameFolder(folder(path), about(form, first, run), **options)
    sink.write(pictures(count, sink.next_frame))
    sink.close()
    return sink


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def in_animation(path: Path) -> list[numpy.ndarray]:
    with Image.open(path) as image:
        return [numpy.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("form", DEPTH)
def test_read_back_they_are_within_half_a_step(tmp_path, form):
    written(tmp_path / "a", form, 3)
    for number, picture in enumerate(pictures(3)):
        found = READERS[form](tmp_path / "a" / f"{number:06}{FRAME_FORMATS[form].suffix}")
        off = numpy.abs(found.astype(numpy.float64) - picture.double().numpy() * DEPTH[form])
        assert found.shape == (HEIGHT, WIDTH, 3) and off.max() <= 0.5


def test_floats_are_the_very_floats(tmp_path):
    written(tmp_path / "a", "exr", 3)
    for number, picture in enumerate(pictures(3)):
        assert numpy.array_equal(read_exr(tmp_path / "a" / f"{number:06}.exr"), picture.numpy())


def test_an_animation_shows_every_picture_at_its_pace(tmp_path):
    smooth = torch.nn.functional.avg_pool2d(pictures(7).movedim(3, 1), 9, 1, 4).movedim(1, 3).contiguous()
    sink = FrameFolder(folder(tmp_path / "a"), replace(about("webp"), fps="30000/1001"))
    for count in range(1, 8):
        sink.write(smooth[count - 1 : count])
        assert len(in_animation(tmp_path / "a" / "000000.webp")) == count  # whole after every picture
    sink.close()
    shown = in_animation(tmp_path / "a" / "000000.webp")
    for one, picture in zip(shown, smooth, strict=True):
        assert numpy.abs(one - picture.numpy() * 255.0).mean() < 6  # lossy, with colour at half the size
    with Image.open(tmp_path / "a" / "000000.webp") as image:
        assert image.info["loop"] == 0
        lasts = [each.copy().info["duration"] for each in ImageSequence.Iterator(image)]
    assert abs(sum(lasts) - 7 * 1001 / 30) <= 1 and set(lasts) <= {33, 34}


def test_png_frames_carry_prompt_and_workflow_as_json(tmp_path):
    metadata = {"workflow": {"nodes": [1]}, "prompt": {"1": {"text": "Bär — 山"}}, "plain": "text"}
    for form in ("png", "png16"):
        written(tmp_path / form, form, 2, metadata=metadata)
        for name in ("000000.png", "000001.png"):
            found = png_texts(tmp_path / form / name)
            assert {key: json.loads(text) for key, text in found.items()} == metadata
            with Image.open(tmp_path / form / name) as image:
                image.load()
                assert image.text == found
    plain = written(tmp_path / "plain", "png", 1)
    assert png_texts(plain.path / "000000.png") == {}


@pytest.mark.parametrize("form", ["png16", "tiff16", "webp"])
@pytest.mark.sampled(3)
def test_runs_that_go_on_make_one_sequence(tmp_path, form):
    """Four frames, gone on from after the third, as from a state: alone, and with the old ones in front; then on from that."""
    suffix = FRAME_FORMATS[form].suffix
    whole = written(tmp_path / "whole", form, 9)
    written(tmp_path / "a", form, 4, run="one")
    alone = written(tmp_path / "alone", form, 2, first=3)
    told = []
    joined = written(
        tmp_path / "b", form, 3, first=0, run="two", joined=tmp_path / "a", until=3, on_copied=lambda: told.append(1)
    )
    third = written(tmp_path / "c", form, 3, first=0, joined=tmp_path / "b", until=6)
    assert (joined.frames, third.frames, alone.next_frame, len(told)) == (6, 9, 5, 3)
    if form == "webp":
        assert names(alone.path) == ["000003.webp", ABOUT]
        one, other = (in_animation(path / "000000.webp") for path in (third.path, whole.path))
        assert len(one) == 9 and all(numpy.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert (third.path / "000000.webp").read_bytes() == (whole.path / "000000.webp").read_bytes()
        return
    assert names(alone.path) == [f"000003{suffix}", f"000004{suffix}", ABOUT]
    assert names(third.path) == names(whole.path) == [*(f"{n:06}{suffix}" for n in range(9)), ABOUT]
    for name in names(whole.path)[:-1]:
        assert (third.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert os.path.samefile(tmp_path / "a" / f"000002{suffix}", third.path / f"000002{suffix}")
    assert len(names(tmp_path / "a")) == 5  # the old folder is as it was


def test_frames_that_are_gone_back_on_are_made_anew_and_count_no_more(tmp_path):
    sink = FrameFolder(folder(tmp_path / "a"), about("png", 5))
    sink.write(pictures(6))
    sink.go_back(2)
    left = sorted((tmp_path / "a").glob("*.png"))
    assert [path.name for path in left] == ["000005.png", "000006.png"]
    assert sink.nbytes == sum(path.stat().st_size for path in left) and sink.next_frame == 7
    sink.write(pictures(1, 9))
    assert sink.nbytes == sum(path.stat().st_size for path in (tmp_path / "a").glob("*.png"))
    sink.close()


def test_a_disk_without_links_is_given_copies(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    written(tmp_path / "a", "png", 3)
    monkeypatch.setattr(frame_folder.os, "link", refused)
    sink = written(tmp_path / "b", "png", 1, joined=tmp_path / "a", until=3)
    assert sink.frames == 4
    assert (tmp_path / "a" / "000001.png").read_bytes() == (tmp_path / "b" / "000001.png").read_bytes()


def test_what_cannot_be_joined_is_told(tmp_path):
    written(tmp_path / "a", "png", 3)
    (tmp_path / "a" / "000001.png").unlink()
    with pytest.raises(ValueError, match="^000001.png of a is missing; put it back, or turn join off$"):
        FrameFolder(folder(tmp_path / "b"), about("png"), joined=tmp_path / "a", until=3)
    written(tmp_path / "w", "webp", 3)
    with pytest.raises(ValueError, match="^000000.webp holds 3 frames of the 4 that were to be joined$"):
        FrameFolder(folder(tmp_path / "c"), about("webp"), joined=tmp_path / "w", until=4)
    found = read_sequence(tmp_path / "a")
    assert found == about("png") and found.refused(found) == ""
    assert "its size is 34x18 and the new frames' 36x18; use the same size" in found.refused(replace(found, width=36))
    assert "its format is png and the new frames' exr" in found.refused(replace(found, format="exr"))
    assert "its fps is 16 and the new frames' 24" in found.refused(replace(found, fps="24"))
    for text in ("", "[]", "{}", '{"run_id": 1}', json.dumps({**vars(found), "format": "bmp"})):
        (tmp_path / "a" / ABOUT).write_text(text)
        assert read_sequence(tmp_path / "a") is None
    assert read_sequence(tmp_path / "nothing") is None


def test_a_full_disk_names_the_frame_and_leaves_whole_ones(tmp_path, monkeypatch):
    sink = FrameFolder(folder(tmp_path / "a"), about("png16"))
    sink.write(pictures(2))
    create = whole_file._create

    class Full:
        """A file that takes half of what it is given."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def full(beside):
        path, file, locked = create(beside)
        return path, Full(file), locked

    monkeypatch.setattr(whole_file, "_create", full)
    with pytest.raises(
        OSError, match=r"^frame 2 of a could not be written \(No space left on device\); free some room"
    ):
        sink.write(pictures(2, 2))
    sink.stop()
    assert sink.frames == 2 and names(tmp_path / "a") == ["000000.png", "000001.png", ABOUT]
    assert names(tmp_path) == ["a"]  # and nothing of the unfinished one


def test_a_group_gives_each_sink_what_it_takes(tmp_path):
    class Bytes:
        takes, path, frames, warning = "bytes", tmp_path / "a.mp4", 0, "first"

        def __init__(self):
            self.found, self.ends = [], []

        def write(self, given):
            self.found.append(given.clone())
            self.frames += len(given)

        def sync(self):
            self.ends.append("sync")

        def stop(self):
            self.ends.append("stop")
            raise OSError("broken")

        def close(self):
            self.ends.append("close")

    one, two = Bytes(), FrameFolder(folder(tmp_path / "a"), about("png16"))
    group = SinkGroup([one, two])
    assert group.takes == "float" and group.path == one.path
    group.write(pictures(2))
    assert one.found[0].dtype == torch.uint8 and group.frames == two.frames == 2
    assert numpy.array_equal(one.found[0].numpy(), (pictures(2).numpy() * numpy.float32(255)).astype("uint8"))
    two.warning = "second"
    assert group.warning == "first; second"
    group.sync()
    with pytest.raises(OSError, match="broken"):
        group.stop()
    assert one.ends == ["sync", "stop"] and two._encoder is None
    with pytest.raises(AttributeError):
        two.write(pictures(1))


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_frame_files import about, pictures
from adastate_core.video.frame_folder import FrameFolder
sink = FrameFolder(Path({path!r}), about({form!r}))
for start in range(0, 100000, 4):
    sink.write(pictures(4, start))
    print(sink.frames, flush=True)
"""


@pytest.mark.parametrize("form", list(FRAME_FORMATS))
@pytest.mark.sampled(2)
def test_a_killed_process_leaves_whole_frames_only(tmp_path, form):
    path = folder(tmp_path / "a")
    code = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path), form=form)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    count = 0
    while count < 40:
        count = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if form == "webp":
        assert len(in_animation(path / "000000.webp")) >= count
    else:
        left = [name for name in names(path) if name != ABOUT]
        assert left == [f"{n:06}{FRAME_FORMATS[form].suffix}" for n in range(len(left))] and len(left) >= count
        for name in left[-3:]:
            assert READERS[form](path / name).shape == (HEIGHT, WIDTH, 3)
    written(tmp_path / "b", "png", 1)
    assert names(tmp_path) == ["a", "b"]  # what was half written goes with the next run beside it


GROWING = """
import sys, psutil, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from adastate_core.video.frame_folder import FrameFolder, FrameSequence
sink = FrameFolder(Path({path!r}), FrameSequence("run", {form!r}, 256, 256, "16", 0))
flat = torch.zeros(4, 256, 256, 3)
held = []
for _ in range(8):
    for _ in range(8):
        sink.write(flat)
    held.append(psutil.Process().memory_info().rss)
print(sink.frames, max(held) - held[0])
"""


@pytest.mark.parametrize("form", ["png16", "exr", "webp"])
@pytest.mark.sampled(3)
def test_memory_does_not_grow_with_the_frames(tmp_path, form):
    """From frame 32 to frame 256, which are 176 MB of floats, by less than 16 MB."""
    code = GROWING.format(root=str(ROOT), path=str(folder(tmp_path / "a")), form=form)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) == 256 and int(said[1]) < 16e6
