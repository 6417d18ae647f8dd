"""The end of a video: its last frames, read without holding, or where the file can be searched even decoding, the rest.

The file is decoded from a keyframe before the end, further back until enough frames are found, to its end: nothing is
taken from frame counts or durations but a first guess, so files without them and with a varying frame rate come out right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import IO

import av
import numpy

# The coarsest clock in common use (Matroska, WebM, FLV) counts milliseconds, so frame times are this far from the truth.
_CLOCK = Fraction(1, 1000)
NO_FRAMES = "the video has no frame in it; connect a VIDEO with frames in it"


def tail_indices(times: Sequence[Fraction], frames: int, rate: Fraction) -> list[int]:
    """Which of the frames shown from `times` (seconds, ascending) on are the last `frames`, oldest first.

    `rate` 0: the last ones as they are. Else those on screen at steps of 1 / rate back from the last frame's time; a frame
    may come twice. Fewer where the video is shorter.
    """
    if not rate:
        return list(range(max(0, len(times) - frames), len(times)))
    wanted = (times[-1] - step / rate + _CLOCK for step in reversed(range(frames)))
    return [bisect_right(times, time) - 1 for time in wanted if time >= times[0]]


def tail_frames(
    source: str | IO[bytes],
    frames: int,
    rate: Fraction | float = 0,
    since: Fraction | float = 0,
    until: Fraction | float | None = None,
) -> numpy.ndarray:
    """The last `frames` frames of a file, uint8 [n, height, width, 3], oldest first; n < frames where it holds fewer.

    `source` is a path or a binary stream; `rate` as in `tail_indices`. Only frames shown from `since` on and before
    `until` (seconds) count. Two passes over the end: one for the times, one for the frames that were chosen.
    ValueError for files that are no videos or have no frame.
    """
    rate, since = Fraction(rate).limit_denominator(1001), Fraction(since)
    until = None if until is None else Fraction(until)
    try:
        at, back = _guess(source, frames, rate, until)
        while True:
            begin = at is None or at <= since
            if begin:
                at = since if since > 0 else None
            times = _times(source, at, since, until)
            if begin or _enough(times, frames, rate):
                break
            back *= 4
            at -= back
        if not times:
            raise ValueError(NO_FRAMES)
        return _pictures(source, at, since, until, tail_indices(times, frames, rate))
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"the video cannot be read ({error}); connect another one") from error


def _guess(
    source: str | IO[bytes], frames: int, rate: Fraction, until: Fraction | None
) -> tuple[Fraction | None, Fraction]:
    """Where to begin, in seconds, None for the beginning, and how far that is from the end."""
    with _opened(source) as container:
        if not container.streams.video:
            raise ValueError("the video has no picture track; connect a VIDEO with frames in it")
        stream = container.streams.video[0]
        start, end = stream.start_time or 0, None
        if stream.duration and stream.time_base:
            end = (start + stream.duration) * stream.time_base
        elif container.duration:
            end = Fraction((container.start_time or 0) + container.duration, av.time_base)
        if until is not None:
            end = until if end is None else min(end, until)
        back = (frames + 1) / (rate or Fraction(stream.average_rate or 16))
        first = start * stream.time_base if stream.time_base else Fraction(0)
        return (None if end is None or end - back <= first else end - back), back


def _enough(times: list[Fraction], frames: int, rate: Fraction) -> bool:
    return bool(times) and len(tail_indices(times, frames, rate)) == frames


def _times(source: str | IO[bytes], at: Fraction | None, since: Fraction, until: Fraction | None) -> list[Fraction]:
    try:
        return [time for time, _ in decoded(source, at, since, until)]
    except av.error.FFmpegError:
        if at is None:
            raise
        return []  # a file that cannot be searched: from further back, at last from the beginning


def _pictures(
    source: str | IO[bytes], at: Fraction | None, since: Fraction, until: Fraction | None, chosen: list[int]
) -> numpy.ndarray:
    wanted, out, size = set(chosen), {}, {}
    for i, (_, frame) in enumerate(decoded(source, at, since, until)):
        if i in wanted:
            size = size or {"width": frame.width, "height": frame.height}
            out[i] = frame.to_ndarray(format="rgb24", **size)
    return numpy.stack([out[i] for i in chosen])


def _opened(source: str | IO[bytes]) -> av.container.InputContainer:
    if not isinstance(source, str):
        source.seek(0)
    return av.open(source)


def decoded(
    source: str | IO[bytes], at: Fraction | None, since: Fraction = Fraction(0), until: Fraction | None = None
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(time in seconds, frame) in the order they are shown, from the keyframe before `at`, None from the first frame."""
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        gap, last = 1 / Fraction(stream.average_rate or 16), None
        first = None if at is None else _seek(container, stream, at)
        for frame in _sound(container, stream, searched=at is not None):
            if first is not None and frame.pts is not None and frame.pts < first:
                continue  # shown before the keyframe and made from frames that were not decoded
            time = None if frame.pts is None else frame.pts * stream.time_base
            if time is None or (last is not None and time <= last):
                time = Fraction(0) if last is None else last + gap
            last = time
            if until is not None and time >= until:
                return
            if time >= since:
                yield time, frame


def _seek(container: av.container.InputContainer, stream: av.VideoStream, at: Fraction) -> int | None:
    """Stand at the keyframe before `at` seconds; its time in the stream's clock."""
    offset = int(at / stream.time_base)
    container.seek(offset, stream=stream)
    for packet in container.demux(stream):
        if packet.is_keyframe:
            container.seek(offset, stream=stream)
            return packet.pts
    return None


def _sound(container: av.container.InputContainer, stream: av.VideoStream, searched: bool) -> Iterator[av.VideoFrame]:
    """Frames that decode; after a search from the first keyframe on."""
    for packet in container.demux(stream):
        if searched and packet.dts is not None and not packet.is_keyframe:
            continue
        searched = False
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue
