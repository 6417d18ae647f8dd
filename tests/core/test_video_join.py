"""Joins: which earlier videos are taken, which are refused and how, and what becomes of their other tracks.

The videos in data/ were made by the sink of commit 91e434f under PyAV 18.1: the patches of colours.py, 9 and 12 frames of
64x64. `tracks` is `16` with sound (AAC, 16 kHz, German), a subtitle (French) and a data track beside the pictures.
"""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from colours import patches

from adastate_core.video import sink as video_sink
from adastate_core.video.sink import VideoSink, remux

DATA = Path(__file__).parent / "data"
TRACKS = DATA / "91e434f_tracks.mp4"
MORE = torch.from_numpy(patches(12))
# PyAV before 16 has no way to make a data track.
DATA_TRACKS = int(av.__version__.split(".")[0]) >= 16


def tracks_of(path: Path) -> dict[str, dict]:
    """Every track by its kind: clock, language, and the packets' bytes and times."""
    found = {}
    with av.open(str(path)) as container:
        for stream in container.streams:
            found[stream.type] = {"clock": stream.time_base, "language": stream.metadata.get("language"), "packets": []}
        for packet in container.demux():
            if packet.dts is not None and packet.size > 2:  # a subtitle's pauses are packets of two zeros
                found[packet.stream.type]["packets"].append((bytes(packet), packet.pts, packet.dts))
    return found


@pytest.mark.parametrize("rate", ["23.976", "29.97", "59.94"])
def test_own_files_of_broken_rates_are_joined(tmp_path, rate):
    """Those of before and those of today, again and again."""
    new, first = tmp_path / "new.mp4", tmp_path / "first.mp4"
    with VideoSink(new, 64, 64, float(rate)) as sink:
        sink.write(MORE)
    for source, frames in ((DATA / f"91e434f_{rate}.mp4", 21), (new, 12)):
        with VideoSink(first, 64, 64, float(rate), prefix=source, prefix_frames=frames) as sink:
            sink.write(MORE)
        with VideoSink(tmp_path / "second.mp4", 64, 64, float(rate), prefix=first, prefix_frames=frames + 12) as sink:
            sink.write(MORE)
        with av.open(str(tmp_path / "second.mp4")) as container:
            stream = container.streams.video[0]
            times = [frame.pts * stream.time_base for frame in container.decode(stream)]
        assert times == [number / Fraction(rate) for number in range(frames + 24)]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("24", {"fps": 23.976}, "it has 24 fps and fps is 23.976; use the same fps, or turn join off"),
        ("23.976", {"fps": 24}, "it has 23.976 fps and fps is 24; use the same fps"),
        ("59.94", {"fps": 60}, "it has 59.94 fps and fps is 60; use the same fps"),
        ("16", {"fps": 16.01}, "it has 16 fps and fps is 16.01; use the same fps"),
        ("growing", {"fps": 8}, "it has 16 fps and fps is 8; use the same fps"),
        ("quality_25", {}, "it was made with quality 25 and quality is 18; use the same quality, or turn join off"),
        ("16", {"quality": 30}, "it was made with quality 18 and quality is 30; use the same quality"),
        ("16", {"width": 96}, "it is 64x64 and the new frames are 96x64; use the same size, or turn join off"),
        ("16", {"width": 96, "fps": 24, "quality": 9}, "it is 64x64 and the new frames are 96x64"),
    ],
)
def test_another_rate_quality_or_size_is_refused_by_name(tmp_path, name, changes, sentence):
    numbers = {"width": 64, "height": 64, "fps": 16} | changes
    with pytest.raises(ValueError) as refused:
        VideoSink(tmp_path / "x.mp4", **numbers, prefix=DATA / f"91e434f_{name}.mp4", prefix_frames=21)
    assert sentence in str(refused.value) and f"91e434f_{name}.mp4" in str(refused.value)
    assert str(tmp_path) not in str(refused.value) and not list(tmp_path.iterdir())


