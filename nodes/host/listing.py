"""Saved files in the host's folders, listed. A listing is kept for some seconds, or until this server has written a file."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...adastate_core.files.whole_file import changes
from .names import FRAMES_SUFFIX

_KEPT_SECONDS = 3.0
_MOST_LISTINGS = 8


@dataclass(frozen=True)
class _Listing:
    """The saved files under one folder: when they were looked for, and (time, name) by ending."""

    made: float
    changes: int
    found: dict[str, list[tuple[float, str]]] = field(repr=False)


_listings: dict[tuple[str, tuple[str, ...]], _Listing] = {}


def listed(root: str, ending: str, endings: tuple[str, ...]) -> list[tuple[float, str]]:
    """(time of change, name relative to `root` with /) of the files under it whose name ends so, in no order.

    One look at the folder is for all `endings`. Links are followed, each folder once, whatever leads to it.
    """
    key = (root, endings)
    kept, number = _listings.get(key), changes()
    if kept is None or kept.changes != number or not 0 <= time.monotonic() - kept.made < _KEPT_SECONDS:
        found: dict[str, list[tuple[float, str]]] = {each: [] for each in endings}
        for entry in _files(root):
            for each in endings:
                if entry.name.endswith(each):
                    with contextlib.suppress(OSError):  # a dangling link, a file that is just being replaced
                        when = entry.stat().st_mtime
                        if entry.is_file():
                            found[each].append((when, os.path.relpath(entry.path, root).replace(os.sep, "/")))
        if len(_listings) >= _MOST_LISTINGS:
            _listings.clear()
        kept = _listings[key] = _Listing(time.monotonic(), number, found)
    return kept.found[ending]


def _files(root: str) -> Iterator[os.DirEntry[str]]:
    """Everything under `root` that is no folder. A folder that links lead to as well is told under its own name."""
    own, linked = deque([(root, os.path.realpath(root))]), deque()
    seen: set[str] = set()
    while own or linked:
        folder, real = own.popleft() if own else linked.popleft()
        real = real or os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # it may not be read, or is gone
            for entry in entries:
                try:
                    is_folder, is_link = entry.is_dir(), entry.is_symlink()
                except OSError:  # a link to itself
                    continue
                if not is_folder:
                    yield entry
                elif entry.name.endswith(FRAMES_SUFFIX):
                    continue  # thousands of pictures, and nothing that is saved
                elif is_link:
                    linked.append((entry.path, ""))
                else:
                    own.append((entry.path, os.path.join(real, entry.name)))
