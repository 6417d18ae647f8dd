"""A timeline that is changed while its video is made: one more entry at the next chunk's first latent frame.

Entries are TimedText or PromptAt: what they have in common is `seconds`, `seed`, `strength`, and whether they have words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from .timeline import TimedText
from .timeline_format import GRAMMARS, format_timeline
from .values import PromptAt

Entry = TypeVar("Entry", TimedText, PromptAt)


def seconds_of(frame: int, fps: float, stride: int) -> float:
    """The second of a timeline that falls on a latent frame: to the millisecond where that is exact enough, as up to 1000 fps."""
    exact = frame * stride / fps
    short = round(exact, 3)
    return short if round(short * fps / stride) == frame else exact


def holds_from(frame: int, first_frame: int, chunk_frames: int) -> bool:
    """Whether an entry at latent frame `frame` takes hold at the chunk from `first_frame` on, and no earlier one."""
    middle = first_frame + chunk_frames / 2
    return frame > 0 and middle - chunk_frames <= frame < middle


def changed(entries: Sequence[Entry], new: Entry, takes_hold: Callable[[Entry], bool]) -> tuple[Entry, ...]:
    """The entries with one more, which begins at the chunk at which those take hold of which `takes_hold` says so.

    Words of `new` take the place of theirs, and of a shot without words. Numbers that it does not set stay theirs. Without words it
    only sets numbers.
    """
    there = [entry for entry in entries if takes_hold(entry)]
    if not there:
        return _in_order([*entries, new])
    numbers = {name: _newest(there, new, name) for name in ("seed", "strength")}
    if not _has_words(new):
        last = there[-1]
        return tuple(replace(last, **numbers) if entry is last else entry for entry in entries)
    return _in_order([*(entry for entry in entries if not takes_hold(entry)), replace(new, **numbers)])


def _newest(there: Sequence[Entry], new: Entry, name: str) -> Any:
    values = [getattr(entry, name) for entry in (*there, new)]
    return next((value for value in reversed(values) if value is not None), None)


def _has_words(entry: TimedText | PromptAt) -> bool:
    return entry.has_words if isinstance(entry, PromptAt) else entry.begins_prompt


def _in_order(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.seconds))


def written(entries: Sequence[TimedText]) -> str:
    """The timeline's text, in the first grammar that can say it. ValueError where none can."""
    fault: ValueError | None = None
    for grammar in ("lines", *(other for other in GRAMMARS if other != "lines")):
        try:
            return format_timeline(entries, grammar)
        except ValueError as error:
            fault = fault or error
    raise fault
