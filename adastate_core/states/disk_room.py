"""What a disk has room for beside a video that is still being written to it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# frames to come may be harder to encode than those before
SPARE = 1.25


class Growing(NamedTuple):
    """A video that is being written: its bytes and frames so far, how many frames are still to come, and the bytes of a frame
    that nobody has encoded yet. `rewritten`: whether it is written a second time at its end."""

    size: int
    frames: int
    left: int
    picture: int
    rewritten: bool = True


def video_needs(videos: Iterable[Growing]) -> int:
    """Bytes that videos still take: their frames to come, and the largest one's second copy while it is rewritten with its index
    in front. Before a video has a frame, its frames count as if they were not compressed."""
    more, copy = 0, 0
    for video in videos:
        each = SPARE * video.size / video.frames if video.frames else video.picture
        coming = math.ceil(each * video.left)
        more, copy = more + coming, max(copy, video.size + coming if video.rewritten else 0)
    return more + copy


def free_bytes(folder: Path) -> int | None:
    """Bytes that the disk of `folder` has left for us; None where it does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def size_of(path: Path) -> int:
    """A file's bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def shown_bytes(size: int) -> str:
    """Bytes as people read them."""
    for unit, exponent in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**exponent:
            return f"{size / 10**exponent:.1f} {unit}"
    return f"{size} bytes"
