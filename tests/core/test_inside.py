"""Start latents inside the first chunk: against the loop by hand, cut in every pass, in a file, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from slow_inside import InDouble, by_hand, renoise, two_steps
from test_rollout import W_PIXELS, H, spec_for
from test_state_files import changed, refusal
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic
from adastate_core.attention.fused_blocks import PassForm
from adastate_core.given import BEFORE, INSIDE, Held
from adastate_core.prompts.plan import NumberChange, PromptChange, PromptPlan
from adastate_core.rollout import Rollout, RolloutState, Settings
from adastate_core.schedules import schedule as schedules
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state

SCHEDULE = Schedule.shifted(2, 5.0)
FIRST = replace(SCHEDULE, first_sigmas=(1.0, 0.9, 0.5))


class Stop(Exception):
    pass


class TwoSteps:
    """Follows the velocity and the one before it; remembers what it is given."""

    def __init__(self, sigmas, noises) -> None:
        self.sigmas, self.start, self.before = (*sigmas, 0.0), noises[0], None

    def step(self, step, x, v):
        slope = v if self.before is None else 1.5 * v - 0.5 * self.before
        self.before, following = v, self.sigmas[step + 1]
        x0, x = x - self.sigmas[step] * v, x + (following - self.sigmas[step]) * slope
        return (x0, x) if following else (x, x)


@pytest.fixture(autouse=True)
def _multistep(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(schedules.SAMPLERS, "two_steps", TwoSteps)
    yield


def pictures(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, frames, H, W_PIXELS, generator=torch.Generator().manual_seed(3))


def start(spec, state: RolloutState | None = None, schedule: Schedule = SCHEDULE, **more) -> Rollout:
    return Rollout(TinyModel(), spec, Settings(7, schedule), state=state, **more)


def rolled(rollout: Rollout, length: int, given=None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given, INSIDE)], 2)


WARMING = AbsorptionSettings(warmup_frames=90, local_window_frames=2, sink_frames=1)
# what a rollout has: of its spec, how many frames are given, of how many, its schedule
CASES = {
    "one picture": ({}, 1, 14, SCHEDULE),
    "two frames, two videos, a sink": ({"anchor": AnchorStatic(4), "batch": 2}, 2, 14, SCHEDULE),
    "a state": ({"anchor": AnchorAdaptive(1), "positions": "fixed"}, 1, 11, SCHEDULE),
    "two state frames, a chunk of four": ({"anchor": AnchorAdaptive(2), "F": 4, "W": 5}, 3, 14, SCHEDULE),
    "other steps for the first chunk": ({"W": 4}, 2, 8, FIRST),
    "shorter than a chunk": ({"F": 4}, 1, 2, SCHEDULE),
    "a solver that remembers": ({"anchor": AnchorStatic(1), "W": 5}, 2, 11, Schedule.shifted(4, 5.0)),
    "a collecting absorption": ({"W": 8, "absorption": WARMING}, 1, 14, SCHEDULE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_by_hand(case):
    """semantics: Given frames."""
    more, frames, length, schedule = CASES[case]
    if remembers := case == "a solver that remembers":
        schedule = replace(schedule, sampler="two_steps")
    spec = spec_for(TinyModel(), **more)
    given = pictures(frames, spec.batch)
    found = rolled(start(spec, schedule=schedule), length, given)
    slow = by_hand(
        InDouble(TinyModel()), given, F=spec.chunk_frames, W=spec.window_frames, length=length, sigmas=schedule.sigmas,
        first=schedule.first_sigmas, sink=spec.anchor.frames - spec.anchor.state_frames, S=spec.anchor.state_frames,
        fixed=spec.positions == "fixed", sampler=two_steps if remembers else renoise,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), slow[:, :, :length], atol=2e-5, rtol=2e-5)
    assert torch.equal(found[:, :, :frames], given[:, :, :length])


class Told(TinyModel):
    """Remembers what each pass was over, what it was told, and by how many frames it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = []

    def velocity(self, x, timestep, attention):
        self.passes.append((x.clone(), timestep))
        return super().velocity(x, timestep, attention)


