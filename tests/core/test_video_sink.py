"""Videos as they grow: played after a kill, opened by another reader, joined, remuxed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from adastate_core.video_sink import VideoSink, remux, to_bytes

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
        return [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


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
from adastate_core.video_sink import VideoSink
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
    with pytest.raises(ValueError, match="cannot be joined"):
        VideoSink(tmp_path / "x.mp4", 64, 64, 24, prefix=old, prefix_frames=21)
    with pytest.raises(ValueError, match="holds 33 frames of the 50"):
        VideoSink(tmp_path / "y.mp4", 64, 64, 16, prefix=old, prefix_frames=50)


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