def test_another_encoder_is_refused(tmp_path):
    path = tmp_path / "other.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        for picture in patches(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="other.mp4 cannot be joined to: it was made by another encoder"):
        VideoSink(tmp_path / "x.mp4", 64, 64, 16, prefix=path, prefix_frames=9)


def test_a_speed_that_changes_on_the_way_is_refused(tmp_path):
    """Behind the frames that are looked at first."""
    path, slow = tmp_path / "a.mp4", tmp_path / "slow.mp4"
    with VideoSink(path, 64, 64, 16) as sink:
        for _ in range(5):
            sink.write(MORE)
    with av.open(str(path)) as source, av.open(str(slow), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for number, packet in enumerate(p for p in source.demux(video=0) if p.dts is not None):
            packet.pts = packet.dts = packet.pts + max(0, number - 40) * 512
            packet.stream = stream
            target.mux(packet)
    with pytest.raises(ValueError, match="slow.mp4 cannot be joined to: it changes its speed at frame 41"):
        VideoSink(tmp_path / "x.mp4", 64, 64, 16, prefix=slow, prefix_frames=60)


@pytest.mark.parametrize("frames", [9, 14, 21])
def test_a_join_takes_all_tracks_up_to_its_last_frame(tmp_path, frames):
    path, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    with VideoSink(path, 64, 64, 16, prefix=TRACKS, prefix_frames=frames) as sink:
        sink.write(MORE)
    assert sink.warning == (
        ""
        if DATA_TRACKS
        else "the data track of 91e434f_tracks.mp4 could not be taken along; PyAV 16 or newer can copy it"
    )
    before, after, end = tracks_of(TRACKS), tracks_of(path), Fraction(frames, 16)
    assert [*after] == ["video", "audio", "subtitle", *(["data"] if DATA_TRACKS else [])]
    assert len(after["video"]["packets"]) == frames + 12
    assert [p[1:] for p in after["video"]["packets"]] == [(1024 * i, 1024 * i) for i in range(frames + 12)]
    for kind in [*after][1:]:
        clock = before[kind]["clock"]
        kept = [packet for packet in before[kind]["packets"] if packet[2] * clock < end]
        assert after[kind] == before[kind] | {"packets": kept} and kept
    with VideoSink(again, 64, 64, 16, prefix=path, prefix_frames=frames + 12) as sink:
        sink.write(MORE)
    for kind in [*after][1:]:
        assert tracks_of(again)[kind] == after[kind]


def test_the_last_rewrite_keeps_every_track(tmp_path):
    path = tmp_path / "a.mp4"
    shutil.copy(TRACKS, path)
    before = tracks_of(path)
    if DATA_TRACKS:
        remux(path)
        assert tracks_of(path) == before and path.read_bytes() != TRACKS.read_bytes()
    else:
        with pytest.raises(ValueError, match="cannot copy its data track"):
            remux(path)
        assert path.read_bytes() == TRACKS.read_bytes()


def test_sound_that_cannot_be_taken_along_costs_a_warning_and_no_frame(tmp_path):
    """The earlier video is gone by the time that the new one is finished."""
    source, path = tmp_path / "take.mp4", tmp_path / "a.mp4"
    shutil.copy(TRACKS, source)
    with VideoSink(path, 64, 64, 16, prefix=source, prefix_frames=21) as sink:
        sink.write(MORE)
        source.unlink()
    assert "sound and other tracks of take.mp4 could not be taken along" in sink.warning
    assert str(tmp_path) not in sink.warning
    assert len(tracks_of(path)["video"]["packets"]) == 33 and b"moof" not in path.read_bytes()


def test_a_failed_rewrite_of_a_join_with_sound_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    sink = VideoSink(path, 64, 64, 16, prefix=TRACKS, prefix_frames=21)
    sink.write(MORE)
    monkeypatch.setattr(video_sink, "_rewrite", lambda *_: 1 / 0)
    sink.close()
    assert "a.mp4 could not be rewritten" in sink.warning and len(tracks_of(path)["video"]["packets"]) == 33
