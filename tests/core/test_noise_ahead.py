"""The next chunk's noise is drawn while the clean pass runs: the same numbers as drawn in its turn, whatever happens between."""

from __future__ import annotations

import pytest
import torch
from systems_fast import latents_of
from test_rollout import ANCHORS, SCHEDULE, spec_for
from tiny_model import TinyModel

from adastate_core.rollout import Rollout, Settings
from adastate_core.schedules.noise import NoiseAhead
from adastate_core.schedules.schedule import Schedule

FIRST = Schedule((0.9, 0.6, 0.3), first_sigmas=(0.9, 0.4))
CASES = {
    "plain": (SCHEDULE, "none", None),
    "state": (SCHEDULE, "adaptive1", None),
    "first sigmas": (FIRST, "none", None),
    "first noise": (SCHEDULE, "none", torch.randn(1, 4, 7, 4, 6, generator=torch.Generator().manual_seed(3))),
}


def made(case: str, state=None) -> Rollout:
    schedule, anchor, first = CASES[case]
    model = TinyModel()
    return Rollout(model, spec_for(model, anchor=ANCHORS[anchor]), Settings(7, schedule, first), state=state)


def whole(case: str, length: int, monkeypatch) -> torch.Tensor:
    """The latents of a rollout that draws every chunk's noise in its turn."""
    with monkeypatch.context() as patch:
        patch.setattr(NoiseAhead, "prepare", lambda *_: None)
        return latents_of(made(case), length)


def watched(rollout: Rollout) -> list[tuple[int, bool]]:
    """(chunk, whether its turn had come) of every draw."""
    drawn, draw = [], rollout._noise.draw

    def draw_and_tell(chunk: int, steps: int) -> torch.Tensor:
        drawn.append((chunk, chunk == rollout.generated))
        return draw(chunk, steps)

    rollout._noise.draw = draw_and_tell
    return drawn


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_noise_drawn_in_its_turn(case, monkeypatch):
    """In one go; asked for more than once; and from a state."""
    expected = whole(case, 15, monkeypatch)
    assert torch.equal(latents_of(made(case), 15), expected)
    again = made(case)
    assert torch.equal(torch.cat([latents_of(again, length) for length in (6, 9, 15)], 2), expected)
    first = made(case)
    parts = [latents_of(first, 6)]
    assert torch.equal(torch.cat([*parts, latents_of(made(case, first.snapshot()), 15)], 2), expected)


def test_each_chunk_is_drawn_once_ahead_and_none_that_nobody_asked_for():
    rollout = made("plain")
    drawn = watched(rollout)
    latents_of(rollout, 12)
    assert drawn == [(0, True), (1, False), (2, False), (3, False)]
    latents_of(rollout, 15)
    assert drawn[4:] == [(4, True)]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_draw_that_fails_costs_its_chunk_and_nothing_else(error, monkeypatch):
    """The chunk under way is made again, from the rollout itself and from its state, with the bits of the whole."""
    expected = whole("state", 12, monkeypatch)
    rollout = made("state")
    latents_of(rollout, 3)
    draw = rollout._noise.draw

    def fail(chunk: int, steps: int) -> torch.Tensor:
        if chunk == 2:
            raise error
        return draw(chunk, steps)

    rollout._noise.draw = fail
    with pytest.raises(error):
        latents_of(rollout, 12)  # in the clean pass of chunk 1
    assert rollout.emitted == 3
    state = rollout.snapshot()
    rollout._noise.draw = draw
    assert torch.equal(latents_of(rollout, 12), expected[:, :, 3:])
    assert torch.equal(latents_of(made("state", state), 12), expected[:, :, 3:])


def test_an_interrupt_between_two_passes_leaves_what_was_drawn_for_the_same_chunk():
    rollout = made("plain")
    expected = latents_of(made("plain"), 12)
    parts, stop = [latents_of(rollout, 3)], [True]

    def interrupt(chunk: int, step: int, steps: int, x0) -> None:
        if chunk == 1 and step == 1 and stop.pop():
            raise KeyboardInterrupt

    rollout.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        latents_of(rollout, 12)
    rollout.on_step = None
    assert torch.equal(torch.cat([*parts, latents_of(rollout, 12)], 2), expected)


def test_noise_held_for_another_chunk_or_number_of_steps_is_not_used():
    ahead = NoiseAhead(lambda chunk, steps: torch.full((steps,), float(chunk)))
    ahead.prepare(3, 2)
    assert ahead.take(4, 2).tolist() == [4.0, 4.0]
    ahead.prepare(3, 2)
    assert ahead.take(3, 1).tolist() == [3.0]
    assert ahead.take(3, 2).tolist() == [3.0, 3.0]
