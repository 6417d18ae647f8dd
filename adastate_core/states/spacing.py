"""When the states that a run saves of itself are due: as often as they are cheap, never too near and never too far apart."""

from __future__ import annotations

import time
from typing import Any

# what copying and writing them may take of the run's time
SHARE = 0.01
# seconds after which one is due whatever it takes
FURTHEST = 600.0


class Spacing:
    """The autosaves of one run, of which the first is due `least` seconds after its start; none is with 0.

    The next one is due when it and all before it, should it take what the newest took, are no more than SHARE of the run's time
    so far. But never sooner than `least` seconds after the one before, and never later than FURTHEST, or `least` if that is more.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self.count = 0
        self._start = self._last = time.monotonic()
        self._end: float | None = None
        self._spent = self._newest = 0.0
        self._copying = 0.0
        self._told = least

    @property
    def apart(self) -> float:
        """Seconds from the newest one, or the start, to the next."""
        wanted = (self._spent + self._newest) / SHARE - (self._last - self._start)
        return min(max(wanted, self.least), max(FURTHEST, self.least))

    @property
    def due(self) -> bool:
        now = time.monotonic()
        self._last = min(self._last, now)  # after a clock that went ahead and came back they are as far apart as before
        return self.least > 0 and now - self._last >= self.apart

    def taken(self, seconds: float) -> None:
        """One was taken, or could not be: copying took so long."""
        seconds = self._copying = max(0.0, seconds)
        self._spent += seconds
        self._last = time.monotonic()

    def written(self, seconds: float, whole: bool) -> None:
        """The one that was taken last is written, or (not `whole`) could not be: that took so long."""
        seconds = max(0.0, seconds)
        self._spent += seconds
        self._newest = self._copying + seconds
        self.count += whole
        self._told = self.apart

    def passed_over(self) -> None:
        """One was due for which there is no room: the next is due as long after it as if it had been written."""
        self._last = time.monotonic()

    def end(self) -> None:
        """The run is over."""
        self._end = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """JSON-able: seconds from the newest that was written to the next (None where none are made on the way), how many were
        written, and what share of the run's time they took."""
        passed = (time.monotonic() if self._end is None else self._end) - self._start
        return {
            "seconds_apart": round(self._told, 3) if self.least else None,
            "count": self.count,
            "share": round(min(1.0, self._spent / passed), 5) if passed > 0 else 0.0,
        }
