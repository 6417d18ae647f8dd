"""Videos as they grow: played after a kill, opened by another reader, joined, remuxed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from colours import codes_of, rgb_of

from adastate_core.video import sink as video_sink
from adastate_core.video.picture_forms import to_bytes
from adastate_core.video.sink import VideoSink, remux

ROOT = Path(__file__).resolve().parents[2]


def moving(frames: int, start: int = 0, size: int = 64) -> torch.Tensor:
    """A square that moves one pixel a frame over a gradient, uint8 [T, H, W, 3]; frame number in its brightness."""
    t = torch.arange(start, start + frames)[:, None, None]
    x = torch.arange(size)[None, None, :].expand(frames, size, size)
    y = torch.arange(size)[None, :, None].expand(frames, size, size)
    square = ((x - t % size).abs() < 6) & ((y - 30).abs() < 6)
    picture = torch.stack([x * 3, y * 3, (t * 2 % 256).expand(frames, size, size)], -1)
    return torch.where(square[..., None], 255, picture).to(torch.uint8)


def decoded(path: Path) -> list[torch.Tensor]:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        return [pictures_of(frame) for frame in container.decode(video=0)]


def pictures_of(frame: av.VideoFrame) -> torch.Tensor:
    """uint8 RGB by the formulas, in BT.709 where the frame says so and in BT.601 else."""
    matrix = 1 if int(frame.colorspace) == 1 else 5
    return torch.from_numpy(rgb_of(codes_of(frame), matrix, False).round().astype("uint8"))


def test_frames_metadata_keyframes_and_durations(tmp_path):
    path = tmp_path / "a.mp4"
    with VideoSink(path, 64, 64, 16.0, quality=10, metadata={"workflow": {"nodes": []}, "prompt": "p"}) as sink:
        for start in (0, 9, 21):
            sink.write(moving(9 if start == 0 else 12, start))
        with av.open(str(path)) as growing:
            assert json.loads(growing.metadata["workflow"]) == {"nodes": []}
    frames = decoded(path)
    assert len(frames) == 33
    error = (torch.stack(frames).float() - moving(33).float()).abs().mean()
    assert error < 4
    with av.open(str(path)) as container:
        assert container.metadata["prompt"] == "p"
        assert container.streams.video[0].average_rate == 16
        assert abs(container.duration / av.time_base - 33 / 16) < 0.01
        packets = [p for p in container.demux(video=0) if p.dts is not None]
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 9, 21]
    head = path.read_bytes()[:4096]
    assert b"moov" in head and b"moof" not in path.read_bytes()


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_video_sink import moving
from adastate_core.video.sink import VideoSink
sink = VideoSink({path!r}, 64, 64, 16)
for start in range(0, 100000, 12):
    sink.write(moving(12, start))
    print(start + 12, flush=True)
    time.sleep(0.02)
"""


def test_a_killed_process_leaves_all_frames_but_at_most_the_last(tmp_path):
    path = tmp_path / "killed.mp4"
    code = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    written = 0
    while written < 60:
        written = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(decoded(path)) >= written - 1
    remux(path)
    assert len(decoded(path)) >= written - 1


def test_a_joined_file_holds_the_old_packets_unchanged(tmp_path):
    old, new, whole = (tmp_path / f"{name}.mp4" for name in ("old", "new", "whole"))
    with VideoSink(old, 64, 64, 16) as sink:
        sink.write(moving(9))
        sink.write(moving(12, 9))
        sink.write(moving(12, 21))
    with VideoSink(new, 64, 64, 16, prefix=old, prefix_frames=21) as sink:
        assert sink.frames == 21
        sink.write(moving(12, 21))
        sink.write(moving(12, 33))
    with VideoSink(whole, 64, 64, 16) as sink:
        for start, count in ((0, 9), (9, 12), (21, 12), (33, 12)):
            sink.write(moving(count, start))
    frames, reference = decoded(new), decoded(whole)
    assert len(frames) == len(reference) == 45
    assert all(torch.equal(a, b) for a, b in zip(frames[:21], reference[:21], strict=True))
    with pytest.raises(ValueError, match="has 16 fps and fps is 24; use the same fps"):
        VideoSink(tmp_path / "x.mp4", 64, 64, 24, prefix=old, prefix_frames=21)
    with pytest.raises(ValueError, match="holds 33 frames of the 50"):
        VideoSink(tmp_path / "y.mp4", 64, 64, 16, prefix=old, prefix_frames=50)


