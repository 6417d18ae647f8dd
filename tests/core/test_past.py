"""The past as one thing: what its owners may do between two chunks, what a schedule may keep, and what a pass must have done."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from slow_rollout import slow_rollout
from test_rollout import SCHEDULE, W_PIXELS, H, roll, slow_numbers, spec_for
from test_transitions import plan_of, text
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.attention.cached import LayerOrderError
from adastate_core.cache.rotated import RotatedLayer as LayerCache
from adastate_core.rollout import Rollout, Settings, UnfinishedError
from adastate_core.schedules.schedule import Schedule
from adastate_core.schedules.solvers import renoised
from adastate_core.states.state_file import load_state, save_state


class Stop(Exception):
    pass


def prompts_of(*rows: tuple):
    """(frame, which text, transition) a row."""
    return plan_of([(frame, text(number), *(how or ("cut",)), 3) for frame, number, *how in rows], 3)


def rolled(rollout: Rollout, length: int, given=None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given)], 2)


class Watcher:
    """Follows a past, looks between two chunks as often as it likes, and fails at some of its turns."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.fails, self.turns, self.told, self.seen = fails, 0, [], []

    def start_chunk(self) -> None:
        pass

    stand_aside = start_chunk

    def joins(self):
        return []

    def moved(self) -> None:
        self.told.append("moved")

    def catch_up(self, next_frame, look) -> None:
        self.turns += 1
        x = torch.randn(1, 4, 4, H, W_PIXELS, generator=torch.Generator().manual_seed(next_frame))
        self.seen.append((next_frame, look(x, 500.0), look(x, 100.0)))
        if self.turns in self.fails:
            raise MemoryError("no room to judge")

    def flushed(self, keep: int) -> None:
        pass

    def mark(self) -> None:
        pass

    def rewind(self, mark: None) -> None:
        pass


@pytest.mark.parametrize("W", [2, 3, 6])
@pytest.mark.parametrize("transition", ["flush", "rope cut", "recache"])
def test_passes_between_two_chunks_change_nothing_and_may_fail(W, transition):
    """Among them windows whose keys are turned in place, where a second turn would cost a rounding."""
    spec = spec_for(TinyModel(), W=W, anchor=AnchorAdaptive(1))
    prompts = [(0, 1), (9, 2, transition), (15, 3, transition)]

    def start() -> Rollout:
        return Rollout(TinyModel(), spec, Settings(7, SCHEDULE), prompts=prompts_of(*prompts))

    calm, watched = start(), start()
    expected = rolled(calm, 21)
    watched.past.observer = watcher = Watcher(fails=(2, 3, 7))
    found, failures = [], 0
    while watched.emitted < 21:
        try:
            for chunk in watched.chunks(21):
                found.append(chunk.latents)
        except MemoryError:
            failures += 1
            # a chunk that was committed before who follows it failed is pending, and the state is one to go on from
            state = watched.snapshot()
            again = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state, prompts=prompts_of(*prompts))
            assert torch.equal(rolled(again, 21), expected[:, :, state.emitted :])
    assert failures == 3 and torch.equal(torch.cat(found, 2), expected)
    assert len(watcher.told) == 7 and len(watcher.seen) == watcher.turns
    same = {}
    for frame, *velocities in watcher.seen:
        for one, other in zip(same.setdefault(frame, velocities), velocities, strict=True):
            assert torch.equal(one, other)


def test_a_look_is_where_a_run_can_be_interrupted():
    spec, stops = spec_for(TinyModel(), anchor=AnchorAdaptive(1)), []

    def stop(chunk, step, steps, x0):
        if steps == 1 and chunk == 2 and not stops:
            stops.append(chunk)
            raise Stop

    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), on_step=stop, keep_latents=True)
    rollout.past.observer = Watcher()
    with pytest.raises(Stop):
        rolled(rollout, 12)
    assert rollout.snapshot().next_chunk == 2
    rolled(rollout, 12)
    assert torch.equal(rollout.kept_latents, rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE)), 12))


