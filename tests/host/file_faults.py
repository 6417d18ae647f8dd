"""Failing what a streamed run asks of the system: files, videos, threads, decode and encode, the n-th of them all."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from adastate_pack.nodes.host.codec import HostDecoder

# as a full disk, a player that holds the file, a device out of memory, and Ctrl-C say it
KINDS: tuple[Callable[[str], BaseException], ...] = (
    lambda why: OSError(errno.ENOSPC, why),
    lambda why: PermissionError(errno.EACCES, why),
    lambda why: torch.OutOfMemoryError(why),
    KeyboardInterrupt,
)
PATHS = ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "open", "truncate")
DESCRIPTORS = ("fsync", "fdatasync", "write", "ftruncate")


class Faults:
    """Counts operations on files under `folder`, and everything else that is told to it, in each thread; raises at one `place`.

    `points` are all that came, by place (the thread's name, how many came in it before) and name, whatever the threads' order;
    `failed` is the one that did not go through.
    """

    def __init__(
        self,
        folder: Path,
        place: tuple[str, int] | None = None,
        seed: int = 0,
        kinds: tuple[Callable[[str], BaseException | None], ...] = KINDS,
    ) -> None:
        """`kinds`: what is raised, one of them; one that gives None only does something at that moment."""
        self.folder, self.place, self.seed, self.kinds = str(folder), place, seed, kinds
        self._came: dict[str, list[str]] = {}
        self.failed: str | None = None
        self.when: Callable[[], None] = lambda: None
        self._busy = threading.local()

    def point(self, name: str) -> None:
        """An operation comes."""
        thread = threading.current_thread().name
        came = self._came.setdefault(thread, [])
        came.append(name)
        if (thread, len(came) - 1) == self.place:
            self.failed = name
            self.when()
            kind = random.Random(f"{self.seed}/{thread}/{len(came)}").choice(self.kinds)
            if (error := kind(f"injected at {len(came) - 1} of {thread}, {name}")) is not None:
                raise error

    @property
    def points(self) -> list[tuple[tuple[str, int], str]]:
        """All that came: places and names, thread by thread."""
        return [((thread, n), name) for thread in sorted(self._came) for n, name in enumerate(self._came[thread])]

    def _ours(self, path: Any) -> bool:
        try:
            return os.fsdecode(path).startswith(self.folder)
        except TypeError:  # a descriptor, or nothing at all
            return False

    def _counted(self, name: str, original: Callable, is_ours: Callable[[Any], bool]) -> Callable:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            if getattr(self._busy, "on", False) or not is_ours(first):
                return original(first, *rest, **more)
            self._busy.on = True  # what an operation calls on its way is a part of it
            try:
                self.point(f"{name} {_kind(first)}".strip())
                return original(first, *rest, **more)
            finally:
                self._busy.on = False

        return call

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have everything counted until `patch` is undone."""
        for name in PATHS:
            patch.setattr(os, name, self._counted(name, getattr(os, name), self._ours))
        for name in DESCRIPTORS:
            if hasattr(os, name):
                patch.setattr(os, name, self._counted(name, getattr(os, name), self._holds_ours))
        opened = self._counted("open", builtins.open, self._ours)

        def open_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            file = opened(path, mode, *rest, **more)
            return _Counted(file, self, _kind(path)) if self._ours(path) and set(mode) & set("wax+") else file

        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        self._install_safetensors(patch)
        self._install_video(patch)
        start = threading.Thread.start
        patch.setattr(threading.Thread, "start", lambda thread: (self.point("thread start"), start(thread))[1])
        step = HostDecoder.step
        patch.setattr(
            HostDecoder, "step", lambda decoder, z, *takes: self._around("decode", lambda: step(decoder, z, *takes))
        )

    def _around(self, name: str, call: Callable[[], Any]) -> Any:
        """An operation that may fail before it ran and after it."""
        self.point(name)
        made = call()
        self.point(f"{name}, late")
        return made

    def _holds_ours(self, descriptor: Any) -> bool:
        try:
            return self._ours(os.readlink(f"/proc/self/fd/{descriptor}"))
        except (OSError, TypeError):
            return False

    def _install_safetensors(self, patch: pytest.MonkeyPatch) -> None:
        """A library that writes files itself, where the pack lets it."""
        from adastate_pack.adastate_core.states import state_file as rollout_file

        if (save := getattr(rollout_file, "save_file", None)) is not None:
            patch.setattr(
                rollout_file,
                "save_file",
                lambda tensors, path, **more: self._around("write state", lambda: save(tensors, path, **more)),
            )

    def _install_video(self, patch: pytest.MonkeyPatch) -> None:
        """PyAV opens and writes files itself: opening, every packet and the end; and what goes to the encoder."""
        opened, frames = av.open, av.VideoFrame

        def open_video(path: Any, *rest: Any, **more: Any) -> Any:
            self.point(f"open video {'w' if 'w' in (*rest, more.get('mode')) else 'r'}")
            return _Container(opened(path, *rest, **more), self)

        class Frames:
            def __new__(cls, *values: Any) -> Any:  # of more than eight bits, or filled afterwards
                self.point("encode")
                return frames(*values)

            @staticmethod
            def from_ndarray(*values: Any, **more: Any) -> Any:
                self.point("encode")
                return frames.from_ndarray(*values, **more)

        patch.setattr(av, "open", open_video)
        patch.setattr(av, "VideoFrame", Frames)


def _kind(path: Any) -> str:
    """What a file is, by the end of its name."""
    if isinstance(path, int):
        return "file"
    name = os.path.basename(os.fsdecode(path))
    return next(
        (end for end in (".tmp.mp4", ".tmp", ".mp4", ".safetensors", ".history") if name.endswith(end)), "folder"
    )


class _Counted:
    """A file whose writes are counted."""

    def __init__(self, file: Any, faults: Faults, kind: str) -> None:
        self._file, self._faults, self._kind = file, faults, kind

    def write(self, data: Any) -> int:
        self._faults.point(f"write {self._kind}")
        return self._file.write(data)

    def flush(self) -> None:
        self._faults.point(f"flush {self._kind}")
        self._file.flush()

    def __enter__(self) -> _Counted:
        self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._file.__exit__(*what)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Container:
    """A container of PyAV whose packets and end are counted."""

    def __init__(self, container: Any, faults: Faults) -> None:
        self._container, self._faults = container, faults

    def mux(self, packet: Any) -> None:
        self._faults.point("write video")
        self._container.mux(packet)

    def close(self) -> None:
        try:
            self._faults.point("close video")
        finally:
            self._container.close()

    def __enter__(self) -> _Container:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)
