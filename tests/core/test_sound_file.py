"""Sound read from files: what is heard from their beginning, and what is refused in a sentence."""

from __future__ import annotations

import wave
from pathlib import Path

import av
import numpy
import pytest
from sounds import lag, sound

from adastate_core.video import sound_file
from adastate_core.video.sound_file import read_sound
from adastate_core.video.sound_track import in_24_bits

FILES = {"a.wav": "pcm_s16le", "a.flac": "flac", "a.mp3": "libmp3lame", "a.ogg": "libopus", "a.m4a": "aac"}


def written(path: Path, codec: str, heard) -> Path:
    layout = "mono" if len(heard.waveform) == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=heard.rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(heard.waveform.numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = heard.rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_is_heard_from_its_beginning(tmp_path, file, channels):
    heard = sound(48_000, channels=channels)
    found = read_sound(written(tmp_path / file, FILES[file], heard))
    assert found.rate == 48_000 and len(found.waveform) == channels
    assert 0 <= found.seconds - heard.seconds < 0.1
    wanted, got = (each.waveform[0].double().numpy() for each in (heard, found))
    assert lag(got, wanted) == 0
    assert numpy.abs(got[: len(wanted)] - wanted).mean() < (2e-5 if file in ("a.wav", "a.flac") else 0.02)


def test_every_bit_of_24_is_read(tmp_path):
    heard = sound(44_100, seconds=0.5, channels=2)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 3, 44_100, 0, "NONE", ""))
        file.writeframes(in_24_bits(heard.waveform))
    assert (read_sound(tmp_path / "a.wav").waveform - heard.waveform).abs().max() <= 2.0**-23


def test_what_is_no_sound_is_refused_in_a_sentence(tmp_path, monkeypatch):
    files = {
        "a.wav": b"",
        "b.mp3": b"\0" * 5000,
        "c.m4a": b"#EXTM3U\nfile:///etc/passwd\n",
        "d.flac": b"fLaC" + b"\0" * 90,
    }
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
        with pytest.raises(
            ValueError, match=f"^{file} (cannot be read|has no sound).*; give a file that plays, such as WAV"
        ):
            read_sound(tmp_path / file)
    with pytest.raises(ValueError, match="gone.wav cannot be read"):
        read_sound(tmp_path / "gone.wav")
    picture = Path(__file__).parent / "data" / "91e434f_23.976.mp4"
    with pytest.raises(ValueError, match="91e434f_23.976.mp4 has no sound in it"):
        read_sound(picture)
    monkeypatch.setattr(sound_file, "MOST_SAMPLES", 1000)
    with pytest.raises(ValueError, match="holds more than 1000 samples"):
        read_sound(written(tmp_path / "long.wav", "pcm_s16le", sound(8_000)))


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path):
    heard = sound(44_100)
    path = written(tmp_path / "a.mp3", "libmp3lame", heard)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = read_sound(path)
    assert (
        1 < found.seconds < 2 and abs(lag(found.waveform[0].double().numpy(), heard.waveform[0].double().numpy())) <= 1
    )
