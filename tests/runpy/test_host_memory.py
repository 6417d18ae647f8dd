"""How fast memory grows, with an interval that is honest about steps."""

from __future__ import annotations

import random

import pytest

from tools.host_memory import slope

XS = range(0, 9500, 20)


def series(kind: str, luck: random.Random) -> list[float]:
    level, out = 0.0, []
    for _ in XS:
        noise = luck.gauss(0, 1)
        level = {"independent": 0.0, "lasting": 0.97 * level, "a random walk": level}[kind] + noise
        out.append(level)
    return out


@pytest.mark.parametrize("kind", ["independent", "lasting", "a random walk"])
def test_the_interval_holds_what_it_promises(kind):
    """95 % of them, of what is level and of what rises."""
    for rise in (0.0, 0.5):
        good = 0
        for seed in range(200):
            found, half = slope(XS, [y + rise * x for x, y in zip(XS, series(kind, random.Random(seed)), strict=True)])
            good += abs(found - rise) <= half
        assert good >= 0.93 * 200, f"{kind}, {rise}: {good} of 200"


def test_a_line_has_its_slope_and_no_doubt():
    found, half = slope(XS, [3 + 0.25 * x for x in XS])
    assert found == pytest.approx(0.25) and half < 0.01
    steps = [1000.0 * (x > 5000) for x in XS]
    found, half = slope(XS, steps)
    assert 0.1 < found < 0.2 and half > 0.1, "one step is no rise that is sure"


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="too few samples for 10 batches: 9"):
        slope(range(9), range(9))
