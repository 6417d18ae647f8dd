"""Sound in videos: in step with the pictures while they grow, after a kill, a join, a way back and the last rewrite.

What a file plays is read by sounds.py, and compared with the waveform that was given.
"""

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
from sounds import CLICKS, click_time, given, lag, played, sound
from test_codecs import SIDE, moving
from test_codecs import given as in_form
from test_video_join import DATA_TRACKS, TRACKS, tracks_of

from adastate_core.audio.placed import PlacedSound, resampled
from adastate_core.measure.metrics import measure_video, read_pictures
from adastate_core.video.encoder import CODECS
from adastate_core.video.sink import VideoSink
from adastate_core.video.sound_track import EarlierSound
from adastate_core.video.tail import tail_frames

ROOT = Path(__file__).resolve().parents[2]
LOSSLESS = ["prores", "ffv1"]
FPS = 16
STEP = 2.0**-23


def written(path: Path, codec: str, placed: PlacedSound | None, counts=(9, 12, 12), first: int = 0, **options) -> Path:
    fps = options.pop("fps", FPS)
    path = path.with_suffix(CODECS[codec].suffix)
    with VideoSink(path, SIDE, SIDE, fps, codec=codec, sound=placed, **options) as sink:
        for count in counts:
            sink.write(in_form(codec, moving(count, first)))
            first += count
    assert not sink.warning
    return path


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.dts is not None for packet in container.demux(video=0))


def require_in_step(path: Path, heard, start: float, frames: int, fps: float = FPS) -> None:
    """The file plays the sound from `start` seconds on, no sample early or late, as long as its frames last."""
    found, rate = played(path)
    assert rate == heard.rate and found.shape[0] == heard.waveform.shape[0]
    assert frames_in(path) == frames
    assert 0 <= found.shape[1] - frames / fps * rate < 1024 + rate * 0.001
    wanted = given(heard, start, found.shape[1])
    assert lag(found[0], wanted[0]) == 0
    if path.suffix == ".mp4":
        error = numpy.abs(found - wanted)
        assert 10 * numpy.log10((wanted**2).mean() / (error**2).mean()) > 20
    else:
        assert numpy.abs(found - wanted).max() <= STEP


@pytest.mark.sampled(4)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (44_100, 1), (16_000, 1), (8_000, 2)])
def test_a_file_plays_its_sound_in_step(tmp_path, codec, rate, channels):
    heard = sound(rate, channels=channels)
    path = written(tmp_path / "a", codec, PlacedSound(heard))
    require_in_step(path, heard, 0, 33)
    found, _ = played(path)
    for click in CLICKS:
        if click < 33 / FPS - 0.1:
            assert abs(click_time(found[0], rate, click) - click) < 1 / FPS


@pytest.mark.parametrize("codec", ["h264", "prores", "ffv1"])
@pytest.mark.parametrize(
    ("offset", "first", "fps"), [(0.5, 0, FPS), (-0.4, 0, FPS), (0.25, 21, FPS), (0, 30, 24000 / 1001)]
)
def test_a_file_begins_anywhere_in_its_sound(tmp_path, codec, offset, first, fps):
    """An offset, before or behind the sound's beginning, and a file that holds a video's later frames alone."""
    heard = sound(32_000)
    rate = Fraction(fps).limit_denominator(1001)
    path = written(tmp_path / "a", codec, PlacedSound.at(heard, offset, first, rate), (12, 12), fps=fps)
    require_in_step(path, heard, offset + first / fps, 24, fps)


@pytest.mark.parametrize("codec", ["h264", "prores"])
def test_behind_a_short_sound_there_is_silence(tmp_path, codec):
    heard = sound(16_000, seconds=0.9)
    path = written(tmp_path / "a", codec, PlacedSound(heard))
    require_in_step(path, heard, 0, 33)
    found, rate = played(path)
    assert numpy.abs(found[:, round(1.1 * rate) :]).max() < 1e-3


