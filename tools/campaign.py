"""What `python3 run.py campaign` runs, and the table that it writes into docs/campaign.md.

Parts are the files tests/LAYER/test_campaign_NAME.py; tests/core/campaign.py says how they count. A part's lines in the table are
written anew when it has run; those of the others stay. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tools.setup_host import ROOT, SetupError, duration

PREFIX = "test_campaign_"
PAGE = ROOT / "docs" / "campaign.md"
BEGIN, END = "<!-- campaign: table -->", "<!-- campaign: end of table -->"
HEAD = ("part", "what was tried", "tried", "held", "time", "seen")


def parts(tests: Path) -> dict[str, list[Path]]:
    """The files of every part, by its name: tests/LAYER/test_campaign_NAME.py."""
    found: dict[str, list[Path]] = {}
    for path in sorted(tests.glob(f"*/{PREFIX}*.py")):
        found.setdefault(path.stem.removeprefix(PREFIX), []).append(path)
    return found


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="run.py campaign", description="Try what breaks things, by the thousand; see docs/campaign.md."
    )
    out.add_argument("names", nargs="*", help="parts; all without any")
    out.add_argument("--seed", type=int, default=0, help="draw other trials")
    out.add_argument("--fresh", action="store_true", help="forget what was tried before")
    out.add_argument("--only", default="", metavar="'KIND NUMBER'", help="one trial alone, which fails as a test does")
    return out


def check_only(only: str) -> None:
    """SetupError for what is not `KIND NUMBER`."""
    kind, _, number = only.rpartition(" ")
    if not (kind and number.isdecimal()):
        raise SetupError(f"--only is {only!r}; it takes a trial as a failure names it: its kind, a space, its number.")


def check_found(only: str, kinds: Path) -> None:
    """SetupError if no part that ran has this trial: `kinds` has a line [kind, how many] for each that was asked for."""
    lines = kinds.read_text(encoding="utf-8").splitlines() if kinds.is_file() else []
    known, (kind, _, number) = dict(map(json.loads, lines)), only.rpartition(" ")
    if kind not in known:
        there = ", ".join(map(repr, known)) or "none, or their tests were skipped"
        raise SetupError(f"There is no kind of trials {kind!r} in what ran; there are: {there}.")
    if int(number) >= known[kind]:
        raise SetupError(f"There is no trial {number} of {kind!r}; there are 0 to {known[kind] - 1}.")


@dataclass
class Kind:
    """What is known of one kind of trials."""

    held: dict[int, bool] = field(default_factory=dict)
    seconds: float = 0.0
    seen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, line: dict) -> None:
        """The last word on a trial counts; all its tries took time."""
        self.held[line["number"]] = line["held"]
        self.seconds += line["seconds"]
        for name, value in line.get("seen", {}).items():
            self.seen.setdefault(name, []).append(value)

    def cells(self) -> list[str]:
        seen = [ranges(name, values) for name, values in self.seen.items()]
        return [f"{len(self.held):,}", f"{sum(self.held.values()):,}", duration(self.seconds), ", ".join(seen)]


def ranges(name: str, values: list[float]) -> str:
    """`name 3`, or `name 3 to 5`."""
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" for value in (min(values), max(values)))
    return f"{name.replace('_', ' ')} {low}" + (f" to {high}" if low != high else "")


def rows(part: str, lines: Iterable[str], seed: int) -> list[str]:
    """The table's lines of a part, a kind each, from what its trials left."""
    kinds: dict[str, Kind] = {}
    for text in lines:
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            line = json.loads(text)
            if line["seed"] == seed:
                kinds.setdefault(line["kind"], Kind()).add(line)
    return [f"| {' | '.join([part, kind, *found.cells()])} |" for kind, found in kinds.items()]


def written(page: str, part: str, new: list[str]) -> str:
    """The page with a part's lines put in place of those it had. ValueError for a page without the table's marks."""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks the marks {BEGIN} and {END}.")
    others = (line for line in table.splitlines() if line.startswith("| "))
    kept = [line for line in others if line.split(" | ")[0][2:] not in (part, HEAD[0], "---")]
    body = sorted([*kept, *new], key=lambda line: line.split(" | ")[0])  # stable: kinds stay in their order
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}", *body]
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"


def write_page(part: str, books: Path, seed: int) -> None:
    """Take what a part's trials left into docs/campaign.md."""
    if books.is_file():
        new = rows(part, books.read_text(encoding="utf-8").splitlines(), seed)
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), part, new), encoding="utf-8")
