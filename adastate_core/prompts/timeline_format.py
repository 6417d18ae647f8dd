"""A timeline written back as text in each of the three grammars of prompts/timeline.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from .timeline import LONGEST, LONGEST_TEXT, MOST_PROMPTS, TimedText, TimelineError, parse_timeline

GRAMMARS = ("bars", "marks", "lines")


def format_timeline(entries: Sequence[TimedText], grammar: str = "lines") -> str:
    """The text that parse_timeline reads as these entries: equal times, texts, transitions and numbers.

    Raises ValueError for entries that are no timeline, and for a prompt that the grammar would read otherwise.
    """
    if grammar not in GRAMMARS:
        raise ValueError(f"grammar is {grammar!r}; it must be one of {', '.join(GRAMMARS)}")
    if not entries:
        raise ValueError("there are no prompts to write; give at least one")
    if len(entries) > MOST_PROMPTS:
        raise ValueError(f"there are {len(entries)} prompts; a timeline holds at most {MOST_PROMPTS}")
    seconds = [entry.seconds for entry in entries]
    if seconds[0] != 0 or any(not a < b <= LONGEST for a, b in zip(seconds, seconds[1:], strict=False)):
        shown = ", ".join(map(str, seconds[:8])) + (", ..." if len(seconds) > 8 else "")
        raise ValueError(f"prompts begin at [{shown}]; the first must be at 0, and times must rise, up to {LONGEST}")
    text = _written(entries, grammar)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"written as {grammar} the text has {len(text)} characters; at most {LONGEST_TEXT} are read")
    if not _reads_as(text, entries):
        for number, entry in enumerate(entries, 1):
            alone = [TimedText(0.0, "x"), replace(entry, seconds=1.0)]
            if not _reads_as(_written(alone, grammar), alone):
                raise ValueError(
                    f"prompt {number} cannot be written as {grammar}: {entry.text[:40]!r} with transition "
                    f"{entry.transition!r:.40} would be read as something else"
                )
        raise ValueError(f"these prompts cannot be written as {grammar}: they would be read as something else")
    return text


def _reads_as(text: str, entries: Sequence[TimedText]) -> bool:
    try:
        return parse_timeline(text) == tuple(entries)
    except TimelineError:
        return False


def _written(entries: Sequence[TimedText], grammar: str) -> str:
    written = [entry.options.written() for entry in entries]
    marks = [f" {{{options}}}" if options else "" for options in written]
    starts = [Decimal(repr(float(entry.seconds))) for entry in entries]
    if grammar == "bars":
        lengths = [_number(b - a) for a, b in zip(starts, starts[1:], strict=False)] + [""]
        heads = [(length + mark).strip() for length, mark in zip(lengths, marks, strict=True)]
        return " | ".join(f"{e.text} [{head}]" if head else e.text for e, head in zip(entries, heads, strict=True))
    form = "[{}{}: {}]" if grammar == "marks" else "{}{} {}"
    rows = zip(starts, marks, entries, strict=True)
    return "\n".join(form.format(_number(start), mark, entry.text).rstrip() for start, mark, entry in rows)


def _number(seconds: Decimal) -> str:
    digits = f"{seconds:f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + "s"
