"""The end of a video, against decoding all of it: containers, frame rates that vary, missing counts, what is held."""

from __future__ import annotations

import io
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from adastate_core.video import tail as video_tail
from adastate_core.video.colour import rgb
from adastate_core.video.tail import tail_frames


def make(path: Path, times: list[Fraction], codec: str = "libx264", clock: int = 12800, **options: str) -> Path:
    """A video whose frame i has the grey level 2 i (mod 256) and a moving bar, shown from times[i] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.options = {"g": "12"} | options
        stream.time_base = stream.codec_context.time_base = Fraction(1, clock)
        for i, time in enumerate(times):
            picture = np.full((16, 32, 3), 2 * i % 256, np.uint8)
            picture[:, i % 32] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * clock), Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def even(count: int, rate: int = 16) -> list[Fraction]:
    return [Fraction(i, rate) for i in range(count)]


def everything(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([rgb(frame) for frame in container.decode(video=0)])


FILES = {
    "mp4": {"name": "a.mp4"},
    "mp4 with B-frames": {"name": "a.mp4", "bf": "3"},
    "mp4 with open groups": {"name": "a.mp4", "bf": "3", "x264-params": "open-gop=1"},
    "one keyframe": {"name": "a.mp4", "g": "9999"},
    "mkv": {"name": "a.mkv", "bf": "2"},
    "mpeg-ts": {"name": "a.ts", "bf": "2"},
    "no times or counts": {"name": "a.h264"},
    "avi": {"name": "a.avi", "codec": "mpeg4", "clock": 16},
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("frames", [1, 13, 40, 200])
def test_the_end_is_the_end_of_the_whole(tmp_path, kind, frames):
    options = dict(FILES[kind])
    path = make(tmp_path / options.pop("name"), even(90), **options)
    found, whole = tail_frames(str(path), frames), everything(path)
    assert np.array_equal(found, whole[-frames:]) and len(found) == min(frames, len(whole))
    rate = 25 if kind == "no times or counts" else 16  # what the decoder takes such a file for
    assert np.array_equal(tail_frames(str(path), frames, rate), whole[-frames:])


def test_a_growing_file_without_counts(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "frag_every_frame+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 5 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    whole = everything(tmp_path / "cut.mp4")
    assert 20 < len(whole) < 50
    assert np.array_equal(tail_frames(str(tmp_path / "cut.mp4"), 9), whole[-9:])


def on_screen(times: list[Fraction], whole: np.ndarray, frames: int, rate: Fraction) -> np.ndarray:
    """Frame by frame, the slow way."""
    out = []
    for step in range(frames):
        shown = [i for i, time in enumerate(times) if time <= times[-1] - step / rate + Fraction(1, 1000)]
        if shown:
            out.insert(0, whole[shown[-1]])
    return np.stack(out)


@pytest.mark.parametrize("rate", [Fraction(16), Fraction(8), Fraction(30), Fraction(24000, 1001)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_at_another_rate_are_those_on_screen(tmp_path, name, rate):
    gaps = [Fraction(1, 30), Fraction(1, 10), Fraction(1, 50), Fraction(1, 4)]
    varying = [Fraction(0)]
    for i in range(99):
        varying.append(varying[-1] + gaps[i // 7 % 4])
    for times in (even(100, 30), varying):
        clock = 1000 if name == "a.mkv" else 90000
        path = make(tmp_path / name, times, clock=clock)
        times = [Fraction(round(time * clock), clock) for time in times]
        found, whole = tail_frames(str(path), 21, rate), everything(path)
        assert len(whole) == 100
        assert np.array_equal(found, on_screen(times, whole, 21, rate))
    assert len(tail_frames(str(path), 5000, rate)) == int((times[-1] + Fraction(1, 1000)) * rate) + 1


def test_a_cut_out_of_a_file_ends_where_it_was_cut(tmp_path):
    path = make(tmp_path / "a.mp4", even(90))
    whole = everything(path)
    assert np.array_equal(tail_frames(str(path), 9, 0, 1.0, 3.0), whole[39:48])
    assert np.array_equal(tail_frames(str(path), 200, 16, 1.0, 3.0), whole[16:48])
    assert np.array_equal(tail_frames(io.BytesIO(path.read_bytes()), 5, until=2.0), whole[27:32])


def test_of_a_long_file_the_end_alone_is_decoded_and_next_to_nothing_held(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4", even(1500))
    original, seen = video_tail.decoded, {"decoded": 0, "held": 0}
    alive: weakref.WeakSet = weakref.WeakSet()

    def counted(*inputs):
        for time, shot in original(*inputs):
            alive.add(shot)
            seen["decoded"] += 1
            seen["held"] = max(seen["held"], len(alive))
            yield time, shot
            del shot

    monkeypatch.setattr(video_tail, "decoded", counted)
    assert tail_frames(str(path), 13).shape == (13, 16, 32, 3)
    assert seen["decoded"] < 100 and seen["held"] <= 3
    monkeypatch.setattr(
        video_tail, "_guess", lambda *inputs: (None, Fraction(1))
    )  # as of a file that cannot be searched
    assert len(tail_frames(str(path), 13)) == 13
    assert seen["decoded"] > 3000 and seen["held"] <= 3


@pytest.mark.parametrize("what", ["text", "sound", "nothing"])
def test_what_is_no_video_is_refused(tmp_path, what):
    path = tmp_path / "a.mp4"
    if what == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        path.write_text("no video" * 100 if what == "text" else "")
    with pytest.raises(ValueError, match="cannot be read|has no picture track"):
        tail_frames(str(path), 5)
