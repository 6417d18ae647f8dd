"""Few combinations of many values, such that every allowed pair of values is in one of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Value = tuple[str, str]  # (dimension, value)
TRIES = 40  # candidates a combination is chosen from


def pairwise(
    dimensions: Mapping[str, Sequence[str]], refused: Callable[[Value, Value], bool], seed: int = 0
) -> list[dict[str, str]]:
    """Combinations {dimension: value} that together hold every pair of values which `refused` allows, and none that it
    does not. Greedy: of some random candidates around a missing pair, the one with the most missing pairs is taken. The
    same for the same arguments."""
    luck, chosen = random.Random(seed), []
    values = [(name, value) for name, options in dimensions.items() for value in options]
    missing = [(a, b) for a, b in itertools.combinations(values, 2) if a[0] != b[0] and not refused(a, b)]
    while missing:
        candidates = [_around(missing[0], dimensions, refused, set(missing), luck) for _ in range(TRIES)]
        best = max((c for c in candidates if c is not None), key=lambda c: sum(_holds(c, pair) for pair in missing))
        missing = [pair for pair in missing if not _holds(best, pair)]
        chosen.append({name: best[name] for name in dimensions})
    return chosen


def _holds(combination: Mapping[str, str], pair: tuple[Value, Value]) -> bool:
    return all(combination[name] == value for name, value in pair)


def _around(
    pair: tuple[Value, Value],
    dimensions: Mapping[str, Sequence[str]],
    refused: Callable[[Value, Value], bool],
    missing: set[tuple[Value, Value]],
    luck: random.Random,
) -> dict[str, str] | None:
    """A combination with `pair` in it; the other dimensions in random order, each with the value that brings most."""
    taken = list(pair)
    others = [name for name in dimensions if name not in dict(pair)]
    for name in luck.sample(others, len(others)):
        allowed = [(name, v) for v in dimensions[name] if not any(refused((name, v), one) for one in taken)]
        if not allowed:
            return None
        luck.shuffle(allowed)
        taken.append(max(allowed, key=lambda v: sum((v, one) in missing or (one, v) in missing for one in taken)))
    return dict(taken)
