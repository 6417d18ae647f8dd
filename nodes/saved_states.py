"""The states that a stream saves beside its first video: when they are due, how they are written, what of it failed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..adastate_core.rollout import RolloutState
from ..adastate_core.states.disk_room import free_bytes, shown_bytes
from ..adastate_core.states.kept_states import StateHistory, history_folder
from ..adastate_core.states.spacing import Spacing
from ..adastate_core.states.state_file import save_state, state_bytes
from ..adastate_core.states.state_thread import StateThread
from .host.output_files import STATE_SUFFIX, Target
from .host.safely import attempt, free_memory, log
from .stream_settings import StreamSettings

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Due:
    """A state that waits for its video to be whole, and what for."""

    state: RolloutState = field(repr=False)
    autosave: bool
    keep: bool


@dataclass
class _Failures:
    """How often something about the states failed, and why the last time."""

    count: int
    reason: str


class SavedStates:
    """The states of one streamed run. One that is due is taken after one chunk, in the rollout's thread, and written after the
    next, in another, when the disk holds all frames that it counts. What fails is logged and counted, never raised: the video
    goes on.

    A state is written only where it leaves the room that the video still needs.
    """

    def __init__(self, settings: StreamSettings, sync: Callable[[], None], needed: Callable[[], int]) -> None:
        """`sync` has the disk hold all frames that are written; `needed` are the bytes that the videos still take of it."""
        self.settings, self._sync, self._needed = settings, sync, needed
        self.video: Target | None = None
        self.history: StateHistory | None = None
        self.spacing = Spacing(settings.autosave_seconds)
        self._thread = StateThread()
        self._failed: dict[str, _Failures] = {}
        self._no_room = ""
        self._due: _Due | None = None
        self._size = 0  # of the newest state, as a file
        self._own: tuple[int, ...] | None = None  # which file this run wrote
        self._left = ""

    def named(self, video: Target) -> None:
        """The first video has its name; states lie beside it."""
        self.video = video
        if self.settings.history_chunks and self.history is None:
            self.history = StateHistory(
                history_folder(self.path), self.settings.history_chunks, self.settings.history_states
            )

    @property
    def path(self) -> Path:
        """`<video>.state.safetensors`."""
        return self.video.path.with_suffix(STATE_SUFFIX)

    @property
    def busy(self) -> bool:
        """Whether a state is being written."""
        return self._thread.busy

    @property
    def waits(self) -> bool:
        """Whether a state is there that `write_due` will write."""
        return self._due is not None

    def take_due(self, generated: int, last: bool, take: Callable[[], RolloutState], ready: Callable[[], None]) -> None:
        """Take the state after `generated` chunks if one is due; one that cannot be taken is left for the next time. After the
        `last` chunk there is no way back to be kept.

        `ready` is called before `take`, to have all frames written that the state counts; what it raises is raised. An autosave
        that is due while a state is being written waits for the next chunk. What raised in the writing thread and is no failure
        of it (an interrupt) is raised here.
        """
        self._thread.look()
        keep = self._wants(generated)
        autosave = self.spacing.due and not self._thread.busy and not last
        if not (autosave or keep) or not self._may_fit():
            return
        ready()
        start = time.monotonic()
        state = self._try(take, "on the way")
        if autosave:
            self.spacing.taken(time.monotonic() - start)
        if state is not None:
            self._due = _Due(state, autosave, keep)

    def _wants(self, generated: int) -> bool:
        """Whether the history keeps the state after so many chunks, by what is in it once it is written."""
        if self.history is None or generated % self.settings.history_chunks:
            return False
        self._thread.wait()
        return self.history.wants(generated)

    def write_due(self) -> None:
        """Start writing the state that waits: the disk holds, or is about to be given, all frames that it counts."""
        due, self._due = self._due, None
        if due is not None:
            self._thread.run(partial(self._write_taken, due, due.autosave, self._needed()))

    def _write_taken(self, due: _Due, autosave: bool, needed: int) -> None:
        if due.keep:
            self._try(partial(self._keep, due.state, needed), "into its history")
        if autosave:
            start, before = time.monotonic(), self._own
            self._write(lambda: due.state, needed)
            self.spacing.written(time.monotonic() - start, self._own != before)

    def rest(self) -> None:
        """Wait until nothing is being written."""
        self._thread.wait()

    def forget_due(self) -> None:
        """A state that was taken and is not written never will be: the run has gone back to before it."""
        self._due = None

    def go_back(self, state: RolloutState) -> None:
        """The run goes on from `state`, which its history keeps: it becomes the one beside the video, and those behind it go. After
        `rest`. OSError, with all as it was, if it cannot be written."""
        save_state(state, self.path)
        self._own = _which(self.path)
        self.history.go_back(state.next_chunk)

    def save_last(self, whole: bool, finished: bool, take: Callable[[], RolloutState]) -> None:
        """At the end of a run, when its videos are finished and nobody writes to them: save the last state where the run ended
        early or somebody asked for one.

        `whole`: the video has its length. `finished`: its files are as they should be. A whole, finished video that nobody
        asked a state of leaves none.
        """
        try:
            self._thread.wait()
        finally:
            self.spacing.end()
            if not self._thread.busy:  # waiting was interrupted: what is being written stays the last one
                self._end(whole, finished, take)

    def _end(self, whole: bool, finished: bool, take: Callable[[], RolloutState]) -> None:
        due, self._due = self._due, None
        if due is not None:
            self._write_taken(due, False, 0)
        if self.history is not None:
            self.history.tidy()
        if not whole or self.settings.keeps_state:
            free_memory()
            self._write(take, 0, again=True)
        elif finished:
            self._remove_own()
        elif self._own is not None:  # the video could not be rewritten: its state is not what is given up
            self._write(take, 0, again=True)

    def _remove_own(self) -> None:
        """The video is whole, so the way back to its middle goes: the file that this run wrote, and no other of that name."""
        if self._own is None or _which(self.path) != self._own:
            return
        _, reason = attempt(f"{self.path.name} could not be removed", self.path.unlink)
        if reason:
            self._left = f"{self.path.name} could not be removed ({reason}); the video is whole without it"

    @property
    def warnings(self) -> list[str]:
        """Sentences about what could not be saved or removed."""
        video, left = self.video.name if self.video else "", self.history.left if self.history else []
        return [
            *(f"{path.parent.name}/{path.name} could not be removed: another program may hold it" for path in left[:1]),
            *(
                f"{'a state' if failed.count == 1 else f'{failed.count} states'} of {video} could not be saved {where} "
                f"({failed.reason}); the video lost no frame by it"
                for where, failed in self._failed.items()
            ),
            *filter(None, (self._no_room, self._left)),
        ]

    def saved(self) -> dict[str, Any]:
        """JSON-able: the last state's name as Load Rollout State lists it, or None, and after which chunks others are kept."""
        name = self.video.name.removesuffix(self.video.path.suffix) + STATE_SUFFIX
        kept = self.history.kept if self.history is not None else []
        return {"state": f"{name} [output]" if self.path.is_file() else None, "kept": kept}

    def _keep(self, state: RolloutState, needed: int) -> None:
        if self._has_room(state, needed):
            self._sync()
            self.history.keep(state)

    def _write(self, state: Callable[[], RolloutState], needed: int, again: bool = False) -> None:
        """Write `<video>.state.safetensors`."""

        def save() -> None:
            made = state()
            if self._has_room(made, needed):
                self._sync()
                save_state(made, self.path)
                self._own = _which(self.path)

        self._try(save, f"beside it as {self.path.name}", again)

    def _may_fit(self) -> bool:
        """Whether a state of the newest one's size has room, so that none is copied in vain; the first one is tried."""
        fits = not self._size or self._fits(self._size, self._needed())
        if not fits:
            self.spacing.passed_over()
        return fits

    def _has_room(self, state: RolloutState, needed: int) -> bool:
        self._size = state_bytes(state)
        return self._fits(self._size, needed)

    def _fits(self, size: int, needed: int) -> bool:
        """Whether the disk takes a file of `size` and what the video needs. The state before stays until the new one is whole,
        so it makes no room. Where it does not, that is told, once."""
        free = free_bytes(self.path.parent)
        if free is None or size + needed <= free:
            return True
        if not self._no_room:
            video = f", and the video still needs {shown_bytes(needed)}" if needed else ""
            self._no_room = (
                f"a state of {self.video.name} was not saved for want of room: it takes {shown_bytes(size)}{video}, and the disk "
                f"has {shown_bytes(free)} left; the video went on without. Free some room on the disk"
            )
            log.warning("%s", self._no_room)
        return False

    def _try(self, make: Callable[[], Made], where: str, again: bool = False) -> Made | None:
        """What `make` gives; a failure is logged and counted, never raised, so that the video goes on, and None."""
        made, reason = attempt(f"a state of {self.video.name} could not be saved {where}", make, again)
        if reason:
            self._failed[where] = _Failures(self._failed.get(where, _Failures(0, "")).count + 1, reason)
        return made


def _which(path: Path) -> tuple[int, ...] | None:
    """Tells a file from any other that has its name later; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
