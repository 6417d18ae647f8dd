"""Writes in order, of which each may be done again: what a change of the cache consists of once nothing else can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One write to the cache of `layer`. Never reads what it writes, so one that failed half way is simply run again."""

    layer: int
    write: Callable[[], object]


class Steps:
    """Steps of which some are done: `run` goes on with the one at which it stopped."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = list(steps)
        self._done = 0

    @property
    def layer(self) -> int | None:
        """Whose write comes next."""
        return self._steps[self._done].layer if self._done < len(self._steps) else None

    @property
    def begun(self) -> bool:
        return self._done > 0

    def run(self) -> None:
        """Run what is left; raises what a write raises, which then is still to be run."""
        while self._done < len(self._steps):
            self._steps[self._done].write()
            self._done += 1
