"""Shots: scenes of one video, each of which begins with a chunk of its own (LongLive 2.0's multi-shot rollout).

From a shot's first chunk on all that is new stands SHOT_OFFSET further on in time, once for every shot; what is cached keeps the
time that it has. When that chunk is cached it is pinned: it stays in the window as its oldest frames, until the first chunk of
another shot is cached. Then it is an ordinary chunk again, the oldest one, and leaves first.

A shot is known by its first frame alone, so which frames are pinned and where a frame stands follow from the list of those.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

# how far in time a shot stands from what was before it, in latent frames (multi_shot_rope_offset)
SHOT_OFFSET = 8
NOTHING = range(0)


def time_of(frame: int, shots: Sequence[int]) -> int:
    """Where a frame stands in time, if `shots` are the first frames of all shots, in their order."""
    return frame + SHOT_OFFSET * bisect_right(shots, frame)


def pinned_by(shots: Sequence[int], end: int, chunk_frames: int) -> range:
    """The frames that are pinned when all before `end` are cached: the first chunk of the newest shot, as far as it is there."""
    begun = [first for first in shots if first < end]
    return range(begun[-1], min(begun[-1] + chunk_frames, end)) if begun else NOTHING


def staying(frames: range, room: int, pin: range) -> list[int]:
    """Which of `frames` a window of `room` frames keeps, in order: those that are pinned, and the newest others."""
    pinned = [frame for frame in frames if frame in pin][:room]
    others = [frame for frame in frames if frame not in pin]
    return sorted(pinned + others[max(0, len(others) - room + len(pinned)) :])
