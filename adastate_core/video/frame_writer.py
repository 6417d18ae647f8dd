"""Decoded pictures to sinks, encoded in a thread beside whoever decodes them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .page_locked import Landed, Landing
from .picture_forms import deepest, reduced
from .writing_thread import WritingThread

NAME = "adastate-writer"


class Sink(Protocol):
    """Where frames go: one video, or whatever takes them in order."""

    path: Path
    # the form of the pictures that `write` is given: one of picture_forms.FORMS
    takes: str
    # how many are in it
    frames: int
    # a sentence about what `close` could not do, or empty
    warning: str

    def write(self, pictures: torch.Tensor) -> None:
        """Append [t, height, width, 3] on the CPU, in the form that it takes; nothing of them is held after the call."""
        ...

    def sync(self) -> None:
        """Have the system put on the disk what has been written."""
        ...

    def stop(self) -> None:
        """End it as it is."""
        ...

    def close(self) -> object:
        """End it, whole; what cannot be done becomes `warning`."""
        ...


class Given:
    """Pictures that the writer was given: whether they are in the sinks, and whether they count there."""

    def __init__(self, pictures: Landed, mark: Any) -> None:
        self.pictures, self.mark = pictures, mark
        self.written, self.counts = False, True

    @property
    def frames(self) -> int:
        return self.pictures.shape[1]


class FrameWriter:
    """Writes item b's pictures to `sinks[b]`, in order, in one thread; also a context manager.

    Pictures are given where they were decoded, in the form `takes`, the deepest that a sink takes, and at most two chunks are under
    way. What fails in the thread is raised, as it was, by the next call that gives or waits; nothing is written after it.

    `most`: of a chunk's pictures, all items together, at most so many bytes, so that buffers are made once.
    """

    def __init__(self, sinks: Sequence[Sink], most: int = 0) -> None:
        """ValueError for a sink that takes what is no form."""
        self.sinks, self.takes = list(sinks), deepest(sink.takes for sink in sinks)
        self._landing = Landing(most)
        self._thread: WritingThread[Given] = WritingThread(self._write, NAME)
        self._counting, self._frames = threading.Lock(), 0

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.end()
            self.release()

    @property
    def frames(self) -> int:
        """Frames of each item that are in the sinks; an unfinished chunk's do not count."""
        return self._frames

    @property
    def nbytes(self) -> int:
        """Page-locked bytes that it holds."""
        return self._landing.nbytes

    @property
    def under_way(self) -> list[Given]:
        """What was given, counts and is not written, oldest first; after a failure it never will be."""
        return [given for given in self._thread.left if given.counts]

    @property
    def failed(self) -> bool:
        """Whether the thread has failed, so that what is under way stays so."""
        return self._thread.failure is not None

    def give(self, pictures: torch.Tensor, mark: Any = None) -> Landed:
        """Have [B, t, H, W, 3], in the form `takes`, written; `mark` is for whoever asks what is under way. If it raises, they do
        not count. What is returned holds until pictures are given again."""
        self.wait(1)
        given = Given(self._landing.take(pictures), mark)
        try:
            self._thread.give(given)
        except BaseException:
            with self._counting:
                given.counts = False
                if given.written:
                    self._frames -= given.frames
            raise
        return given.pictures

    def wait(self, most: int = 0) -> None:
        """Until at most `most` chunks are under way. Raises what the thread failed with."""
        self._thread.wait(most)

    def end(self) -> None:
        """Wait until all is written, or has failed, and end the thread. The sinks are left open."""
        self._thread.end()

    def release(self) -> None:
        """After `end`: let go of its buffers and of the sinks, whoever still holds it. Nothing more may be asked of it but how many
        frames there are. If waiting for the end was interrupted, the thread goes on, with all that it needs."""
        if not self._thread.runs:
            self._thread = self._landing = None
            self.sinks = []

    def _write(self, given: Given) -> None:
        pictures = given.pictures.wait()
        for item, sink in zip(pictures, self.sinks, strict=True):
            sink.write(reduced(item, sink.takes))
        with self._counting:
            given.written = True
            if given.counts:
                self._frames += given.frames
        given.pictures.release()
