"""What a check found, and checks run one after the other."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..host.safely import Interrupted, free_memory, log, reason

OK, DIFFERS, FAILED = VERDICTS = ("ok", "differs", "failed")
# anything from a drive, a root with two parts or a home on, up to what ends a path in a sentence
_PATH = re.compile(r"(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|(?<![\w.])/(?=[^\s/]+/))[^\s'\",;:()]*")
_LONGEST = 240


@dataclass(frozen=True)
class Outcome:
    """One of VERDICTS, and what was seen, in a few words."""

    verdict: str
    seen: str


@dataclass(frozen=True)
class Check:
    """A named check; `run` is given the bench."""

    name: str
    run: Callable[[Any], Outcome] = field(repr=False)


@dataclass(frozen=True)
class Row:
    """A check's line of the table."""

    name: str
    outcome: Outcome
    seconds: float


def judged(parts: Iterable[tuple[bool, str]]) -> Outcome:
    """The outcome of several things that were looked at, each (as it must be, what was seen). What differs is told first."""
    found = sorted(parts, key=lambda part: part[0])
    return Outcome(OK if all(good for good, _ in found) else DIFFERS, "; ".join(seen for _, seen in found))


def run_checks(checks: Iterable[Check], bench: Any) -> Iterator[Row]:
    """Each check's row as it is done. What one raises is its own row alone; the host's interrupt is raised."""
    for check in checks:
        start = time.perf_counter()
        try:
            outcome = check.run(bench)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001  whatever a card or a driver may raise is what is looked for
            log.exception("AdaState Self Test: %s failed", check.name)
            outcome = Outcome(FAILED, f"{type(error).__name__}: {reason(error, _LONGEST)}")
        free_memory()
        seconds = max(0.0, time.perf_counter() - start)
        yield Row(check.name, Outcome(outcome.verdict, without_user(outcome.seen)), seconds)


def without_user(text: str) -> str:
    """A sentence without paths, and without the name of who runs the host."""
    text = _PATH.sub("<path>", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a system that has no name for who runs this
        user = ""
    return re.sub(rf"\b{re.escape(user)}\b", "<user>", text) if len(user) > 2 else text


def table(head: list[str], rows: list[Row]) -> str:
    """Text to be pasted: the count, what it was run on, and a Markdown table with a line for each check."""
    good = sum(row.outcome.verdict == OK for row in rows)
    seconds = sum(row.seconds for row in rows)
    lines = [f"AdaState Self Test: {good} of {len(rows)} ok, {seconds:.0f} s", *head, ""]
    cells = [("check", "result", "what was seen")]
    cells += [(row.name, row.outcome.verdict, row.outcome.seen.replace("|", "/")) for row in rows]
    first, second = (max(len(cell[i]) for cell in cells) for i in range(2))
    for number, (name, verdict, seen) in enumerate(cells):
        lines.append(f"| {name:{first}} | {verdict:{second}} | {seen} |")
        if not number:
            lines.append(f"| {'-' * first} | {'-' * second} | --- |")
    return "\n".join(lines)