@pytest.mark.parametrize("fault", ["skips", "repeats", "reorders", "leaves out the last"])
@pytest.mark.parametrize("clean", [False, True])
def test_a_pass_in_which_not_every_layer_attends_once_in_order_is_refused(fault, clean):
    orders = {"skips": [0, 2], "repeats": [0, 1, 1, 2], "reorders": [1, 0, 2], "leaves out the last": [0, 1]}

    class Patched(TinyModel):
        faulty = False

        def velocity(self, x, timestep, attention):
            kept = self.blocks
            if self.faulty and (timestep == 0.0) == clean:
                order = orders[fault]
                own, attend = attention, attention.attend

                class Reordered:
                    def attend(self, i, q, k, v):
                        return attend(order[i], q, k, v)

                self.blocks, attention = torch.nn.ModuleList(kept[i] for i in order), Reordered()
                assert own is not attention
            try:
                return super().velocity(x, timestep, attention)
            finally:
                self.blocks = kept

    model = Patched(layers=3)
    model.text = torch.nn.ModuleList([*model.text, *model.text])
    spec = spec_for(model)
    expected = rolled(Rollout(TinyModel(layers=3), spec, Settings(7, SCHEDULE)), 12)
    rollout = Rollout(model, spec, Settings(7, SCHEDULE), keep_latents=True)
    next(rollout.chunks(12))
    model.faulty = True
    with pytest.raises(LayerOrderError, match="skips, repeats or reorders its blocks"):
        rolled(rollout, 12)
    model.faulty = False
    rolled(rollout, 12)
    assert torch.equal(rollout.kept_latents, expected)


@dataclass(frozen=True)
class Remembering(Schedule):
    """A solver of second order: every step after the first uses the estimate before, of its own chunk alone."""

    def solver(self, chunk, noises):
        sigmas = self.for_chunk(chunk)

        class Solver:
            start, before = noises[0], None

            def step(self, step, x, v):
                x0 = x - sigmas[step] * v
                estimate = x0 if self.before is None else 1.5 * x0 - 0.5 * self.before
                self.before = x0
                if step + 1 == len(sigmas):
                    return estimate, estimate
                return estimate, renoised(estimate, noises[step + 1], sigmas[step + 1])

        return Solver()


@pytest.mark.quick
def test_a_schedule_may_keep_two_noise_levels_and_a_solvers_memory(tmp_path):
    """Step 1 sees what it made itself of the chunks before, step 0 and the clean pass the clean past: against a whole run of
    each step over a cache of its own, with nothing shared but the latents."""
    sigmas = Schedule.shifted(3, 5.0).sigmas
    kept, plain = Remembering(sigmas, kept=(1,)), Remembering(sigmas)
    for anchor in (Anchor(), AnchorStatic(1), AnchorAdaptive(1), AnchorEMA(2, 0.6)):
        spec = spec_for(TinyModel(), W=6, anchor=anchor)
        rollout = Rollout(TinyModel(), spec, Settings(7, kept))
        whole = rolled(rollout, 24)
        assert not torch.equal(whole, rolled(Rollout(TinyModel(), spec, Settings(7, plain)), 24))
        assert len(rollout.snapshot().cache) == 2 * len(rollout.cache.layers)
        for cut in (3, 9, 13):
            first = Rollout(TinyModel(), spec, Settings(7, kept))
            begun = rolled(first, cut)
            state = load_state(save_state(first.snapshot(), tmp_path / "levels.safetensors"))
            rest = rolled(Rollout(TinyModel(), spec, Settings(7, kept), state=state), 24)
            assert torch.equal(torch.cat([begun, rest], 2), whole)
        with pytest.raises(ValueError, match="caches"):
            Rollout(TinyModel(), spec, Settings(7, plain), state=state)


def test_a_level_of_its_own_sees_what_it_made_itself():
    """The keys that step 1 staged, chunk after chunk, are those in its cache; the clean pass's are in the other."""
    staged: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    class Spy(TinyModel):
        def velocity(self, x, timestep, attention):
            spied = attention

            class Recorder:
                def attend(self, i, q, k, v):
                    if i == 0 and (timestep == 0.0 or abs(timestep - 1000 * SCHEDULE.sigmas[1]) < 1e-6):
                        staged[timestep == 0.0].append(k.clone())
                    return spied.attend(i, q, k, v)

            return super().velocity(x, timestep, Recorder())

    spec = spec_for(TinyModel(), W=6)
    rollout = Rollout(Spy(), spec, Settings(7, replace(SCHEDULE, kept=(1,))))
    rolled(rollout, 15)
    for clean, cache in ((True, rollout.past.caches[0]), (False, rollout.past.caches[1])):
        layer: LayerCache = cache.layers[0]
        held = torch.cat([layer.raw[:, ring] for ring in layer.window], 1)
        torch.testing.assert_close(held, torch.cat(staged[clean][-2:], 1), rtol=0, atol=0)
    assert not torch.equal(staged[True][-1], staged[False][-1])


