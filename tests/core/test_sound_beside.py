"""Sound beside frames: a WAV that two other readers read, as long as its frames, whatever happens to the folder."""

from __future__ import annotations

import os
import wave
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from sounds import given, played, sound

from adastate_core.audio.placed import PlacedSound
from adastate_core.video import sound_beside
from adastate_core.video.frame_folder import FrameFolder, FrameSequence
from adastate_core.video.sound_beside import NAME, SoundBeside

RATE = Fraction(16)
STEP = 2.0**-23


def samples_of(path: Path) -> tuple[numpy.ndarray, int]:
    """[channels, N] float64 and the rate, by Python's own reader."""
    with wave.open(str(path), "rb") as file:
        assert file.getsampwidth() == 3
        raw = numpy.frombuffer(file.readframes(file.getnframes()), numpy.uint8).reshape(-1, file.getnchannels(), 3)
        values = (
            raw[..., 0].astype(int) + 256 * raw[..., 1].astype(int) + 65536 * raw[..., 2].astype(numpy.int8).astype(int)
        )
        return values.T / 2.0**23, file.getframerate()


def require(folder: Path, heard, start: float, frames: int) -> None:
    found, rate = samples_of(folder / NAME)
    assert rate == heard.rate and found.shape == (len(heard.waveform), round(frames / RATE * rate))
    assert numpy.abs(found - given(heard, start, found.shape[1])).max() <= STEP
    if frames:
        assert numpy.abs(played(folder / NAME)[0] - found).max() <= STEP


def folder(path: Path, form: str, heard, first: int = 0, **options) -> FrameFolder:
    path.mkdir()
    placed = PlacedSound.at(heard, 0.0, first, RATE)
    return FrameFolder(path, FrameSequence("run", form, 32, 32, "16", first), sound=placed, **options)


@pytest.mark.parametrize("form", ["png", "webp"])
def test_the_sound_is_as_long_as_the_frames_while_they_grow(tmp_path, form):
    heard = sound(44_100, channels=2)
    sink = folder(tmp_path / "a", form, heard)
    for frames in (3, 8):
        sink.write(torch.rand(frames - sink.frames, 32, 32, 3))
        require(tmp_path / "a", heard, 0, frames)
    sink.close()
    require(tmp_path / "a", heard, 0, 8)


def test_a_folder_of_later_frames_and_one_that_is_joined(tmp_path):
    heard, other = sound(16_000), sound(16_000, seed=5)
    later = folder(tmp_path / "later", "png", heard, first=10)
    later.write(torch.rand(4, 32, 32, 3))
    later.close()
    require(tmp_path / "later", heard, 10 / 16, 4)
    joined = folder(tmp_path / "joined", "png", other, first=10, joined=tmp_path / "later", until=13)
    joined.write(torch.rand(5, 32, 32, 3))
    joined.close()
    found, rate = samples_of(tmp_path / "joined" / NAME)
    border = 3 * rate // 16
    assert numpy.abs(found[:, :border] - given(heard, 10 / 16, border)).max() <= STEP
    rest = found.shape[1] - border
    assert rest == 5 * rate // 16
    assert numpy.abs(found[:, border:] - given(other, 13 / 16, rest)).max() <= STEP


@pytest.mark.parametrize("old", ["nothing", "of another form", "broken"])
def test_where_the_old_sound_does_not_fit_the_given_one_stands_in_front(tmp_path, old):
    heard = sound(16_000)
    before = folder(tmp_path / "old", "png", sound(48_000, channels=2))
    before.write(torch.rand(6, 32, 32, 3))
    before.close()
    if old == "nothing":
        os.unlink(tmp_path / "old" / NAME)
    elif old == "broken":
        (tmp_path / "old" / NAME).write_bytes(b"RIFF")
    sink = folder(tmp_path / "new", "png", heard, joined=tmp_path / "old", until=6)
    sink.write(torch.rand(2, 32, 32, 3))
    sink.close()
    require(tmp_path / "new", heard, 0, 8)


def test_a_folder_goes_back_with_its_sound(tmp_path):
    heard = sound(16_000)
    sink = folder(tmp_path / "a", "png", heard)
    sink.write(torch.rand(12, 32, 32, 3))
    sink.go_back(5)
    require(tmp_path / "a", heard, 0, 5)
    sink.write(torch.rand(3, 32, 32, 3))
    sink.close()
    require(tmp_path / "a", heard, 0, 8)


def test_beyond_what_a_wav_counts_it_is_of_the_larger_form(tmp_path, monkeypatch):
    heard = sound(16_000, channels=2)
    monkeypatch.setattr(sound_beside, "_MOST", 20_000)
    growing = SoundBeside(tmp_path, PlacedSound(heard), RATE)
    for frames in (2, 30):
        growing.until(frames)
        assert (tmp_path / NAME).read_bytes()[:4] == (b"RIFF" if frames == 2 else b"RF64")
        found, rate = played(tmp_path / NAME)
        assert found.shape[1] == frames * rate // 16
        assert numpy.abs(found - given(heard, 0, found.shape[1])).max() <= STEP
    growing.go_back(2)
    require(tmp_path, heard, 0, 2)
    growing.close()
