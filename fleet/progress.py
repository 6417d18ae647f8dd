"""What is shown while a batch runs: one bar over all frames with rate and time left, and a line a worker."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal


@dataclass
class Seen:
    """How far a batch is: frames that finished rows have, rows by outcome, and what each worker does."""

    frames: int = 0  # of all rows together
    rows: int = 0
    done: int = 0  # frames of finished rows
    finished: int = 0
    bad: int = 0
    under_way: dict[str, list[tuple[str, float, int]]] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)  # workers that run nothing, and why

    @property
    def now(self) -> float:
        """Frames that there are, those of rows under way among them."""
        return self.done + sum(there for rows in self.under_way.values() for _, there, _ in rows)

    def lines(self) -> list[str]:
        """A line a worker."""
        names = sorted({*self.under_way, *self.waits}, key=lambda name: (len(name), name))
        return [f"{name}: {self._doing(name)}" for name in names]

    def _doing(self, name: str) -> str:
        rows = self.under_way.get(name) or []
        return ", ".join(f"{row} {there:.0f} of {of} frames" for row, there, of in rows) or self.waits.get(
            name, "waits"
        )


class Shown:
    """Draws what is seen; for a `with` block. Nothing at all with `quiet`."""

    def __init__(self, seen: Seen, quiet: bool = False) -> None:
        self.seen, self._console = seen, Console(highlight=False)
        self._quiet, self._started, self._told = quiet, time.monotonic(), 0.0
        self._first = -1.0  # frames that were there when the clock began
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.completed:.0f} of {task.total:.0f} frames"), BarColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True), speed_estimate_period=600,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=max(1, seen.frames), rate="")

    def __enter__(self) -> Shown:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=2, get_renderable=self._draw)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A sentence that stays."""
        if self._live is not None:
            self._console.print(Text(text))
        elif not self._quiet:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def update(self) -> None:
        """Look at `seen` again."""
        now = time.monotonic()
        if self._first < 0:
            self._first = self.seen.now
        self._bar.update(self._task, completed=self.seen.now, rate=self._rate(), total=max(1, self.seen.frames))
        if self._live is None and now - self._told > PLAIN_EVERY and not self._quiet:
            self._told = now
            told = f"[{now - self._started:.0f} s] {self.seen.now:.0f} of {self.seen.frames} frames{self._left()}; {self._rows()}"
            self.say("; ".join([told, *self.seen.lines()]))

    def _rows(self) -> str:
        bad = f", {self.seen.bad} not" if self.seen.bad else ""
        return f"{self.seen.finished} of {self.seen.rows} rows finished{bad}"

    def _speed(self) -> float:
        return max(0.0, self.seen.now - self._first) / max(1e-6, time.monotonic() - self._started)

    def _rate(self) -> str:
        return f"{self._speed():.1f} frames/s, {self._rows()}"

    def _left(self) -> str:
        speed = self._speed()
        return f", {speed:.1f} frames/s, {(self.seen.frames - self.seen.now) / speed:.0f} s left" if speed > 0 else ""

    def _draw(self) -> Group:
        return Group(self._bar, *(Text("  " + line, overflow="ellipsis", no_wrap=True) for line in self.seen.lines()))