@pytest.mark.parametrize("codec", ["h264", "av1", "prores", "ffv1"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_join_copies_the_sound_and_goes_on_without_a_gap(tmp_path, codec, killed):
    if codec not in CODECS:
        pytest.skip("this PyAV has no encoder of it")
    heard, counts = sound(48_000, channels=2), (9, 12, 12)
    whole = written(tmp_path / "whole", codec, PlacedSound(heard))
    old = tmp_path / f"old{whole.suffix}"
    sink = VideoSink(old, SIDE, SIDE, FPS, codec=codec, sound=PlacedSound(heard))
    for first, count in zip((0, 9, 21), counts, strict=True):
        sink.write(in_form(codec, moving(count, first)))
    if killed:  # as it lies on the disk
        data = old.read_bytes()
        sink.stop()
        old.write_bytes(data)
    else:
        sink.close()
    new = written(tmp_path / "new", codec, PlacedSound(heard), (12,), 21, prefix=old, prefix_frames=21)
    require_in_step(new, heard, 0, 33)
    (found, rate), (once, _) = played(new), played(whole)
    size, join = min(found.shape[1], once.shape[1]), round(21 / FPS * rate)
    if codec in LOSSLESS:
        assert numpy.array_equal(found[:, :size], once[:, :size])
        return
    before, after = (tracks_of(path)["audio"]["packets"] for path in (old, new))
    copied = join // 1024 + 1
    assert [data for data, *_ in after[:copied]] == [data for data, *_ in before[:copied]]
    assert [pts for _, pts, _ in after] == [1024 * number - 1024 for number in range(len(after))]
    around = slice(join - 3000, join + 3000)  # no click where they meet: no further from what was given than elsewhere
    wanted = given(heard, 0, size)
    assert (
        numpy.abs(found - wanted[:, : found.shape[1]])[:, around].max()
        <= numpy.abs(once - wanted[:, : once.shape[1]]).max()
    )


def test_sounds_that_differ_meet_where_the_old_frames_end(tmp_path):
    """The old part is the old sound's to the byte, and the new sound stands where it stands in the video."""
    one, other = sound(44_100, seed=0), sound(44_100, seed=9)
    for codec in ("h264", "prores"):
        old = written(tmp_path / "old", codec, PlacedSound(one))
        new = written(tmp_path / "new", codec, PlacedSound(other), (12, 12), 21, prefix=old, prefix_frames=21)
        found, rate = played(new)
        join = round(21 / FPS * rate)
        for part, heard in ((slice(0, join - 2048), one), (slice(join, found.shape[1]), other)):
            wanted = given(heard, 0, found.shape[1])[0, part]
            assert lag(found[0, part], wanted) == 0
            assert numpy.abs(found[0, part] - wanted).mean() < 0.01


def test_a_file_goes_back_with_its_sound(tmp_path):
    """As a run that is steered does: the first frames are copied out of the file while it grows."""
    heard = sound(48_000)
    for codec in ("h264", "ffv1"):
        suffix = CODECS[codec].suffix
        growing = VideoSink(tmp_path / f"a{suffix}", SIDE, SIDE, FPS, codec=codec, sound=PlacedSound(heard))
        for first, count in ((0, 9), (9, 12), (21, 12)):
            growing.write(in_form(codec, moving(count, first)))
        fresh = growing.again(tmp_path / f"b{suffix}", 21)
        growing.stop()
        fresh.write(in_form(codec, moving(12, 21)))
        fresh.close()
        assert not fresh.warning
        require_in_step(fresh.path, heard, 0, 33)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from sounds import sound
from test_codecs import SIDE, given, moving
from adastate_core.audio.placed import PlacedSound
from adastate_core.video.sink import VideoSink
from adastate_core.video.sound_track import EarlierSound
sink = VideoSink({path!r}, SIDE, SIDE, 16, codec={codec!r}, sound=PlacedSound(sound({rate}, 30.0)))
for start in range(0, 100000, 12):
    sink.write(given({codec!r}, moving(12, start)))
    print(start + 12, flush=True)
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rate", [48_000, 8_000])
@pytest.mark.parametrize("codec", CODECS)
def test_a_killed_process_leaves_frames_and_sound(tmp_path, codec, rate):
    """All frames but at most the newest, and sound as far as they go, whatever a packet of it lasts."""
    path = tmp_path / f"killed{CODECS[codec].suffix}"
    code = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path), codec=codec, rate=rate)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    count = 0
    while count < 36:
        count = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    frames, heard = frames_in(path), sound(rate, 30.0)
    assert frames >= count - 1
    found, _ = played(path)
    assert found.shape[1] / rate > (frames - 1) / FPS - 1024 / rate
    wanted = given(heard, 0, found.shape[1])
    assert lag(found[0], wanted[0]) == 0
    again = written(tmp_path / "again", codec, PlacedSound(heard), (12,), 24, prefix=path, prefix_frames=24)
    require_in_step(again, heard, 0, 36)


@pytest.mark.parametrize("codec", ["h264", "prores", "ffv1"])
@pytest.mark.parametrize("finished", [False, True])
def test_sound_and_pictures_lie_side_by_side(tmp_path, codec, finished):
    """In the order of the file no packet is further from the other track's than a frame and a packet."""
    path = tmp_path / f"a{CODECS[codec].suffix}"
    sink = VideoSink(path, SIDE, SIDE, FPS, codec=codec, sound=PlacedSound(sound(16_000)))
    for first in (0, 12, 24):
        sink.write(in_form(codec, moving(12, first)))
    sink.close() if finished else sink.stop()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        found = [(packet.pos, packet.stream.type, float(packet.pts * packet.time_base)) for packet in packets]
    newest = {"video": 0.0, "audio": 0.0}
    for _, kind, time in sorted(found):
        newest[kind] = time
        assert abs(newest["video"] - newest["audio"]) <= 1 / FPS + 1024 / 16_000 + 0.002