def test_levels_are_steps_of_every_chunk_and_go_with_neither_absorption_nor_rolling():
    for wrong in ((2,), (1, 0), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="steps of the 2"):
            replace(SCHEDULE, kept=wrong)
    kept, model = replace(SCHEDULE, kept=(1,)), TinyModel()
    for more in ({"blocks": 2}, {"absorption": AbsorptionSettings()}):
        with pytest.raises(ValueError, match="past of their own"):
            Rollout(model, spec_for(model, W=12, **more), Settings(7, kept))


@pytest.mark.quick
def test_a_write_that_fails_twice_is_told_with_its_layer_and_is_finished_by_the_third_look(monkeypatch):
    spec, failing = spec_for(TinyModel(), W=6), []
    expected = rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE)), 15)
    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), keep_latents=True)
    chunks = rollout.chunks(15)
    next(chunks), next(chunks)
    enter = LayerCache.enter

    def broken(self, ring, key, value):
        if self is rollout.cache.layers[1] and len(failing) < 2:
            failing.append(ring)
            raise MemoryError("no room")
        enter(self, ring, key, value)

    monkeypatch.setattr(LayerCache, "enter", broken)
    with pytest.raises(MemoryError):
        next(chunks)
    with pytest.raises(UnfinishedError, match="layer 1 .*no room.*after frame 6"):
        rollout.snapshot()
    state = rollout.snapshot()
    assert (state.next_frame, state.emitted, state.pending.shape[2]) == (9, 6, 3)
    assert torch.equal(rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state), 15), expected[:, :, 6:])
    rolled(rollout, 15)
    assert torch.equal(rollout.kept_latents, expected)


def test_a_recache_after_a_rope_cut_is_the_same_in_a_resumed_run():
    """The cut puts one chunk ahead in time; what is committed again before the next one is not."""
    spec, prompts = spec_for(TinyModel(), W=6), [(0, 1), (6, 2, "rope cut"), (9, 3, "recache")]

    def start(state=None) -> Rollout:
        return Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state, prompts=prompts_of(*prompts))

    whole, first = rolled(start(), 18), start()
    begun = rolled(first, 9)
    assert torch.equal(torch.cat([begun, rolled(start(first.snapshot()), 18)], 2), whole)


@pytest.mark.quick
@pytest.mark.parametrize("anchor", [Anchor(), AnchorStatic(4), AnchorAdaptive(1)], ids=lambda a: a.kind)
@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_an_interrupt_among_given_frames_keeps_the_rest_of_them(anchor, stopped, tmp_path):
    spec = spec_for(TinyModel(), W=4, anchor=anchor)
    given = torch.randn(1, 4, 8, H, W_PIXELS, generator=torch.Generator().manual_seed(3))
    turns = []

    def stop(chunk, step, steps, x0):
        turns.append(step)
        if len(turns) == stopped + 1:
            raise Stop

    whole = rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE)), 17, given)
    first = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), on_step=stop)
    with pytest.raises(Stop):
        rolled(first, 17, given)
    state = load_state(save_state(first.snapshot(), tmp_path / "a.safetensors"))
    assert state.next_frame == 3 * stopped and state.given.shape[2] == 8 - 3 * stopped
    resumed = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state)
    assert torch.equal(rolled(resumed, 17), whole[:, :, state.emitted :])
    with pytest.raises(ValueError, match="takes no start latents"):
        rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state), 17, given)
    slow = slow_rollout(
        TinyModel(), batch=1, h=H, w=W_PIXELS, F=3, W=4, seed=7, sigmas=SCHEDULE.sigmas, length=17, given=given,
        mode="packed", **slow_numbers(anchor),
    )  # fmt: skip
    torch.testing.assert_close(whole, slow["latents"][:, :, :17], atol=2e-5, rtol=2e-5)


