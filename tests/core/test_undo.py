"""What comes before a chunk is undone without a copy of the cache: after a flush every frame is where it was, after a recache or a
restart the window is empty and made again before the next chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_cuda import fake_cuda
from live_bytes import LiveBytes
from planned_bytes import MODELS, Shapes
from test_past import prompts_of, rolled
from test_rollout import SCHEDULE, spec_for
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import (
    Anchor,
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
)
from adastate_core.rollout import NonFiniteError, Rollout, RolloutSpec, Settings
from adastate_core.states.state_file import load_state, save_state

LENGTH, AT = 27, 18
ANCHORED = "one pass, with the anchor"
WATCHED = AbsorptionSettings(
    warmup_frames=12,
    local_window_frames=2,
    sink_frames=2,
    ratio=0.5,
    monitor_layers=-1,
    monitor_chunks=2,
    refresh="always",
)
CASES = {
    "none, turned in place": dict(W=3),
    "none": dict(W=7),
    "static": dict(W=6, anchor=AnchorStatic(2)),
    "static, absolute": dict(W=6, anchor=AnchorStatic(2), positions="absolute"),
    "ema": dict(W=6, anchor=AnchorEMA(2, 0.6)),
    "memory": dict(W=6, anchor=AnchorMemory(2)),
    "replay": dict(W=6, anchor=AnchorReplay(9)),
    "adaptive": dict(W=6, anchor=AnchorAdaptive(2)),
    "adaptive, blended": dict(W=6, anchor=AnchorAdaptive(1, strength=0.5)),
    "adaptive, frozen": dict(W=6, anchor=AnchorAdaptive(1, freeze_frame=9)),
    "adaptive, emptied": dict(W=6, anchor=AnchorAdaptive(1, reset_frames=9)),
    "deep": dict(W=6, anchor=AnchorDeep(2, 4, 8)),
    "int8": dict(W=6, anchor=AnchorAdaptive(1), cache_dtype="int8"),
    "host": dict(W=6, anchor=AnchorEMA(2, 0.6), cache_device="host memory"),
    "one pass": dict(W=6, anchor=AnchorStatic(2), one_pass_recache=True),
    ANCHORED: dict(W=13, anchor=AnchorStatic(2), one_pass_recache=True),
    "chunk after chunk": dict(W=13, anchor=AnchorStatic(2)),
    "one pass, int8": dict(W=13, anchor=AnchorStatic(2), one_pass_recache=True, cache_dtype="int8"),
    "one pass, host": dict(W=6, anchor=AnchorStatic(2), one_pass_recache=True, cache_device="host memory"),
    "pinned": dict(W=12, absorption=WATCHED),
    "levels": dict(W=6, anchor=AnchorAdaptive(1), kept=(1,)),
}  # fmt: skip
TRANSITIONS = ("flush", "recache", "restart")
# a restart counts time from 0 again
ALLOWED = [(c, t) for c in CASES for t in TRANSITIONS if (c, t) != ("static, absolute", "restart")]


class Stop(BaseException):
    pass


def start(case: str, transition: str, state=None, model=None, after: tuple = ()) -> Rollout:
    """A rollout whose prompt changes, or which restarts, with the chunk from frame AT on."""
    numbers = dict(CASES[case])
    kept = numbers.pop("kept", ())
    more = {n: numbers.pop(n) for n in ("absorption", "cache_dtype", "cache_device") if n in numbers}
    if transition == "restart":
        more |= dict(restart_frames=AT, overlap_frames=5)
    spec = replace(spec_for(TinyModel(), **numbers), **more)
    rows = [(0, 1), *(after or ([(AT, 2, transition)] if transition != "restart" else []))]
    settings = Settings(7, replace(SCHEDULE, kept=kept))
    return Rollout(
        model or TinyModel(), spec, settings, state=state, prompts=prompts_of(*rows), keep_latents=True
    )  # fmt: skip


class Stopping(TinyModel):
    """Stops once, in the middle of a layer of the `stop`-th pass from when it is armed on."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        self.stop, self.armed = stop, False

    def velocity(self, x, timestep, attention):
        if not self.armed:
            return super().velocity(x, timestep, attention)
        self.stop -= 1
        if self.stop >= 0:
            return super().velocity(x, timestep, attention)
        self.armed, attend = False, attention.attend

        class Cut:
            def attend(self, layer, q, k, v):
                if layer == 1:
                    raise Stop
                return attend(layer, q, k, v)

        return super().velocity(x, timestep, Cut())


def tensors_of(state) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t for i, layer in enumerate(state.cache) for name, t in layer.tensors.items()}


def books_of(state) -> list:
    return [(layer.frames, layer.anchor_slots, layer.ring_slots, layer.pinned) for layer in state.cache]


def cut(case: str, transition: str, stop: int) -> tuple[Rollout, object, object]:
    """(a rollout that was stopped before frame AT was committed, its state before, and its state then)."""
    model = Stopping(stop)
    rollout = start(case, transition, model=model)
    rolled(rollout, AT)
    before, model.armed = rollout.snapshot(), True
    with pytest.raises(Stop):
        rolled(rollout, LENGTH)
    return rollout, before, rollout.snapshot()


