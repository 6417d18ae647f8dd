"""Files of a run that goes back to an earlier chunk: what came after it goes, and they are written on from there.

A video that grows cannot be cut. So its first frames are copied to another file beside it, which grows on from there. As a growing
file keeps its newest frame back, the old one keeps the name, with more frames than the state counts, until a frame behind those
that stayed is in the new one. Then that takes its place at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from ..adastate_core.files.whole_file import Unnamed, sync_file
from ..adastate_core.rollout import RolloutState
from ..adastate_core.video.sink import VideoSink
from .stream_parts import FramesPart, VideoPart


class Fresh:
    """The files that take over, beside those that are there. `take_over`, or else `discard`."""

    def __init__(
        self,
        videos: VideoPart | None,
        frames: Sequence[tuple[FramesPart, int]],
        counts: Sequence[int],
        copied: Callable[[], None],
    ) -> None:
        """`counts` are the frames that stay in each video. ValueError or OSError if they cannot be copied."""
        self._part, self._frames, self._counts = videos, frames, list(counts)
        self._files: list[Unnamed] = []
        self._sinks: list[VideoSink] = []
        try:
            for sink, target, count in zip(videos.sinks, videos.targets, counts, strict=True) if videos else ():
                self._files.append(Unnamed(target.path.parent))
                self._sinks.append(sink.again(self._files[-1].path, count, copied))
                self._sinks[-1].sync()
        except BaseException:
            self.discard()
            raise

    def take_over(self) -> None:
        """From now on these are written to. It does not fail."""
        if self._part is not None:
            old, self._part.sinks = self._part.sinks, self._sinks
            self._part.fresh = self
            for sink in old:
                with contextlib.suppress(Exception):  # it holds all that stays
                    sink.stop()
        for part, frames in self._frames:
            for folder in part.sinks:
                folder.go_back(frames - folder.sequence.first_frame)

    def place(self, last: bool) -> bool:
        """Give the files the names of those that they took over from. False: not yet, because the frames that stayed are not all on
        the disk, or because another program holds a file. `last`: end them first, and OSError if a place cannot be taken."""
        if not last and any(sink.frames <= count for sink, count in zip(self._sinks, self._counts, strict=True)):
            return False
        if last:
            for sink in self._sinks[: len(self._files)]:
                with contextlib.suppress(Exception):  # as far as it goes, it plays
                    sink.stop()
        while self._files:
            number = len(self._files) - 1
            file, sink, target = self._files[number], self._sinks[number], self._part.targets[number].path
            try:
                # a name that is on the disk before what the file holds would leave less there than the state counts
                sync_file(file.path)
                os.replace(file.path, target)
            except OSError:
                if last:
                    raise
                return False
            sink.path = target
            self._files.pop().discard()
            if last:
                sink.rewrite()
        return True

    def discard(self) -> None:
        """Remove what did not take over."""
        for sink in self._sinks:
            with contextlib.suppress(Exception):
                sink.stop()
        for file in self._files:
            file.discard()


def again(
    parts: Sequence[VideoPart | FramesPart], state: RolloutState, first: int, copied: Callable[[], None]
) -> Fresh:
    """The files of a run as they were when it took `state`; `first` is the number of the file frame that came next. ValueError or
    OSError if they cannot be had."""
    video = next((part for part in parts if isinstance(part, VideoPart)), None)
    folders = [(part, first) for part in parts if isinstance(part, FramesPart)]
    return Fresh(video, folders, state.stream["file_frames"], copied)
