"""What a run that is under way can be asked, and the refusal of what it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """What cannot be asked of this run: an HTTP status and a sentence."""

    def __init__(self, sentence: str, status: int = 409) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Wish:
    """What is asked at once. None: not asked."""

    prompt: str | None = None
    transition: str | None = None
    seed: int | None = None
    strength: float | None = None
    pause: bool = False
    take_back: float | None = None

    def told(self) -> dict[str, Any]:
        """What of it becomes an entry of the timeline."""
        names = ("prompt", "transition", "seed", "strength")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