def growing(path: Path, fps: float = 16) -> VideoSink:
    """A sink with 21 frames in two writes."""
    sink = VideoSink(path, 64, 64, fps)
    sink.write(moving(9))
    sink.write(moving(12, 9))
    return sink


RATES = [1, 16, 23.976, 24000 / 1001, 29.97, 59.94, 240]


@pytest.mark.parametrize("fps", RATES)
def test_the_finished_file_keeps_the_growing_ones_packets_and_clock(tmp_path, fps):
    sink, path = growing(tmp_path / "a.mp4", fps), tmp_path / "a.mp4"

    def facts() -> list:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [(bytes(p), p.pts, p.dts, p.duration) for p in container.demux(stream) if p.dts is not None]
            return [stream.time_base, stream.average_rate, packets]

    sink.stop()
    before, frames = facts(), decoded(path)
    remux(path)
    assert facts() == before and b"moof" not in path.read_bytes()
    assert before[1] == Fraction(fps).limit_denominator(1001) and len(before[2]) == 21
    assert torch.equal(torch.stack(decoded(path)), torch.stack(frames))


@pytest.mark.parametrize("fps", RATES)
def test_what_was_finished_on_another_clock_is_joined(tmp_path, fps):
    """PyAV 17.0 put finished files on 90,000 ticks a second, where 59.94 frames a second fall beside their times."""
    old, new = tmp_path / "old.mp4", tmp_path / "new.mp4"
    growing(tmp_path / "own.mp4", fps).stop()
    with av.open(str(tmp_path / "own.mp4")) as source:
        clock = {"video_track_timescale": "90000"}
        with av.open(str(old), "w", format="mp4", options=clock) as target:
            stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
            for packet in (p for p in source.demux(video=0) if p.dts is not None):
                packet.stream = stream
                target.mux(packet)
    with av.open(str(old)) as container:
        assert container.streams.video[0].time_base == Fraction(1, 90000)
    with VideoSink(new, 64, 64, fps, prefix=old, prefix_frames=21) as sink:
        sink.write(moving(12, 21))
    with av.open(str(new)) as container:
        assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)
    assert len(decoded(new)) == 33


def test_near_rates_are_not_taken_for_one(tmp_path):
    growing(tmp_path / "film.mp4", 24).close()
    with pytest.raises(ValueError, match="film.mp4 cannot be joined to: it has 24 fps and fps is 23.976"):
        VideoSink(tmp_path / "x.mp4", 64, 64, 23.976, prefix=tmp_path / "film.mp4", prefix_frames=21)


