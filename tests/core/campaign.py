"""A pytest plugin: trials by the thousand, of which the suite runs a seeded few and `python3 run.py campaign` all.

A file `test_campaign_NAME.py` of any layer is a part of the campaign. Its tests ask the fixture `campaign` for trials:

    def test_kills(campaign):
        for trial in campaign("kill -9 of a child process", full=160, sample=4):
            with trial:
                seconds = trial.chance.uniform(0, 2)
                ...
                trial.saw(frames=frames)

In the suite a trial that fails is the test's failure. With ADASTATE_CAMPAIGN, a folder, every trial runs and leaves a line in
FOLDER/NAME.jsonl, whether it held or not; those that held before are not run again, so it may be stopped and goes on; the test
fails at its end if one did not hold. ADASTATE_CAMPAIGN_SEED draws other trials; ADASTATE_CAMPAIGN_ONLY="KIND NUMBER" runs that one
alone, as a test would. ADASTATE_CAMPAIGN_KINDS, a file, gets a line for every kind that was asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

PREFIX = "test_campaign_"


class Trial:
    """One thing that is tried, for a `with` block: its number, its own luck, and what was seen of it."""

    def __init__(self, kind: str, number: int, seed: int, books: Books | None) -> None:
        self.kind, self.number, self.seed, self._books = kind, number, seed, books
        self.chance = random.Random(f"{seed}/{kind}/{number}")
        self._seen: dict[str, float] = {}
        self._started = 0.0

    def saw(self, **figures: float) -> None:
        """Keep figures, those of numpy and torch as well; the campaign's table shows the least and the largest of each name."""
        self._seen |= {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}

    def __enter__(self) -> Trial:
        self._started = time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        # what `pytest.raises` has when nothing was raised is no Exception; what is neither is Ctrl-C or a skip
        if error is not None and not isinstance(error, Exception | pytest.fail.Exception):
            return False
        if self._books is None:
            if error is not None and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"campaign: seed {self.seed}, {self.kind!r}, trial {self.number}")
            return False
        self._books.add(self, time.monotonic() - self._started, self._seen, error)
        return True


class Books:
    """What the trials of one part left, a line each."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed, self.broken = path, seed, []
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._cut = text[-1:] not in ("", "\n")  # by a kill in the middle of a line
        self._held = {
            (line["kind"], line["number"]): line["held"] for line in whole_lines(text) if line["seed"] == seed
        }

    def held(self, kind: str, number: int) -> bool:
        """Whether it did when it was tried last."""
        return self._held.get((kind, number), False)

    def add(self, trial: Trial, seconds: float, seen: dict[str, float], error: BaseException | None) -> None:
        line = {"kind": trial.kind, "number": trial.number, "seed": self.seed, "held": error is None,
                "seconds": round(seconds, 3), "seen": seen}  # fmt: skip
        if error is not None:
            line["why"] = f"{type(error).__name__}: {error}"[:2000]
            self.broken.append(f"{trial.kind} {trial.number}: {line['why'][:300]}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut + json.dumps(line) + "\n")
        self._cut = False


def whole_lines(text: str) -> list[dict]:
    """The lines of a part's books, less one that a kill cut short."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class Campaign:
    """Gives out trials of one part."""

    def __init__(self, books: Books | None, seed: int, only: str = "") -> None:
        self.books, self.seed, self.only = books, seed, only

    def __call__(self, kind: str, full: int, sample: int) -> Iterator[Trial]:
        """`full` trials in a campaign, less those that held before; in the suite `sample` of them, spread evenly. ValueError
        for a kind's name that would break the table."""
        if "|" in kind or "\n" in kind:
            raise ValueError(f"{kind!r} has a line's end or a |, which a row of the table cannot hold")
        self._tell(kind, full)
        if self.only:
            wanted, _, number = self.only.rpartition(" ")
            yield from [Trial(kind, int(number), self.seed, None)] if wanted == kind and int(number) < full else []
            return
        if self.books is None:
            sample = min(sample, full)
            yield from (Trial(kind, n * full // sample, self.seed, None) for n in range(sample))
            return
        left = [number for number in range(full) if not self.books.held(kind, number)]
        told = time.monotonic()
        for done, number in enumerate(left):
            if done and time.monotonic() - told > 20:
                told = time.monotonic()
                place = f"{full - len(left) + done} of {full}, {len(self.books.broken)} did not hold"
                sys.__stderr__.write(f"{kind}: {place}\n")
                sys.__stderr__.flush()
            yield Trial(kind, number, self.seed, self.books)

    @staticmethod
    def _tell(kind: str, full: int) -> None:
        if kinds := os.environ.get("ADASTATE_CAMPAIGN_KINDS"):
            with Path(kinds).open("a", encoding="utf-8") as file:
                file.write(json.dumps([kind, full]) + "\n")


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """Trials: a seeded few, or all of them (this module's text)."""
    folder, seed = os.environ.get("ADASTATE_CAMPAIGN"), int(os.environ.get("ADASTATE_CAMPAIGN_SEED", "0"))
    books = Books(Path(folder, f"{request.path.stem.removeprefix(PREFIX)}.jsonl"), seed) if folder else None
    yield Campaign(books, seed, os.environ.get("ADASTATE_CAMPAIGN_ONLY", ""))
    if books is not None and books.broken:
        pytest.fail(f"{len(books.broken)} trials did not hold:\n" + "\n".join(books.broken[:20]), pytrace=False)
