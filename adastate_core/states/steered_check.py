"""What a state remembers of changes that were asked for while its video was made, and whether a file's is whole.

`timeline` is the text that makes the same video, None where there is none; `changes` are the newest MOST_STEERED, each {"at",
"frame"} with what was changed: "prompt" and "transition", "seed", "strength".
"""

from __future__ import annotations

from ..files.header_check import Damage, Fields
from ..prompts.entry_options import MOST_SEED, TRANSITIONS
from ..prompts.timeline import LONGEST, LONGEST_TEXT

MOST_STEERED = 1000


def check_steered(steered: Fields) -> None:
    """Damage unless it is such a memory, within its bounds."""
    if steered.any("timeline") is not None:
        _text(steered, "timeline")
    changes = steered.listed("changes")
    if len(changes) > MOST_STEERED:
        raise Damage(f"{steered.path('changes')} are {len(changes)}, more than {MOST_STEERED}")
    for number, entry in enumerate(changes):
        change = Fields(entry, f"{steered.path('changes')}[{number}]")
        change.number("at", 0, LONGEST)
        change.whole("frame")
        if change.has("prompt"):
            _text(change, "prompt")
        if change.has("transition"):
            change.text("transition", TRANSITIONS)
        if change.has("seed"):
            change.whole("seed", 0, MOST_SEED)
        if change.has("strength"):
            change.number("strength", 0, 1)
        change.done()
    steered.done()


def _text(fields: Fields, name: str) -> None:
    if len(fields.text(name)) > LONGEST_TEXT:
        raise Damage(f"{fields.path(name)} is longer than {LONGEST_TEXT} characters")
