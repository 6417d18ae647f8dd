"""Clocks that go ahead, come back or stand still: when states are due, and what is said of them."""

from __future__ import annotations

import pytest

from adastate_core.states import spacing


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(spacing, "time", made)
    return made


def test_a_clock_that_came_back_does_not_hold_states_back(clock):
    """Ahead by a day and back: the next one is due as long after the newest as it would have been."""
    states = spacing.Spacing(60.0)
    clock.now += 86_400
    assert states.due
    states.taken(0.01)
    states.written(0.01, True)
    clock.now -= 86_400
    assert not states.due
    clock.now += 59.0
    assert not states.due
    clock.now += 2.0
    assert states.due


def test_time_that_went_back_costs_nothing(clock):
    states = spacing.Spacing(60.0)
    states.taken(-5.0)
    states.written(-7.0, True)
    clock.now += 30.0
    told = states.describe()
    assert told == {"seconds_apart": 60.0, "count": 1, "share": 0.0}


def test_a_clock_that_stands_still_is_no_division_by_nothing(clock):
    states = spacing.Spacing(60.0)
    states.taken(1.0)
    assert states.describe()["share"] == 0.0 and not states.due