def test_what_each_pass_sees_and_is_told():
    """Two given frames behind a state of one: the state and the rest have the step's timestep, the clean pass has one for all, and
    from the second chunk on all is as ever."""
    model, given = Told(), pictures(2)
    spec = spec_for(model, F=4, anchor=AnchorAdaptive(1))
    shown = []
    rollout = Rollout(model, spec, Settings(7, SCHEDULE), on_step=lambda *told: shown.append(told[3]))
    chunks = list(rollout.chunks(8, given, INSIDE))
    high, low = (1000 * sigma for sigma in SCHEDULE.sigmas)
    of_first = [(t, 0.0, 0.0, t, t) for t in (high, low)]
    assert [told for _, told in model.passes] == [*of_first, 0.0, high, low, 0.0]
    assert all(torch.equal(x[:, :, 1:3], given) for x, _ in model.passes[:3])
    assert all(x0 is None or torch.equal(x0[:, :, 1:3], given) for x0 in shown[:3]) and shown[1] is not None
    forms = {(x.shape[2], len(told) if isinstance(told, tuple) else 1) for x, told in model.passes}
    assert forms == {(form.frames, form.timesteps) for form in spec.pass_forms(inside=True)}
    assert PassForm(5, 5, kept=False) not in spec.pass_forms()
    assert [(c.index, c.first_frame, c.given) for c in chunks] == [(0, 0, False), (1, 4, False)]


