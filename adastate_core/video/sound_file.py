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
_OPTIONS = {
    "format_whitelist": ",".join((*CONTAINERS, "aiff", "caf", "w64", "ac3", "eac3", "amr", "wv", "tta", "ape")),
    "protocol_whitelist": "none",
}
_ADVICE = "give a file that plays, such as WAV, FLAC, MP3, M4A, Ogg or MP4"


class NoSound(ValueError):
    """A file that can be read, and has no sound in it."""


def read_sound(source: Source) -> Sound:
    """The first track of sound of a file, or of a binary file that is open, as it is heard from the file's beginning. NoSound if it
    has none, else ValueError, in a sentence."""
    try:
        with contextlib.ExitStack() as stack:
            file = source
            if isinstance(source, (str, os.PathLike)):
                file = stack.enter_context(open(source, "rb"))
            file.seek(0)
            container = stack.enter_context(av.open(file, container_options=dict(_OPTIONS), metadata_errors="replace"))
            streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
            if not streams:
                raise NoSound(f"{name(source)} has no sound in it; {_ADVICE}")
            return _decoded(container, streams[0], name(source))
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise ValueError(
            f"{name(source)} cannot be read: it is damaged or of a kind that is not known; {_ADVICE}"
        ) from error


def _decoded(container: av.container.InputContainer, stream: av.AudioStream, file: str) -> Sound:
    pieces, held, rate, late = [], 0, 0, 0.0
    for frame in _frames(container, stream):
        if not pieces:
            begin = (container.start_time or 0) / av.time_base
            rate, late = frame.sample_rate, 0.0 if frame.time is None else frame.time - begin
        piece = frame.to_ndarray()
        held += piece.size
        if held > MOST_SAMPLES:
            raise ValueError(f"{file} holds more than {MOST_SAMPLES} samples of sound; cut it into shorter files")
        pieces.append(piece)
    if not pieces:
        raise NoSound(f"{file} has no sound in it that decodes; {_ADVICE}")
    before = round(late * rate)  # a video's sound may begin later than its pictures
    if 0 < before <= MOST_SAMPLES - held:
        pieces.insert(0, numpy.zeros((pieces[0].shape[0], before), numpy.float32))
    return Sound(torch.from_numpy(numpy.concatenate(pieces, 1)), rate)


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
