"""A folder as a power cut may leave it: what a process does to it is recorded, and rebuilt up to any moment without what was not
asked onto the disk by then.

The record is taken by looking: before and after every operation on names, at every fsync and after every packet of a video the
folder is read, so that it does not matter who writes. What a file system may do is taken as badly as POSIX allows: an fsync of a
file has the disk hold its contents but none of its names, that of a folder the names in it and no contents.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from file_faults import PATHS

# how what was not synced fares
WAYS = {
    "all is lost": ("none", "lost"),
    "names are kept and contents lost": ("all", "lost"),
    "lengths are kept and hold zeros": ("all", "zeros"),
    "the last name is kept alone": ("the last", "lost"),
    "names come in order, contents in pieces": ("in order", "pieces"),
    "names and contents come by chance": ("by chance", "pieces"),
}
BLOCK = 512


@dataclass(frozen=True)
class Names:
    """What happened at once to names of a folder: {name: which file it is from then on, or None}."""

    folder: int
    named: dict[str, int | None]


@dataclass
class Step:
    """A moment: names that changed, contents as they are from now on, and what was then asked onto the disk."""

    names: list[Names] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    synced: int | None = None


class Record:
    """Looks at everything under `root`, which is empty and on the disk, whenever it is told to. `promised` are (how many steps
    there were, what) as `promise` was told."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, root.stat().st_ino
        self.steps: list[Step] = []
        self.promised: list[tuple[int, Any]] = []
        self.folders: set[int] = set()
        self._lock = threading.RLock()
        self._held: dict[int, int] = {}  # open: else the system gives a file's number to another when it has gone
        self._names: dict[int, dict[str, int]] = {self.number: {}}
        self._seen: dict[int, tuple[int, int]] = {}
        self._contents: dict[int, bytes] = {}

    def promise(self, what: Any) -> None:
        with self._lock:
            self.promised.append((len(self.steps), what))

    def look(self, sure: int = 0, synced: int | None = None) -> None:
        """Take a step. `sure`: a file that is read even if it looks as it did."""
        step, found = Step(synced=synced), {}
        self._walk(self.root, found, step, sure)
        for number, names in found.items():
            before = self._names.get(number, {})
            changed = {
                name: names.get(name) for name in before.keys() | names.keys() if before.get(name) != names.get(name)
            }
            if changed:
                step.names.append(Names(number, changed))
        self._names = found
        self.folders |= found.keys()
        if step.names or step.contents or synced is not None:
            self.steps.append(step)

    def _walk(self, folder: Path, names: dict[int, dict[str, int]], step: Step, sure: int) -> None:
        here = names.setdefault(folder.stat().st_ino, {})
        for entry in os.scandir(folder):
            found = entry.stat(follow_symlinks=False)
            number, looks = found.st_ino, (found.st_size, found.st_mtime_ns)
            here[entry.name] = number
            if number not in self._held:
                self._held[number] = os.open(entry.path, os.O_RDONLY)
            if stat.S_ISDIR(found.st_mode):
                self._walk(Path(entry.path), names, step, sure)
            elif self._seen.get(number) != looks or number == sure:
                self._seen[number] = looks
                data = os.pread(self._held[number], 2**30, 0)
                if self._contents.get(number) != data:
                    self._contents[number] = step.contents[number] = data

    def close(self) -> None:
        """Let go of the files; what was recorded stays."""
        for descriptor in self._held.values():
            os.close(descriptor)

    # ---- being told

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have every operation looked at until `patch` is undone; nothing waits for a disk meanwhile."""
        from adastate_pack.adastate_core.video.animation import GrowingAnimation
        from adastate_pack.adastate_core.video.sink import VideoSink

        for name in PATHS:
            if name != "open":
                patch.setattr(os, name, self._around(getattr(os, name), self._ours))
        opened = self._around(builtins.open, self._ours)
        for owner in (builtins, io):
            patch.setattr(owner, "open", opened)
        patch.setattr(os, "fsync", self._fsync)
        for owner, name in ((VideoSink, "_mux"), (GrowingAnimation, "_append")):
            patch.setattr(owner, name, self._around(getattr(owner, name), lambda sink: True))

    def _ours(self, path: Any) -> bool:
        try:
            return os.fsdecode(path).startswith(str(self.root))
        except TypeError:  # a descriptor
            return False

    def _around(self, call: Callable, is_ours: Callable[[Any], bool]) -> Callable:
        def called(first: Any, *rest: Any, **named: Any) -> Any:
            if not is_ours(first):
                return call(first, *rest, **named)
            with self._lock:
                self.look()
                made = call(first, *rest, **named)
                self.look()
                return made

        return called

    def _fsync(self, descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        with self._lock:
            self.look(sure=number, synced=number)


@dataclass
class Cut:
    """The disk at one moment: `steps` of a record were taken. `files` by their path below the root: what they hold, and the step of
    which that is."""

    steps: int
    files: dict[str, tuple[bytes, int]]

    @property
    def key(self) -> bytes:
        """The same for disks that hold the same, hidden files left out."""
        made = hashlib.blake2b(digest_size=16)
        for path, (data, _) in sorted(self.files.items()):
            if not path.rpartition("/")[2].startswith("."):
                made.update(path.encode() + b"\0" + len(data).to_bytes(8, "little") + data)
        return made.digest()

    def write(self, root: Path) -> None:
        """Lay it out below `root`, which is empty."""
        for path, (data, step) in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
            os.utime(root / path, ns=(10**18 + step * 10**6,) * 2)


def cuts(record: Record, way: str, luck: random.Random) -> Iterator[Cut]:
    """The disk after every step, as it fares in one of WAYS."""
    names, contents = WAYS[way]
    disk = _Disk(record.number, record.folders)
    for number, step in enumerate(record.steps):
        disk.take(number, step)
        yield Cut(number + 1, disk.files(names, contents, luck))


class _Disk:
    """What is on the disk for sure, and what may be."""

    def __init__(self, root: int, folders: set[int]) -> None:
        self.root, self.folders = root, folders
        self._names: list[tuple[int, Names]] = []
        self._sure: set[int] = set()  # places in _names
        self._now: dict[int, tuple[bytes, int]] = {}
        self._safe: dict[int, tuple[bytes, int]] = {}
        self._last_sync = 0

    def take(self, number: int, step: Step) -> None:
        self._names += [(number, names) for names in step.names]
        self._now |= {file: (data, number) for file, data in step.contents.items()}
        if step.synced is not None:
            self._last_sync = len(self._names)
            self._sure |= {i for i, (_, names) in enumerate(self._names) if names.folder == step.synced}
            if step.synced in self._now:
                self._safe[step.synced] = self._now[step.synced]

    def files(self, names: str, contents: str, luck: random.Random) -> dict[str, tuple[bytes, int]]:
        folders: dict[int, dict[str, int]] = {self.root: {}}
        until = luck.randint(self._last_sync, len(self._names)) if names == "in order" else 0
        last = max((i for i in range(len(self._names)) if i not in self._sure), default=-1)
        for i, (_, changed) in enumerate(self._names):
            kept = {"none": False, "all": True, "in order": i < until, "the last": i == last}.get(
                names, luck.random() < 0.5
            )
            if i in self._sure or kept:
                folder = folders.setdefault(changed.folder, {})
                for name, file in changed.named.items():
                    if file is None:
                        folder.pop(name, None)
                    else:
                        folder[name] = file
        held: dict[int, tuple[bytes, int]] = {}
        return dict(self._below(self.root, "", folders, held, contents, luck))

    def _below(
        self, folder: int, at: str, folders: dict[int, dict[str, int]], held: dict, contents: str, luck: random.Random
    ) -> Iterator[tuple[str, tuple[bytes, int]]]:
        for name, file in folders.get(folder, {}).items():
            if file not in self.folders:
                if file not in held:
                    held[file] = self._held(file, contents, luck)
                yield at + name, held[file]
            else:
                yield from self._below(file, f"{at}{name}/", folders, held, contents, luck)

    def _held(self, file: int, contents: str, luck: random.Random) -> tuple[bytes, int]:
        (now, newest), (safe, oldest) = self._now.get(file, (b"", 0)), self._safe.get(file, (b"", 0))
        if contents == "lost" or now == safe:
            return safe, oldest
        if contents == "zeros":
            return safe + bytes(max(0, len(now) - len(safe))), newest
        size = luck.choice((len(now), len(safe), luck.randint(*sorted((len(now), len(safe))))))
        made = bytearray(safe[:size].ljust(size, b"\0"))
        for start in range(0, min(size, len(now)), BLOCK):
            if luck.random() < 0.5:
                piece = now[start : min(start + BLOCK, size)]
                made[start : start + len(piece)] = piece
        return bytes(made), newest
