"""The end of a video: its last frames, read without holding, or where the file can be searched even decoding, the rest.

The file is decoded from a keyframe before the end, further back until enough frames are found, to its end: nothing is
taken from frame counts or durations but a first guess, so files without them and with a varying frame rate come out right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy

from .frames import CLOCK, FileClip, Source, UnreadableVideo, decoded, no_frames, opened, rate_of


def tail_indices(times: Sequence[Fraction], frames: int, rate: Fraction) -> list[int]:
    """Which of the frames shown from `times` (seconds, ascending) on are the last `frames`, oldest first.

    `rate` 0: the last ones as they are. Else those on screen at steps of 1 / rate back from the last frame's time; a frame
    may come twice. Fewer where the video is shorter.
    """
    if not rate:
        return list(range(max(0, len(times) - frames), len(times)))
    wanted = (times[-1] - step / rate + CLOCK for step in reversed(range(frames)))
    return [bisect_right(times, time) - 1 for time in wanted if time >= times[0]]


def tail_frames(
    source: Source,
    frames: int,
    rate: Fraction | float = 0,
    since: Fraction | float = 0,
    until: Fraction | float | None = None,
) -> numpy.ndarray:
    """The last `frames` frames of a file, uint8 [n, height, width, 3], oldest first; n < frames where it holds fewer.

    As `tail`, upright and all in the size of the video's first picture.
    """
    return numpy.stack(tail(source, frames, rate, since, until))


def tail(
    source: Source,
    frames: int,
    rate: Fraction | float = 0,
    since: Fraction | float = 0,
    until: Fraction | float | None = None,
    what: str = "the video",
    each: Callable[[numpy.ndarray], Any] = lambda picture: picture,
    on_frame: Callable[[], object] = lambda: None,
) -> list[Any]:
    """What `each` makes of the last `frames` frames of a file, uint8 [height, width, 3], oldest first.

    `source` is a path or a binary stream; `rate` as in `tail_indices`. Only frames shown from `since` on and before
    `until` (seconds) count. Two passes over the end: one for the times, one for the frames that were chosen, held one at a
    time; `on_frame` is called for each frame that is decoded. UnreadableVideo, a ValueError, for files without pictures.
    """
    rate = Fraction(rate).limit_denominator(1001)
    since, until = Fraction(since), None if until is None else Fraction(until)
    at, back = _guess(source, frames, rate, until, what)
    while True:
        begin = at is None or at <= since
        if begin:
            at = since if since > 0 else None
        times = _times(source, at, since, until, what, on_frame)
        if begin or _enough(times, frames, rate):
            break
        back *= 4
        at -= back
    if not times:
        raise no_frames(source, what)
    size = FileClip(source, what, since, until).first().size
    chosen, out = tail_indices(times, frames, rate), {}
    wanted = set(chosen)
    for i, (_, shot) in enumerate(decoded(source, at, since, until, what)):
        on_frame()
        if i in wanted:
            out[i] = each(shot.rgb(size))
    return [out[i] for i in chosen]


def _guess(
    source: Source, frames: int, rate: Fraction, until: Fraction | None, what: str
) -> tuple[Fraction | None, Fraction]:
    """Where to begin, in seconds, None for the beginning, and how far that is from the end."""
    with opened(source, what) as (container, stream):
        start, end = stream.start_time or 0, None
        if stream.duration and stream.time_base:
            end = (start + stream.duration) * stream.time_base
        elif container.duration:
            end = Fraction((container.start_time or 0) + container.duration, av.time_base)
        if until is not None:
            end = until if end is None else min(end, until)
        back = (frames + 1) / (rate or rate_of(stream))
        first = start * stream.time_base if stream.time_base else Fraction(0)
        return (None if end is None or end - back <= first else end - back), back


def _enough(times: list[Fraction], frames: int, rate: Fraction) -> bool:
    return bool(times) and len(tail_indices(times, frames, rate)) == frames


def _times(
    source: Source,
    at: Fraction | None,
    since: Fraction,
    until: Fraction | None,
    what: str,
    on_frame: Callable[[], object],
) -> list[Fraction]:
    times = []
    try:
        for time, _ in decoded(source, at, since, until, what):
            on_frame()
            times.append(time)
    except UnreadableVideo:
        if at is None:
            raise
        return []  # what is damaged there may be whole further back
    return times
