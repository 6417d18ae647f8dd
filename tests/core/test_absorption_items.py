"""A batch with absorption against its items rolled out one by one; states and solutions of one item, of a batch, and of before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_absorption import absorbed_spec
from test_rollout import SCHEDULE, roll
from tiny_model import TinyModel

from adastate_core import rollout as rollout_module
from adastate_core.absorption.saved import load_solution, save_solution, solution_from, solution_state
from adastate_core.anchors import AnchorAdaptive, AnchorStatic
from adastate_core.rollout import Rollout, Settings
from adastate_core.schedules.noise import noise
from adastate_core.states.state_file import load_state, save_state

ANEW = dict(ratio=0.5, monitor_layers=-1, monitor_chunks=2, refresh="always")


@pytest.fixture
def items(monkeypatch):
    """Which videos are rolled out: each has its own noise, whichever batch it is in."""
    wanted = [0, 1]

    def each(seed, chunk, step, shape, state=False):
        own = [noise(seed + 100 * item, chunk, step, (1, *shape[1:]), state) for item in wanted]
        return torch.cat(own)

    monkeypatch.setattr(rollout_module, "noise", each)
    return wanted


def of_batch(spec, batch):
    return replace(spec, batch=batch)


@pytest.mark.parametrize(
    ("scope", "anchor", "more"),
    [
        ("head", AnchorStatic(1), ANEW | {"refresh": "drift", "drift": 1.0}),
        ("layer", AnchorAdaptive(1), ANEW),
        ("lowrank", AnchorStatic(1), {"ratio": 1.0, "rank": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_is_its_items_rolled_out_one_by_one(items, scope, anchor, more):
    """semantics: Absorption: a batch."""
    model, found = TinyModel(), []
    spec = absorbed_spec(model, anchor, window=18, scope=scope, **more)
    both, whole, _ = roll(model, of_batch(spec, 2), 30)
    same = whole.absorber.solution.chosen
    fixed = replace(spec.absorption, select="saved", saved_layers=same)
    for item in (0, 1):
        items[:] = [item]
        single, rollout, _ = roll(model, replace(spec, absorption=fixed), 30)
        torch.testing.assert_close(both[item : item + 1], single, atol=1e-4, rtol=1e-4)
        found.append(rollout.absorber)
    solved, singles = whole.absorber.solution.fits, [one.solution.fits for one in found]
    for layer, fit in solved.items():
        assert [ridge for ridge, _, _ in fit.items] == [fits[layer].ridge for fits in singles]
        assert fit.residual == pytest.approx(sum(fits[layer].residual for fits in singles) / 2, rel=1e-3, abs=1e-6)
        if layer in same:
            assert not torch.allclose(*fit.correction.constant, atol=1e-3), "two videos, two corrections"
    watched = [absorber.report()["monitor"] for absorber in found]
    for entry, *each in zip(whole.absorber.report()["monitor"], *watched, strict=True):
        assert entry["refreshed"] == any(one["refreshed"] for one in each)
        assert entry["items"] == pytest.approx([one["residual"] for one in each], rel=1e-3, abs=1e-6)


def test_the_layers_of_a_batch_are_chosen_by_the_mean_over_its_items(items):
    model, changes = TinyModel(layers=4), []
    spec = absorbed_spec(model)
    _, whole, _ = roll(model, of_batch(spec, 2), 12)
    for item in (0, 1):
        items[:] = [item]
        changes.append(roll(model, spec, 12)[1].absorber.solution.changes)
    for layer, change in whole.absorber.solution.changes.items():
        assert change == pytest.approx((changes[0][layer] + changes[1][layer]) / 2, rel=1e-3)


@pytest.mark.parametrize("stop", [9, 21])
def test_a_resumed_batch_goes_on_bit_for_bit(stop, tmp_path):
    model = TinyModel()
    spec = of_batch(absorbed_spec(model, window=18, **ANEW), 2)
    straight, whole, _ = roll(model, spec, 27)
    first, rollout, _ = roll(model, spec, stop)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "a.safetensors"))
    second, resumed, _ = roll(model, spec, 27, state=state)
    assert torch.equal(torch.cat([first, second], 2), straight)
    found, told = resumed.absorber.report(), whole.absorber.report()
    assert found["monitor"] == told["monitor"] != [] and found["residuals"] == told["residuals"]
    assert len(told["residuals"][0]["items"]) == 2 and told["residuals"][0]["change"] > 0


@pytest.mark.parametrize("stop", [9, 15])
def test_a_batch_of_before_goes_on_with_one_correction_for_all(stop):
    """States of before do not say how many items their statistics are of: all rows are together."""
    model = TinyModel()
    spec = of_batch(absorbed_spec(model, window=18, select="residual", ratio=1.0), 2)

    def before(state=None):
        rollout = Rollout(model, spec, Settings(7, SCHEDULE), state=state)
        if state is None:
            rollout.absorber.resume_collecting(1, {"chunks": 0})
        return rollout

    straight = torch.cat([chunk.latents for chunk in before().chunks(21)], 2)
    old = before()
    first = torch.cat([chunk.latents for chunk in old.chunks(stop)], 2)
    state = old.snapshot()
    assert "items" not in state.absorption
    on = before(state)
    assert torch.equal(torch.cat([first, *(chunk.latents for chunk in on.chunks(21))], 2), straight)
    correction = on.absorber.solution.fits[0].correction
    assert correction.constant.dim() == 1 and not on.absorber.solution.fits[0].items
    planned = [phase.absorption_bytes for phase in spec.plan(resumed=state).phases]
    assert (
        planned
        == [phase.absorption_bytes for phase in replace(spec, batch=1).plan(resumed=None).phases][-len(planned) :]
    )


def test_a_solution_of_one_video_is_for_any_batch_and_one_of_a_batch_for_that_batch(tmp_path):
    model = TinyModel()
    spec, sizes = absorbed_spec(model), (2, 24, 2)
    alone, pair = (roll(model, of_batch(spec, batch), 12)[1].absorber.solution for batch in (1, 2))
    save_solution(pair, spec.absorption, {}, tmp_path / "a.safetensors")
    settings, _, state = load_solution(tmp_path / "a.safetensors")
    loaded = solution_from(state, settings, *sizes, 2)
    assert loaded.changes == pair.changes and loaded.fits[0].items == pair.fits[0].items
    with pytest.raises(ValueError, match="items are of a batch of 2, not of 3"):
        solution_from(state, settings, *sizes, 3)
    one = solution_from(solution_state(alone), settings, *sizes, 3)
    rollout = Rollout(model, of_batch(spec, 3), Settings(7, SCHEDULE), solution=one)
    list(rollout.chunks(15))
    layer = one.chosen[0]
    assert torch.equal(rollout.absorber.corrections.standing[layer].constant, one.fits[layer].correction.constant)


def test_moments_and_corrections_are_planned_times_the_batch():
    spec = absorbed_spec(TinyModel(), window=30)
    one, four = (of_batch(spec, batch).plan() for batch in (1, 4))
    assert [p.absorption_bytes for p in four.phases] == [4 * p.absorption_bytes for p in one.phases]
    assert four.with_batch(1) == one
    assert four.total_bytes > four.with_batch(3).total_bytes > one.total_bytes
