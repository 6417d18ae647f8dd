"""What stands in braces behind a time: how the video changes there, and which numbers hold from there on.

`{soft}`, `{seed 7}`, `{soft, seed 7, strength 0.5}`: at most one transition, one seed and one strength, in any order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

SHOT = "shot"
TRANSITIONS = ("cut", "recache", "flush", "rope cut", "soft", SHOT)
MOST_SEED = 2**64 - 1
_LONGEST_NUMBER = 40  # characters
_SEED = re.compile(r"seed\s+(\S+)", re.I)
_STRENGTH = re.compile(r"strength\s+(\S+)", re.I)


class OptionError(ValueError):
    """A sentence about what stands in the braces."""


@dataclass(frozen=True)
class EntryOptions:
    """A transition's name or None, the noise's seed from there on, the adaptive anchor's strength from there on."""

    transition: str | None = None
    seed: int | None = None
    strength: float | None = None

    @property
    def stand_alone(self) -> bool:
        """Whether an entry without words means something: it begins a shot under the same words, or sets a number alone."""
        numbers = self.seed is not None or self.strength is not None
        return self.transition == SHOT or (self.transition is None and numbers)

    def written(self) -> str:
        """As it stands in the braces, without them; empty for none."""
        parts = [] if self.transition is None else [self.transition]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        parts += [] if self.strength is None else [f"strength {Decimal(repr(float(self.strength))):f}"]
        return ", ".join(parts)


def read_options(text: str) -> EntryOptions:
    """The options of the text between two braces. OptionError for what is none."""
    found: dict[str, object] = {}
    for part in text.split(","):
        name, value = _read_one(part.strip())
        if name in found:
            raise OptionError(f"found a second {name} in the braces; keep one")
        found[name] = value
    return EntryOptions(**found)  # type: ignore[arg-type]


def _read_one(part: str) -> tuple[str, object]:
    if match := _SEED.fullmatch(part):
        digits = match[1]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST_NUMBER and int(digits) <= MOST_SEED):
            raise OptionError(f"the seed is {digits[:24]!r}; a seed is a whole number between 0 and {MOST_SEED}")
        return "seed", int(digits)
    if match := _STRENGTH.fullmatch(part):
        digits = match[1]
        plain = re.fullmatch(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", digits) and len(digits) <= _LONGEST_NUMBER
        if not plain or not 0 < float(digits) <= 1:
            raise OptionError(f"the strength is {digits[:24]!r}; a strength is a number above 0 and at most 1")
        return "strength", float(digits)
    name = " ".join(re.split(r"[\s_-]+", part.lower()))
    if name not in TRANSITIONS:
        known = ", ".join(f"{{{known}}}" for known in TRANSITIONS)
        raise OptionError(
            f"there is no transition {name[:24]!r}; known are {known}, and numbers are written {{seed 7, strength 0.5}}"
        )
    return "transition", name