@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize(("case", "transition"), ALLOWED)
@pytest.mark.sampled(2)
def test_an_interrupt_at_a_pass_and_then_the_bits_of_the_whole(case, transition, stop, tmp_path):
    """semantics: A change of the prompt. In the same run, and from a file in another."""
    whole = rolled(start(case, transition), LENGTH)
    rollout, before, after = cut(case, transition, stop)
    assert (after.next_frame, after.emitted) == (AT, AT)
    state = load_state(save_state(after, tmp_path / "cut.safetensors"))
    assert state.again == after.again
    resumed = start(case, transition, state)
    assert torch.equal(rolled(resumed, LENGTH), whole[:, :, AT:])
    assert resumed.snapshot().again == 0
    rolled(rollout, LENGTH)
    assert torch.equal(rollout.kept_latents, whole)
    if transition == "flush":
        assert after.again == 0 and books_of(after) == books_of(before)
    else:
        frames = rollout.spec.overlap_frames or min(rollout.spec.recent_frames, AT)
        assert after.again == frames
        assert all(len(layer.ring_slots) == layer.pinned for layer in after.cache)


class NotANumber(TinyModel):
    """Gives NaN in the `nth` pass from when it is armed on."""

    nth, armed = 0, False

    def velocity(self, x, timestep, attention):
        found = super().velocity(x, timestep, attention)
        if self.armed:
            self.nth -= 1
            self.armed = self.nth >= 0
            return found if self.armed else found * float("nan")
        return found


@pytest.mark.parametrize("nth", [0, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("one pass")])
def test_after_nan_in_the_one_pass_or_behind_it_the_anchor_is_as_it_was(case, nth):
    """Bit for bit, and then the rest of the video, too."""
    model = NotANumber()
    rollout = start(case, "recache", model=model)
    rolled(rollout, AT)
    before, model.armed, model.nth = rollout.snapshot(), True, nth
    with pytest.raises(NonFiniteError, match="everything before it is kept"):
        rolled(rollout, LENGTH)
    after = rollout.snapshot()
    assert after.again == min(rollout.spec.recent_frames, AT) and (after.next_frame, after.emitted) == (AT, AT)
    for kept, found in zip(before.cache, after.cache, strict=True):
        slots = len(kept.anchor_slots)
        assert found.anchor_slots == kept.anchor_slots and found.ring_slots == () and slots == 2
        assert found.frames == kept.frames[:slots] and found.positions == kept.positions[:slots]
        for name in ("keys", "values", *(["scales"] if "scales" in kept.tensors else [])):
            assert torch.equal(found.tensors[name], kept.tensors[name][:, :slots]), name
    rolled(rollout, LENGTH)
    assert torch.equal(rollout.kept_latents, rolled(start(case, "recache"), LENGTH))


@pytest.mark.parametrize(("stopped", "goes_on"), [(ANCHORED, "chunk after chunk"), ("chunk after chunk", ANCHORED)])
def test_a_recache_that_was_cut_is_made_as_the_run_that_goes_on_has_it(stopped, goes_on, tmp_path):
    _, before, after = cut(stopped, "recache", 1)
    state = load_state(save_state(after, tmp_path / "cut.safetensors"))
    found = rolled(start(goes_on, "recache", state), LENGTH)
    assert torch.equal(found, rolled(start(goes_on, "recache", before), LENGTH))
    assert not torch.equal(found, rolled(start(stopped, "recache", before), LENGTH))


@pytest.mark.parametrize("case", CASES)
def test_after_a_flush_every_frame_is_where_it_was(case):
    """Bit for bit: raw keys, values, codes and scales; rotated keys where there is nothing to make them again from."""
    _, before, after = cut(case, "flush", 2)
    found, expected = tensors_of(after), tensors_of(before)
    assert found.keys() == expected.keys()
    raw = {name.split(".")[0] for name in expected if name.endswith((".raw", ".blend_keys"))}
    for name, kept in expected.items():
        index, kind = name.split(".")
        if kind == "keys" and index in raw:  # rotated to where the books say, from raw ones that are compared
            continue
        layer, old = after.cache[int(index)], before.cache[int(index)]
        anchors = len(layer.anchor_slots) if kind == "keys" and layer.positions != old.positions else 0
        assert torch.equal(kept[:, anchors:], found[name][:, anchors:]), name


def test_under_another_prompt_the_window_is_made_again_with_it(tmp_path):
    """A recache that was cut, gone on with under a third text: as if the recache had been to that one."""
    _, before, after = cut("static", "recache", 1)
    state = load_state(save_state(after, tmp_path / "cut.safetensors"))
    found = rolled(start("static", "", state, after=((AT, 3, "cut"),)), LENGTH)
    expected = rolled(start("static", "", before, after=((AT, 3, "recache"),)), LENGTH)
    assert torch.equal(found, expected)
    flushed = rolled(start("static", "", state, after=((AT, 3, "flush"),)), LENGTH)
    assert not torch.equal(flushed, found)


