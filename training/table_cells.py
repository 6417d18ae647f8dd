"""Figures as a table tells them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .evaluate import interval

# an interval of fewer streams says nothing
FEWEST = 6


def cell(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Mean and interval of what could be told; a dash where there is nothing, and no interval of fewer than FEWEST."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    mean, low, high = (form.format(v) for v in interval(known))
    return mean if len(known) < FEWEST else f"{mean} ({low} to {high})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