def lose_packets(path: Path) -> None:
    original = path.with_name("whole.mp4")
    path.replace(original)
    with av.open(str(original)) as source, av.open(str(path), "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in [p for p in source.demux(video=0) if p.dts is not None][:-3]:
            packet.stream = stream
            target.mux(packet)
    original.unlink()


def blank(path: Path) -> None:
    data = path.read_bytes()
    begin = data.index(b"mdat") + 4
    path.write_bytes(data[:begin] + bytes(len(data) - begin))


DAMAGES = {
    "no frame decodes": blank,
    "packets lost": lose_packets,
    "cut off in the first chunk": lambda path: os.truncate(path, path.read_bytes().index(b"mdat") + 200),
    "cut off in the last chunk": lambda path: os.truncate(path, path.stat().st_size - 3000),
    "not a video": lambda path: path.write_bytes(b"no"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rewritten_file_that_is_not_whole_replaces_nothing(tmp_path, monkeypatch, damage):
    sink, path = growing(tmp_path / "a.mp4"), tmp_path / "a.mp4"
    rewrite, seen = video_sink._rewrite, []

    def damaged(source: Path, new: Path, *beside: object) -> list[int]:
        count = rewrite(source, new, *beside)
        seen.append(source.read_bytes())
        DAMAGES[damage](new)
        return count

    monkeypatch.setattr(video_sink, "_rewrite", damaged)
    sink.close()
    assert path.read_bytes() == seen[0] and len(decoded(path)) == 21
    assert "a.mp4 could not be rewritten" in sink.warning and "plays" in sink.warning
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("how", ["held open", "moved away"])
def test_a_file_that_cannot_be_replaced_stays_as_it_grew(tmp_path, monkeypatch, how):
    sink, path, elsewhere = growing(tmp_path / "a.mp4"), tmp_path / "a.mp4", tmp_path / "moved.mp4"

    def held(*_: object) -> None:
        raise PermissionError(13, "used by another process")

    if how == "held open":
        monkeypatch.setattr(os, "replace", held)
    else:
        path.rename(elsewhere)
    assert sink.close() == path and "a.mp4 could not be rewritten" in sink.warning
    left = path if how == "held open" else elsewhere
    assert list(tmp_path.iterdir()) == [left] and len(decoded(left)) == 21
    assert ("moved or removed" in sink.warning) == (how == "moved away")
    sink.close()


NO_ROOM = """
import resource, shutil, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_video_sink import growing
sink = growing(Path({path!r}))
sink.stop()
from adastate_core.video.sink import remux
finished = Path(shutil.copy({path!r}, {copy!r}))
remux(finished)
size = finished.stat().st_size
finished.unlink()
for part in (0.02, 0.4, 0.99):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * part), resource.RLIM_INFINITY))
    try:
        remux(Path({path!r}))
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a file's size are POSIX's")
def test_a_disk_without_room_for_the_rewrite_keeps_the_file(tmp_path):
    path = tmp_path / "a.mp4"
    copy = str(tmp_path / "copy.mp4")
    code = NO_ROOM.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path), copy=copy)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(child.stdout.split()) == 3, child.stdout
    assert list(tmp_path.iterdir()) == [path] and len(decoded(path)) == 21 and b"moof" in path.read_bytes()


def test_an_interrupted_rewrite_keeps_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    sink, path = growing(tmp_path / "a.mp4"), tmp_path / "a.mp4"
    original = video_sink.packets

    def interrupted(*given: object):
        for i, packet in enumerate(original(*given)):
            if i == 7:
                raise KeyboardInterrupt
            yield packet

    monkeypatch.setattr(video_sink, "packets", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sink.close()
    assert list(tmp_path.iterdir()) == [path] and len(decoded(path)) == 21


def test_an_end_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    sink = growing(tmp_path / "a.mp4")

    class Full:
        def mux(self, _: object) -> None: ...

        def close(self) -> None:
            raise OSError(28, "no space left on device")

    monkeypatch.setattr(sink, "_container", Full())
    sink.close()
    assert "end of a.mp4 could not be written" in sink.warning


def test_after_an_exception_the_first_one_is_told(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="the decode broke"), growing(tmp_path / "a.mp4") as sink:
        monkeypatch.setattr(VideoSink, "stop", lambda self: 1 / 0)
        raise RuntimeError("the decode broke")
    monkeypatch.undo()
    sink.stop()
    assert len(decoded(tmp_path / "a.mp4")) == 21


def test_stopping_keeps_a_file_that_plays(tmp_path):
    sink = VideoSink(tmp_path / "a.mp4", 64, 64, 23.976)
    sink.write(moving(5))
    sink.stop()
    sink.stop()
    assert len(decoded(tmp_path / "a.mp4")) == 5


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"codec": "gif"}, "codec is 'gif'"), ({"width": 63}, "63x64"), ({"fps": 0}, "fps is 0")],
)
def test_refusals(numbers, message, tmp_path):
    settings = {"width": 64, "height": 64, "fps": 16} | numbers
    with pytest.raises(ValueError, match=message):
        VideoSink(tmp_path / "a.mp4", **settings)


def test_bytes_are_cut_off_as_the_host_does():
    assert to_bytes(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 127, 255, 255]


def test_what_cannot_be_opened_or_encoded_is_told_by_its_name(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(av, "open", full)
        with pytest.raises(OSError, match=r"^a.mp4 could not be written \(No space left on device\); free some room"):
            VideoSink(tmp_path / "a.mp4", 64, 64, 16)

    class Failing:
        """A stream whose encoder gives up, as FFmpeg says it."""

        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def encode(self, frame):
            raise av.error.ExternalError(542398533, "Generic error in an external library", "avcodec_send_frame()")

    sink = VideoSink(tmp_path / "b.mp4", 64, 64, 16)
    sink.write(moving(2))
    whole, sink._stream = sink._stream, Failing(sink._stream)
    with pytest.raises(
        OSError, match=r"^frame 3 of b.mp4 could not be written \(Generic error in an external library\)$"
    ):
        sink.write(moving(1))
    sink._stream = whole
    sink.close()
    assert len(decoded(tmp_path / "b.mp4")) == 2