def test_it_counts_as_a_generated_chunk():
    """Its noise is that of chunk 0, an entry of a plan holds by its place in the video, and passes are counted so."""
    given, spec = pictures(2), spec_for(TinyModel())
    texts = [torch.randn(1, 3, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    plan = PromptPlan(
        [PromptChange(0, texts[0]), PromptChange(3, texts[1], "flush")], 3, [NumberChange(3, seed=9, strength=None)]
    )
    rollout = start(spec, prompts=plan)
    chunks = rollout.chunks(12, given, INSIDE)
    assert rollout.passes(12) == 4 * 3
    first = next(chunks)
    assert (rollout.generated, rollout.next_frame, rollout.frames_after(1), rollout.seed_of(1)) == (1, 3, 3, 9)
    assert rollout.passes(12) == 3 * 3 and first.latents.shape[2] == 3
    whole = torch.cat([first.latents, *(c.latents for c in chunks)], 2)
    again = start(spec, prompts=plan)
    assert torch.equal(rolled(again, 12, given), whole)
    # steered back to the chunk behind the first, and to before it
    kept = start(spec, prompts=plan)
    kept.on_step = _stop_at(0)
    with pytest.raises(Stop):
        rolled(kept, 12, given)
    before, kept.on_step = kept.snapshot(), None
    assert torch.equal(rolled(kept, 12), whole)
    undo = kept.go_back(before)
    assert kept.emitted == 0 and torch.equal(rolled(kept, 12), whole)
    undo()
    assert kept.emitted == 12 and kept.past.now.given.shape[2] == 0


def _stop_at(number: int):
    told = iter(range(10**6))

    def stop(*_):
        if next(told) == number:
            raise Stop

    return stop


@pytest.mark.parametrize("anchor", [Anchor(), AnchorStatic(2), AnchorAdaptive(1)], ids=lambda anchor: anchor.kind)
def test_an_interrupt_in_any_of_its_passes_loses_nothing(anchor, tmp_path):
    spec, given = spec_for(TinyModel(), W=4, anchor=anchor), pictures(2)
    whole = rolled(start(spec, schedule=FIRST), 8, given)
    for number in range(6):
        rollout = start(spec, schedule=FIRST, keep_latents=True, on_step=_stop_at(number))
        parts = []
        with pytest.raises(Stop):
            parts += [chunk.latents for chunk in rollout.chunks(8, given, INSIDE)]
        state = load_state(save_state(rollout.snapshot(), tmp_path / "a.safetensors"))
        assert state.start == (INSIDE if number < 4 else BEFORE)
        assert (state.given is not None) == (number < 4) and state.next_chunk == int(number > 3)
        done = whole[:, :, : state.emitted]
        assert torch.equal(torch.cat([done, rolled(start(spec, state, FIRST), 8)], 2), whole)
        rollout.on_step = None
        assert torch.equal(torch.cat([done, rolled(rollout, 8)], 2), whole)
    with pytest.raises(ValueError, match="takes no start latents"):
        rolled(_waiting(spec, given), 8, given)


def _waiting(spec, given) -> Rollout:
    """Before its first chunk, with frames that wait for it."""
    rollout = start(spec, on_step=_stop_at(0))
    with pytest.raises(Stop):
        rolled(rollout, 8, given)
    rollout.on_step = None
    return rollout


def test_a_solver_is_given_what_the_pass_saw_and_keeps_what_it_was_given():
    seen = []

    class Watched(TwoSteps):
        def step(self, step, x, v):
            seen.append((x, v, v.clone(), self.start, self.start.clone()))
            return super().step(step, x, v)

    schedules.SAMPLERS["two_steps"] = Watched  # the fixture puts back what was there
    given, model = pictures(1), Told()
    rollout = Rollout(model, spec_for(model), Settings(7, replace(SCHEDULE, sampler="two_steps")))
    next(rollout.chunks(6, given, INSIDE))
    for (x, v, was, first, first_was), (passed, _) in zip(seen, model.passes, strict=False):
        assert torch.equal(x, passed) and torch.equal(x[:, :, :1], given)
        assert torch.equal(v, was) and torch.equal(first, first_was) and not torch.equal(first[:, :, :1], given)


@pytest.mark.parametrize(
    ("more", "frames", "sentence"),
    [
        ({}, 3, "are 9 pictures .3 latent frames. and the first chunk has 3 latent frames, so at most 5 pictures .2 latent"),
        ({}, 5, "are 17 pictures .*: give fewer, or choose the start mode before the first chunk"),
        ({"F": 1}, 1, "the first chunk has 1 latent frames, so none fits inside: choose the start mode before"),
        ({"W": 6, "blocks": 2}, 1, "do not go with 2 chunks denoised together; choose the start mode before"),
        ({"W": 6, "remade": "newest"}, 1, "a past that is made anew before every chunk; choose the start mode before"),
    ],
)  # fmt: skip
def test_refusals(more, frames, sentence):
    rollout = start(spec_for(TinyModel(), **more))
    with pytest.raises(ValueError, match=sentence):
        rolled(rollout, 12, pictures(frames))
    assert rollout.past.now.given.shape[2] == 0, "nothing of it stays"


def test_a_state_that_waits_is_held_to_its_first_chunk(tmp_path):
    spec = spec_for(TinyModel(), W=4)
    waiting = _waiting(spec, pictures(2)).snapshot()
    path = save_state(waiting, tmp_path / "a.state.safetensors")
    for value in ("before", "beside", "", None, 1, ["inside"]):
        assert "start is" in refusal(changed(path, lambda _, header, v=value: header.update(start=v)))
    for frames in (0, 3, 7):

        def cut(tensors, _, n=frames):
            tensors["given"] = torch.zeros(1, 4, n, H, W_PIXELS)

        assert "start is inside, which cannot be" in refusal(changed(path, cut))
    assert "given is missing" in refusal(changed(path, lambda tensors, _: tensors.pop("given")))
    # without the word they stand before the first chunk, as in states of before
    plain = load_state(changed(path, lambda _, header: header.pop("start")))
    assert plain.start == BEFORE and plain.given.shape[2] == 2
    other = torch.cat([chunk.latents for chunk in start(spec).chunks(8, pictures(2))], 2)
    assert torch.equal(rolled(start(spec, plain), 8), other)
    going = start(spec, on_step=_stop_at(1))
    with pytest.raises(Stop):
        list(going.chunks(9, pictures(4)))
    late = replace(going.snapshot(), start=INSIDE)
    assert "start is inside, but next_frame is 3" in refusal(save_state(late, tmp_path / "b.state.safetensors"))
    for odd, sentence in ((late, "no first chunk to stand in"), (replace(waiting, given=None), "no first chunk"),
                          (replace(waiting, given=pictures(3)), "the first chunk has 3 latent frames")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            start(spec, odd)


def test_nothing_is_held_where_nothing_is_given():
    x = torch.randn(1, 4, 4, 2, 2)
    held = Held(x[:, :, :0], 1)
    assert held.put_into(x) is x and held.timesteps(500.0, 4) == 500.0