def test_a_recache_is_no_chunk_of_an_absorption():
    """Passes that commit frames again are neither collected nor counted, and an undone one leaves no trace in what was lost."""
    settings = {"warmup_frames": 12, "local_window_frames": 3, "ratio": 1.0, "monitor_layers": -1, "monitor_chunks": 2}
    spec = spec_for(TinyModel(), W=12, absorption=AbsorptionSettings(**settings, refresh="always"))
    prompts = [(0, 1), (18, 2, "recache")]

    def start(state=None, on_step=None) -> Rollout:
        prompt_plan = prompts_of(*prompts)
        return Rollout(
            TinyModel(),
            spec,
            Settings(7, SCHEDULE),
            state=state,
            on_step=on_step,
            prompts=prompt_plan,
            keep_latents=True,
        )

    whole = start()
    expected = rolled(whole, 30)
    frames = sorted({entry["frame"] for entry in whole.absorber.report()["monitor"]})
    assert frames == [18, 24, 30], "every second chunk, whatever was committed again"

    def stop(chunk, step, steps, x0):
        if chunk == 6 and step == 0:
            raise Stop

    cut = start(on_step=stop)
    with pytest.raises(Stop):
        rolled(cut, 30)
    state = cut.snapshot()
    rolled(resumed := start(state), 30)
    assert torch.equal(resumed.kept_latents, expected)
    cut.on_step = None
    rolled(cut, 30)
    assert torch.equal(cut.kept_latents, expected)
    for one in (resumed, cut):
        assert one.absorber.report()["monitor"] == whole.absorber.report()["monitor"]


def test_a_state_keeps_what_it_was(tmp_path):
    """A state and a given solution are values: a run that goes on, measures and solves anew does not change them."""
    settings = {"warmup_frames": 9, "local_window_frames": 3, "monitor_layers": -1, "monitor_chunks": 1}
    spec = spec_for(TinyModel(), W=12, absorption=AbsorptionSettings(**settings, refresh="always"))
    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE))
    rolled(rollout, 15)
    state, solution = rollout.snapshot(), rollout.absorber.solution
    before = save_state(state, tmp_path / "before.safetensors").read_bytes()
    fits = dict(solution.fits)
    rolled(rollout, 30)
    rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state), 30)
    assert save_state(state, tmp_path / "after.safetensors").read_bytes() == before
    given = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), solution=type(solution)(solution.chosen, fits))
    kept = dict(fits)
    rolled(given, 30)
    assert fits == kept and given.absorber.report()["monitor"]


@pytest.mark.quick
def test_what_fails_between_the_commit_and_the_switch_is_made_up_for(monkeypatch, tmp_path):
    """The solve is due once the warm-up is over: in this run, or in the one that goes on from its state."""
    from adastate_core.absorption import absorber as module

    settings = {"warmup_frames": 12, "local_window_frames": 3, "ratio": 0.5}
    spec, real, turns = spec_for(TinyModel(), W=12, absorption=AbsorptionSettings(**settings)), module.fit, []
    expected, whole, _ = roll(TinyModel(), spec, 24)

    def broken(*arguments):
        turns.append(1)
        if len(turns) == 2:
            raise torch.OutOfMemoryError("no room to solve")
        return real(*arguments)

    monkeypatch.setattr(module, "fit", broken)
    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), keep_latents=True)
    with pytest.raises(torch.OutOfMemoryError):
        rolled(rollout, 24)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "due.safetensors"))
    assert (state.next_frame, state.pending.shape[2], state.absorption["phase"]) == (12, 3, "warming")
    resumed = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=state)
    assert torch.equal(rolled(resumed, 24), expected[:, :, 9:])
    rolled(rollout, 24)
    assert torch.equal(rollout.kept_latents, expected)
    for one in (resumed, rollout):
        assert one.absorber.solution.chosen == whole.absorber.solution.chosen


def test_kept_latents_are_one_tensor_that_states_share_and_taking_some_back_leaves_a_state_as_it_was():
    spec = spec_for(TinyModel(), W=6)
    expected = rolled(Rollout(TinyModel(), spec, Settings(7, SCHEDULE)), 12)
    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), keep_latents=True)
    chunks = rollout.chunks(12)
    next(chunks), next(chunks)
    state = rollout.snapshot()
    assert state.latents is rollout.kept_latents is rollout.snapshot().latents and rollout.keeps_latents
    third = next(chunks).latents
    rollout.put_back(
        torch.cat([state.latents[:, :, 4:], third], 2)
    )  # part of what has been joined, and a chunk since then
    assert torch.equal(rollout.kept_latents, expected[:, :, :4]) and torch.equal(state.latents, expected[:, :, :6])
    assert rollout.emitted == 4
    rolled(rollout, 12)
    assert torch.equal(rollout.kept_latents, expected)
    let_go = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), state=replace(state, latents=None), keep_latents=True)
    assert not let_go.keeps_latents and not Rollout(TinyModel(), spec, Settings(7, SCHEDULE)).keeps_latents
