"""All injections of all combinations, in several processes, kept as they come; their table.

python3 run.py faults                       everything; what an earlier call has done with the same code is kept
python3 run.py faults --sample 2000         so many of all injections, picked by --seed
python3 run.py faults --only "ema, host"    combinations with this in their name
python3 run.py faults --only "..." --at "before 123"   one injection alone, with what it leaves
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .combinations import Combination, combinations, refusals
from .trial import GOOD, MODES, REFUSED, UNREADABLE, WRONG, Trial

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / ".cache" / "faults"
TABLE = ROOT / "benchmarks" / "results" / "faults.md"
SHOWN = 200  # lines of failures below the table


def sample(count: int, seed: int, trials: dict[Combination, Trial]) -> list[tuple[Combination, str, int]]:
    """`count` injections of all that there are, spread evenly over combinations and, within each, over modes."""
    luck, picked = random.Random(seed), []
    names = list(trials)
    luck.shuffle(names)
    for i in range(count):
        combination, mode = names[i % len(names)], MODES[i // len(names) % len(MODES)]
        numbers = [n for m, n in trials[combination].injections() if m == mode]
        picked.append((combination, mode, luck.choice(numbers)))
    return picked


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def code() -> str:
    """A digest of all that decides what an injection leaves: the core and the harness."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=12)
    for folder in ("adastate_core", "tests/core/faults"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def row(combination: Combination, injections: list[tuple[str, int]] | None, seed: int) -> dict[str, Any]:
    """The counts of a combination, all of its injections if none are named, and what was not good."""
    torch.set_num_threads(1)
    started, trial = time.monotonic(), Trial(combination, seed)
    counts: dict[str, Counter] = {mode: Counter() for mode in MODES}
    bad = []
    for mode, n in trial.injections() if injections is None else injections:
        outcome = trial.run(mode, n)
        counts[mode][outcome.verdict] += 1
        if outcome.verdict in (WRONG, UNREADABLE):
            bad.append([mode, n, trial.operations[n].name, outcome.verdict, outcome.why])
    return {
        "name": combination.name,
        "operations": len(trial.operations),
        "counts": counts,
        "bad": bad,
        "seconds": round(time.monotonic() - started, 1),
    }


def refusal(combination: Combination, sides: tuple[str, str]) -> str:
    """The sentence that refuses a combination; AssertionError if it is taken, or a side is not named."""

    from .combinations import WORDS

    try:
        combination.spec(combination.model())
    except ValueError as error:
        for side in sides:
            assert any(word in str(error) for word in WORDS[side]), f"{side} is not named in: {error}"
        return str(error)
    raise AssertionError(f"{sides[0]} with {sides[1]} is taken")


def table(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """Markdown: a line a combination, their sum, and what was not good."""
    lines = [
        "| combination | operations | failed | wrong | unreadable | refused |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    total: Counter = Counter()
    for one in rows:
        seen = Counter()
        for counts in one["counts"].values():
            seen.update(counts)
        total.update(seen, operations=one["operations"])
        lines.append(_line(one["name"], one["operations"], seen))
    lines.append(_line("all", total["operations"], total))
    bad = [line for one in rows for line in failures(one)]
    if bad:
        lines += ["", *bad[:SHOWN], *([f"- and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else [])]
    return "\n".join([*notes, "", *lines]) + "\n"


def failures(one: dict[str, Any]) -> list[str]:
    """A line for each kind of failure of a combination: how often, and the first of them."""
    kinds: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for mode, n, name, word, why in one["bad"]:
        kinds.setdefault((mode, word, re.sub(r"[0-9.]+(e-?[0-9]+)?$", "...", why)), []).append((n, name))
    said = [f"- {one['name']}: {sentence}" for sentence in one.get("said", [])]
    return said + [
        f"- {one['name']}: {len(found)} {word}, the first is `{mode} {found[0][0]}` ({found[0][1]}): {why}"
        for (mode, word, why), found in kinds.items()
    ]


def _line(name: str, operations: int, seen: Counter) -> str:
    failed = sum(seen[word] for word in (GOOD, WRONG, UNREADABLE, REFUSED))
    return f"| {name} | {operations:,} | {failed:,} | {seen[WRONG]:,} | {seen[UNREADABLE]:,} | {seen[REFUSED]:,} |"


def _kept(combination: Combination, seed: int, version: str) -> Path:
    return KEPT / f"{combination.name.replace(', ', '-').replace(' ', '_')}-{seed}-{version}.json"


def sweep(chosen: list[Combination], seed: int, jobs: int, fresh: bool) -> list[dict[str, Any]]:
    """A row a combination. What is in .cache/faults of the same code is not done again."""
    version, rows = code(), {}
    KEPT.mkdir(parents=True, exist_ok=True)
    for combination in chosen:
        if not fresh and (path := _kept(combination, seed, version)).is_file():
            rows[combination] = json.loads(path.read_text())
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(row, one, None, seed): one for one in chosen if one not in rows}
        for done in concurrent.futures.as_completed(running):
            combination = running[done]
            rows[combination] = one = done.result()
            path = _kept(combination, seed, version)
            path.with_suffix(".tmp").write_text(json.dumps(one))
            os.replace(path.with_suffix(".tmp"), path)
            say(f"{len(rows)} of {len(chosen)}: {one['name']}: {summary(one)}, {one['seconds']} s")
    return [rows[combination] for combination in chosen]


def summary(one: dict[str, Any]) -> str:
    """A row in words, mode by mode."""
    return "; ".join(f"{mode} " + ", ".join(f"{n} {word}" for word, n in counts.items())
                     for mode, counts in one["counts"].items() if counts)  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command; 1 if anything was wrong or unreadable."""
    parser = argparse.ArgumentParser(
        prog="run.py faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="so many injections of all combinations instead of all")
    parser.add_argument("--seed", type=int, default=0, help="picks the sample and what is raised")
    parser.add_argument("--only", default="", help="combinations with this in their name")
    parser.add_argument("--at", help='one injection, as failures name it: "before 123"')
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="do again what was done before with the same code")
    parser.add_argument("--row", type=Path, help="a file with the row of what was failed elsewhere, for the table")
    parser.add_argument("--table", type=Path, help=f"where the table goes (all of it: {TABLE.relative_to(ROOT)})")
    options = parser.parse_args(arguments)
    every = combinations()
    chosen = [c for c in every if c.name == options.only] or [c for c in every if options.only in c.name]
    if not chosen:
        parser.error(
            f"no combination has {options.only!r} in its name; there are: {'; '.join(c.name for c in combinations())}"
        )
    torch.set_num_threads(1)
    started = time.monotonic()
    for combination, sides in refusals():
        say(f"refused: {sides[0]} with {sides[1]}: {refusal(combination, sides)}")
    if options.at:
        mode, _, n = options.at.rpartition(" ")
        trial = Trial(chosen[0], options.seed)
        outcome = trial.run(mode, int(n))
        say(f"{chosen[0].name}: {options.at} ({trial.operations[int(n)].name}): {outcome.verdict} {outcome.why}")
        return int(outcome.verdict in (WRONG, UNREADABLE))
    if options.sample is None:
        rows = sweep(chosen, options.seed, options.jobs, options.fresh)
    else:
        picked = sample(options.sample, options.seed, {one: Trial(one, options.seed) for one in chosen})
        rows = [row(one, [(m, n) for c, m, n in picked if c == one], options.seed) for one in chosen]
    if options.row is not None and options.row.is_file():
        rows.append(json.loads(options.row.read_text(encoding="utf-8")))
    whole = options.sample is None and not options.only
    seconds = time.monotonic() - started
    text = table(rows, notes(options, seconds))
    say(text)
    if path := options.table or (TABLE if whole else None):
        path.write_text(text)
    return int(any(one["bad"] or one.get("said") for one in rows))


def notes(options: argparse.Namespace, seconds: float) -> list[str]:
    """What the table is of."""
    part = "all operations" if options.sample is None else f"{options.sample} operations"
    return [
        "# Fault injection",
        "",
        f"`python3 run.py faults`, seed {options.seed}, {part}, torch {torch.__version__}, {seconds / 60:.0f} minutes. Every "
        "torch operation of one chunk fails once before it ran; each that writes in place fails also after it ran, a second "
        "time in a row (`twice`), and together with an operation of the snapshot that follows. Then the run goes on: with the "
        "same rollout, a new one, and one from the file. `wrong`: other latents, or other states after them; `unreadable`: no "
        "snapshot, or none to go on from; `refused`: a copy failed twice and the snapshot names its layer.",
    ]