def test_what_is_undone_twice_is_undone_once(tmp_path):
    """Cut in the recache, and gone on with, and cut again, in this run and in the next."""
    whole = rolled(start("adaptive", "recache"), LENGTH)
    rollout, _, state = cut("adaptive", "recache", 1)
    for stop in (0, 1, 2, 4):
        rollout.model.stop, rollout.model.armed = stop, True
        with pytest.raises(Stop):
            rolled(rollout, LENGTH)
        model = Stopping(stop)
        model.armed = True
        resumed = start("adaptive", "recache", load_state(save_state(state, tmp_path / "a.safetensors")), model)
        with pytest.raises(Stop):
            rolled(resumed, LENGTH)
        state = resumed.snapshot()
        assert state.again == rollout.snapshot().again
    assert torch.equal(rolled(resumed, LENGTH), whole[:, :, AT:])
    rolled(rollout, LENGTH)
    assert torch.equal(rollout.kept_latents, whole)


class StoppingShapes(Shapes):
    """Stops before the `stop`-th pass from when it is armed on."""

    stop, armed = 0, False

    def velocity(self, x, timestep, attention):
        self.stop -= self.armed
        if self.armed and self.stop < 0:
            raise Stop
        return super().velocity(x, timestep, attention)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize(
    "case",
    [
        "none, turned in place",
        "none",
        "static",
        "ema",
        "adaptive",
        "adaptive, blended",
        "host",
        "one pass",
        ANCHORED,
    ],
)
@pytest.mark.sampled(2)
def test_the_copies_of_an_undo_are_few(case, transition):
    """At the 1.3B's shapes, two layers, on CUDA's stand-in: host memory from the transition to the undo, which once was the whole
    cache's. 8 MiB are the latents' and the noise's."""
    numbers = dict(CASES[case])
    if transition == "restart":
        numbers |= dict(restart_frames=AT, overlap_frames=5)
    numbers["window_frames"] = numbers.pop("W")
    spec = RolloutSpec(
        replace(MODELS["1.3B"], layers=2), batch=1, height=60, width=104, chunk_frames=3, positions="packed",
        dtype=torch.bfloat16, **({"anchor": Anchor()} | numbers),
    )  # fmt: skip
    with fake_cuda() as (device, _), LiveBytes() as live:
        model = StoppingShapes(spec.geometry, device, spec.dtype, live)
        prompts = prompts_of((0, 1), (AT, 2, *((transition,) if transition != "restart" else ())))
        rollout = Rollout(model, spec, Settings(7, SCHEDULE), prompts=prompts)
        for chunk in rollout.chunks(AT, torch.zeros(1, 16, AT - 3, 60, 104)):
            del chunk
        before, model.armed, model.stop = dict(live.now), True, 2
        live.restart()
        with pytest.raises(Stop):
            rolled(rollout, LENGTH)
        layers = len(rollout.cache.layers)
        plan = spec.plan(recaches=transition == "recache")
        allowed, one_pass = 8 << 20, spec.one_pass(AT)
        anchor_too = one_pass.anchored if one_pass else type(spec.anchor.bystander(AT)) is not Anchor
        if transition != "flush" and anchor_too:
            allowed += (
                layers
                * spec.anchor.frames
                * (2 * plan.frame_bytes + (plan.blended_bytes(1) if spec.anchor.blends else 0))
            )
        elif transition == "flush" and case == "none, turned in place":
            allowed += layers * 2 * plan.frame_bytes  # keys of the two frames that stay
        if case == "host":
            allowed += 4 * 2 * plan.frame_bytes  # frames of one layer that change places
        assert live.peak["cpu"] - before["cpu"] <= allowed < layers * spec.window_frames * 2 * plan.frame_bytes
        assert live.peak["cuda"] - before["cuda"] <= plan.bytes()["working"] + plan.rope_bytes()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(again=99), "again is 99, more latent frames than recent holds, 11"),
        (dict(again=-1), "again is -1, not a whole number of at least 1"),
        (dict(again=2.5), "again is 2.5, not a whole number"),
        (dict(again=4, filled=True), "again is 4, which says that windows are empty, and cache.0 holds 6 frames"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused_by_name(change, sentence, tmp_path):
    _, before, after = cut("static", "recache", 1)
    whole = before if change.pop("filled", False) else after
    path = save_state(replace(whole, **change), tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="wrong.safetensors") as caught:
        load_state(path)
    assert sentence in str(caught.value)


def test_a_state_in_memory_with_too_few_latents_is_refused():
    _, _, after = cut("static", "recache", 1)
    with pytest.raises(ValueError, match="12 latent frames to be cached again and not as many recent ones"):
        start("static", "recache", replace(after, again=12))


def test_a_state_says_so_only_if_something_is_to_be_made_again(tmp_path):
    """So that packs before this one read every other state."""
    _, before, after = cut("none", "recache", 0)
    texts = [save_state(one, tmp_path / "a.safetensors").read_bytes()[:20000] for one in (before, after)]
    assert [b'\\"again\\"' in text for text in texts] == [False, True]
