"""The sound of a file, of music or of a video, read as videos are: opened alone, by Python, and only of containers that hold it.

For hosts whose own loader is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import av
import numpy
import torch

from ..audio.track import Sound
from .frames import CONTAINERS, Source, name

# 6 hours of two channels at 48 kHz, 8 GiB
MOST_SAMPLES = 2**31
# a file that holds more than 46 minutes of one channel holds no more than this in a byte; silence can be packed without end
_MUCH, _MOST_IN_A_BYTE = 2**27, 256
# what is between is sound; outside a header that lies, which would make it last for days or for no time
RATES = (1_000, 1_000_000)
_OPTIONS = {
    "format_whitelist": ",".join((*CONTAINERS, "aiff", "caf", "w64", "ac3", "eac3", "amr", "wv", "tta", "ape")),
    "protocol_whitelist": "none",
}
_ADVICE = "give a file that plays, such as WAV, FLAC, MP3, M4A, Ogg or MP4"


class NoSound(ValueError):
    """A file that can be read, and has no sound in it."""


def read_sound(source: Source) -> Sound:
    """The first track of sound of a file, or of a binary file that is open, as it is heard from the file's beginning. NoSound if it
    has none, else ValueError, in a sentence, also for one that says to hold far more than its bytes can."""
    try:
        with contextlib.ExitStack() as stack:
            file = source
            if isinstance(source, (str, os.PathLike)):
                file = stack.enter_context(open(source, "rb"))
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            container = stack.enter_context(av.open(file, container_options=dict(_OPTIONS), metadata_errors="replace"))
            streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
            if not streams:
                raise NoSound(f"{name(source)} has no sound in it; {_ADVICE}")
            most = min(MOST_SAMPLES, max(_MUCH, _MOST_IN_A_BYTE * size))
            return _decoded(container, streams[0], name(source), most)
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise ValueError(
            f"{name(source)} cannot be read: it is damaged or of a kind that is not known; {_ADVICE}"
        ) from error


def _decoded(container: av.container.InputContainer, stream: av.AudioStream, file: str, most: int) -> Sound:
    """All of a track, of `most` samples at most, those of all channels counted."""
    pieces, held, rate, late = [], 0, 0, 0.0
    for frame in _frames(container, stream):
        if not pieces:
            begin = (container.start_time or 0) / av.time_base
            rate, late = frame.sample_rate, 0.0 if frame.time is None else float(frame.time) - begin
            _check_rate(rate, file)
        piece = frame.to_ndarray()
        held += piece.size
        _check_size(held, most, file)
        pieces.append(piece)
    if not pieces:
        raise NoSound(f"{file} has no sound in it that decodes; {_ADVICE}")
    before = round(late * rate)  # a video's sound may begin later than its pictures
    if before > 0:
        channels = pieces[0].shape[0]
        _check_size(held + before * channels, most, file)
        pieces.insert(0, numpy.zeros((channels, before), numpy.float32))
    return Sound(torch.from_numpy(numpy.concatenate(pieces, 1)), rate)


def _check_size(samples: int, most: int, file: str) -> None:
    if samples > most:
        why = "cut it into shorter files" if most == MOST_SAMPLES else f"which so few bytes cannot; {_ADVICE}"
        raise ValueError(f"{file} holds more than {most} samples of sound; {why}")


def _check_rate(rate: int, file: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(
            f"{file} says to have {rate} samples a second; it must have {RATES[0]} to {RATES[1]}: {_ADVICE}"
        )


def _frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """What decodes, as float32 planes of the first frame's rate and layout; a damaged packet is left out."""
    resampler = None
    for packet in container.demux(stream):
        try:
            found = packet.decode()
        except av.error.InvalidDataError:
            continue
        for frame in found:
            if resampler is None:
                resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=frame.sample_rate)
            yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)
