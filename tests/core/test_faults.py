"""A sample of the fault injection (faults/; all of it: python3 run.py faults): what fails in a chunk loses nothing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from faults.combinations import DIMENSIONS, WORDS, combinations, refusals, refused
from faults.pairs import pairwise
from faults.trial import MODES, UNREADABLE, WRONG, Trial
from tiny_model import TinyModel

SEED, EACH, QUICK = 0, 1, 6  # injections of a mode in every combination; combinations of the quick tier


def marked() -> list:
    """All combinations, of which a seeded few are of the quick tier."""
    every = combinations()
    quick = random.Random(SEED).sample(every, QUICK)
    return [pytest.param(one, id=one.name, marks=[pytest.mark.quick] if one in quick else []) for one in every]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny operations: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("combination", marked())
@pytest.mark.sampled(2)
def test_an_operation_that_fails_loses_nothing(combination):
    trial, luck = Trial(combination, SEED), random.Random(f"{SEED}/{combination.name}")
    injections = trial.injections()
    found = []
    for mode in MODES:
        for n in sorted(luck.sample([n for m, n in injections if m == mode], EACH)):
            outcome = trial.run(mode, n)
            if outcome.verdict in (WRONG, UNREADABLE):
                again = f'python3 run.py faults --only "{combination.name}" --at "{mode} {n}" --seed {SEED}'
                found.append(f"{trial.operations[n].name} {outcome.verdict}: {outcome.why}; again: {again}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("combination", "sides"), refusals(), ids=str)
def test_what_does_not_go_together_is_refused_by_both_names(combination, sides):
    with pytest.raises(ValueError) as caught:
        combination.spec(TinyModel())
    for side in sides:
        assert any(word in str(caught.value) for word in WORDS[side])


@pytest.mark.parametrize("absorption", DIMENSIONS["absorption"])
def test_the_chunk_that_fails_is_in_the_phase_that_its_name_says(absorption):
    for combination in combinations():
        if combination.absorption == absorption and combination.absorbed() is not None:
            trial = Trial(combination)
            rollout = trial.rollout()
            next(rollout.chunks(trial.length))
            before, after = trial.before.absorption, rollout.snapshot().absorption
            phases = {"switching": ("warming", "switched"), "switched": ("switched", "switched")}
            assert (before["phase"], after["phase"]) == phases.get(absorption, ("warming", "warming"))
            if combination.transition == "flush" or combination.starting:  # then there is no history to look at
                continue
            if absorption == "switched":
                assert len(after["watched"]) > len(before["watched"])
            elif absorption == "none or warming":
                assert after["collector.chunks"] > before["collector.chunks"]


def test_every_allowed_pair_of_values_is_in_a_combination():
    values = [(name, value) for name, options in DIMENSIONS.items() for value in options]
    held = [set(vars(one).items()) for one in combinations()]
    for a, b in itertools.combinations(values, 2):
        if a[0] != b[0]:
            assert any({a, b} <= one for one in held) != refused(a, b), (a, b)
    assert len(held) < 90
    assert pairwise(DIMENSIONS, refused) == pairwise(DIMENSIONS, refused)