def test_a_joined_files_other_tracks_come_along_beside_the_sound(tmp_path):
    """Its sound, of 16 kHz, is gone on with; the subtitle is copied as before."""
    heard, before = sound(16_000), tracks_of(TRACKS)
    path = tmp_path / "a.mp4"
    with VideoSink(path, 64, 64, FPS, prefix=TRACKS, prefix_frames=21, sound=PlacedSound(heard)) as sink:
        sink.write(torch.zeros(12, 64, 64, 3, dtype=torch.uint8))
    assert not sink.warning or not DATA_TRACKS
    after = tracks_of(path)
    assert sorted(after) == sorted(["video", "audio", "subtitle", *(["data"] if DATA_TRACKS else [])])
    assert after["subtitle"]["packets"] == before["subtitle"]["packets"][: len(after["subtitle"]["packets"])]
    copied = round(21 / FPS * 16_000) // 1024
    assert [data for data, *_ in after["audio"]["packets"][:copied]] == [
        data for data, *_ in before["audio"]["packets"][:copied]
    ]
    found, rate = played(path)
    join = round(21 / FPS * rate)
    assert lag(found[0, join:], given(heard, 21 / FPS, found.shape[1] - join)[0]) == 0


@pytest.mark.parametrize("codec", ["libopus", "libmp3lame", "aac"])
def test_sound_of_another_kind_gives_way_to_the_given_one(tmp_path, codec):
    """Put there by another program, or of a rate whose packets stand elsewhere: nothing of it is copied."""
    heard, other = sound(48_000), sound(48_000, seed=5)
    plain = written(tmp_path / "plain", "h264", None)
    old = tmp_path / "old.mp4"
    with av.open(str(plain)) as source, av.open(str(old), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0], opaque=True)
        audio = target.add_stream(codec, rate=48_000, layout="mono")
        for packet in (packet for packet in source.demux(video=0) if packet.dts is not None):
            packet.stream = video
            target.mux(packet)
        frame = av.AudioFrame.from_ndarray(other.waveform.numpy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 480 if codec == "aac" else 0
        for packet in [*audio.encode(frame), *audio.encode(None)]:
            target.mux(packet)
    earlier = EarlierSound(old)
    assert earlier.form is None and "48000 Hz, 1 channels" in earlier.told
    new = written(tmp_path / "new", "h264", PlacedSound(heard), (12,), 21, prefix=old, prefix_frames=21)
    require_in_step(new, heard, 0, 33)


def test_a_join_without_sound_keeps_the_old_one_as_far_as_it_goes(tmp_path):
    heard = sound(48_000)
    old = written(tmp_path / "old", "h264", PlacedSound(heard))
    new = written(tmp_path / "new", "h264", None, (12,), 21, prefix=old, prefix_frames=21)
    found, rate = played(new)
    assert frames_in(new) == 33 and 21 / FPS <= found.shape[1] / rate < 21 / FPS + 2 * 1024 / rate
    assert lag(found[0], given(heard, 0, found.shape[1])[0]) == 0


def test_an_old_video_without_sound_gets_it_from_its_beginning(tmp_path):
    heard = sound(48_000)
    old = written(tmp_path / "old", "h264", None)
    new = written(tmp_path / "new", "h264", PlacedSound(heard), (12,), 21, prefix=old, prefix_frames=21)
    require_in_step(new, heard, 0, 33)


@pytest.mark.parametrize("codec", ["h264", "prores"])
def test_pictures_and_measures_are_those_of_the_file_without_sound(tmp_path, codec):
    plain = written(tmp_path / "plain", codec, None)
    loud = written(tmp_path / "loud", codec, PlacedSound(sound(44_100)))
    assert numpy.array_equal(tail_frames(plain, 40), tail_frames(loud, 40))
    assert measure_video(read_pictures(plain)) == measure_video(read_pictures(loud))
    with av.open(str(plain)) as one, av.open(str(loud)) as other:
        assert one.duration == other.duration


def test_another_rate_and_more_channels_are_brought_to_what_a_codec_takes():
    """No sample later or earlier, whatever FFmpeg's resampler holds back."""
    for rate, channels in ((96_000, 1), (11_025, 2)):
        heard = sound(rate, channels=channels)
        made = resampled(heard, 48_000, 1)
        assert made.waveform.shape[0] == 1 and abs(made.seconds - heard.seconds) < 0.001
        step = 48_000 / rate
        time = numpy.arange(made.waveform.shape[1]) / step
        wave = heard.waveform.double().mean(0).numpy()
        wanted = numpy.interp(time, numpy.arange(len(wave)), wave)
        assert abs(lag(made.waveform[0].double().numpy(), wanted)) <= 1
    six = sound(96_000, channels=6)
    assert resampled(six, 48_000, 2).waveform.shape[0] == 2
