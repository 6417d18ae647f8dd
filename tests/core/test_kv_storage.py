"""Caches in 8 bits and in host memory against slow ways to get the same, and against the cache in the compute dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounded import error, held_as
from slow_rollout import rotate, slow_rollout
from test_rollout import ANCHORS, SCHEDULE, W_PIXELS, H, roll, slow_numbers, spec_for
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.cache.eight_bits import check_cache_dtype
from adastate_core.states.state_file import load_state, save_state

HEADS, TOKENS = 2, 6
STORED = [("model", "host memory"), ("fp8", "gpu"), ("int8", "host memory")]


def stored(spec, cache_dtype: str, cache_device: str = "gpu"):
    return replace(spec, cache_dtype=cache_dtype, cache_device=cache_device)


class Recorder(TinyModel):
    """Keeps the raw keys and values of clean passes by layer and video frame."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.passes = 0

    def velocity(self, x, timestep, attention):
        if timestep != 0.0:
            return super().velocity(x, timestep, attention)
        recorder, first = self, 3 * self.passes

        class Spy:
            def attend(self, layer, q, k, v):
                for i in range(3):
                    frame = slice(i * TOKENS, (i + 1) * TOKENS)
                    recorder.raw[layer, first + i] = [t[:, frame].clone() for t in (k, v)]
                return attention.attend(layer, q, k, v)

        self.passes += 1
        return super().velocity(x, timestep, Spy())


@pytest.mark.parametrize("anchor", ["none", "static4"])
@pytest.mark.parametrize(("cache_dtype", "cache_device"), [("fp8", "host memory"), ("int8", "gpu")])
def test_expanded_keys_are_rounded_raw_keys_at_their_positions(cache_dtype, cache_device, anchor):
    model, hold = Recorder(), held_as(cache_dtype)
    spec = stored(spec_for(model, batch=2, W=7, anchor=ANCHORS[anchor]), cache_dtype, cache_device)
    _, rollout, _ = roll(model, spec, 24)
    attention = rollout.attention
    layout = rollout.past.layout()
    attention.place(layout)
    rollout.cache.begin()
    for index, layer in enumerate(rollout.cache):
        rollout.cache.open(index)
        keys, values = (t.unflatten(1, (-1, TOKENS)) for t in layer.read(3))
        names = layer.held_frames(3)
        assert sum(kind == "window" for kind, _ in names) == 7
        for i, (kind, number) in enumerate(names):
            if kind == "current":
                continue
            position = number if kind == "anchor" else layout.window(number)
            key, value = (hold(x) for x in model.raw[index, number])
            turned = rotate(key.unflatten(-1, (HEADS, -1)), position, H // 2, W_PIXELS // 2).flatten(2)
            torch.testing.assert_close(keys[:, i], turned, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[:, i], value, atol=1e-6, rtol=1e-6)


CASES = [("none", "fixed", 7), ("static3", "absolute", 4), ("ema3", "packed", 3), ("adaptive2", "packed", 7)]


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
@pytest.mark.parametrize(("anchor", "positions", "W"), CASES, ids=[c[0] for c in CASES])
def test_equals_the_slow_rollout_that_rounds(cache_dtype, anchor, positions, W):
    """Items of a batch share nothing. Where a key lies on the edge of two codes, the last bit of a sum decides to which one it
    goes, and from then on that item leaves its twin by a fraction of what rounding does: so not all items have to agree."""
    model = TinyModel()
    spec = spec_for(model, batch=4, W=W, anchor=ANCHORS[anchor], positions=positions)
    fast, _, chunks = roll(model, stored(spec, cache_dtype), 25)
    assert len(chunks) >= 8
    slow = slow_rollout(
        model, batch=4, h=H, w=W_PIXELS, F=3, W=W, seed=7, sigmas=SCHEDULE.sigmas, length=25, mode=positions,
        hold=held_as(cache_dtype), **slow_numbers(ANCHORS[anchor]),
    )["latents"][:, :, :25]  # fmt: skip
    exact, _, _ = roll(model, spec, 25)
    errors = sorted(error(one, other) for one, other in zip(fast, slow, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, slow) / 2, errors
    assert error(exact, slow) > 2e-4


@pytest.mark.parametrize("anchor", ["none", "static3", "ema3", "adaptive1"])
@pytest.mark.parametrize(("cache_dtype", "cache_device"), [*STORED, ("fp8", "host memory")])
def test_bytes_are_what_the_plan_said(anchor, cache_dtype, cache_device):
    model = TinyModel()
    plain = spec_for(model, W=18, anchor=ANCHORS[anchor], dtype=torch.bfloat16)
    plan = (spec := stored(plain, cache_dtype, cache_device)).plan()
    _, rollout, _ = roll(model, spec, 7)
    measured = rollout.cache.bytes()
    assert measured == {name: plan.bytes()[name] for name in measured}
    assert (rollout.cache.nbytes, rollout.cache.host_nbytes) == (plan.kv_bytes, plan.host_bytes)
    before, after = plain.plan().bytes(), plan.bytes()
    frames = 18 + (0 if anchor == "ema3" else spec.anchor.frames)
    names = ("k", "v") if cache_device == "gpu" else ("host_k", "host_v")
    size = 1 if cache_dtype != "model" else 2
    assert [after[name] for name in names] == [2 * frames * TOKENS * 24 * size] * 2
    assert (cache_device == "gpu") == (plan.host_bytes == 0)
    held = {name: size for name, size in measured.items() if name.removeprefix("host_") in ("k", "v", "scales")}
    if cache_dtype != "model":
        assert sum(held.values()) < 0.6 * (before["k"] + before["v"])


@pytest.mark.parametrize("anchor", ["none", "static4", "ema3", "adaptive1"])
@pytest.mark.parametrize(("cache_dtype", "cache_device"), STORED)
def test_going_on_from_a_file_gives_the_same_bits(anchor, cache_dtype, cache_device, tmp_path):
    model = TinyModel()
    given = torch.randn(1, 4, 4, H, W_PIXELS, generator=torch.Generator().manual_seed(3))
    spec = stored(spec_for(model, W=5, anchor=ANCHORS[anchor], dtype=torch.bfloat16), cache_dtype, cache_device)
    whole, _, _ = roll(model, spec, 22, given=given)
    first, rollout, _ = roll(model, spec, 12, given=given)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    rest, _, _ = roll(model, spec, 22, state=state)
    assert torch.equal(torch.cat([first, rest], 2), whole)
    with pytest.raises(ValueError, match=f"cache_dtype is {cache_dtype} in the state and"):
        roll(model, stored(spec, "fp8" if cache_dtype != "fp8" else "int8"), 22, state=state)


@pytest.mark.parametrize("anchor", ["none", "static3", "ema3", "adaptive2"])
@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
def test_host_memory_is_the_device_bit_for_bit_and_takes_over_its_states(anchor, cache_dtype):
    model = TinyModel()
    for positions, W in (("packed", 7), ("fixed", 3)):
        here = stored(spec_for(model, batch=2, W=W, anchor=ANCHORS[anchor], positions=positions), cache_dtype)
        there = stored(here, cache_dtype, "host memory")
        whole, _, _ = roll(model, here, 21)
        assert torch.equal(roll(model, there, 21)[0], whole)
        for one, other in ((here, there), (there, here)):
            first, rollout, _ = roll(model, one, 12)
            rest, _, _ = roll(model, other, 21, state=rollout.snapshot())
            assert torch.equal(torch.cat([first, rest], 2), whole), (positions, one.cache_device)


def test_a_frame_is_rounded_once():
    model = TinyModel()
    spec = stored(spec_for(model, W=9), "int8")
    _, rollout, _ = roll(model, spec, 12)
    early = rollout.snapshot().cache[0]
    list(rollout.chunks(15))
    late = rollout.snapshot().cache[0]
    for frame in range(6, 12):
        codes = [snap.tensors["keys"][:, snap.frames.index(frame)] for snap in (early, late)]
        assert torch.equal(*codes)
    assert late.tensors["keys"].dtype == torch.int8 and set(late.positions) == {None}


@pytest.mark.parametrize(("cache_dtype", "cache_device"), STORED)
def test_absorption_switches_stored_layers(cache_dtype, cache_device):
    model = TinyModel()
    settings = AbsorptionSettings(
        ratio=0.5, warmup_frames=12, local_window_frames=3, monitor_layers=-1, monitor_chunks=2, refresh="always"
    )
    plain = replace(spec_for(model, W=20), absorption=settings)
    spec = stored(plain, cache_dtype, cache_device)
    whole, rollout, _ = roll(model, spec, 30)
    report = rollout.absorber.report()
    assert report["phase"] == "switched" and report["monitor"]
    measured, plan = rollout.cache.bytes(), rollout.cache.plan
    after = plan.held(rollout.cache.phase).bytes()
    assert measured == {name: after[name] for name in measured}
    assert sum(measured.values()) < plan.plain.kv_bytes + plan.plain.host_bytes
    assert torch.equal(roll(model, stored(spec, cache_dtype), 30)[0], whole)
    exact, _, _ = roll(model, plain, 30)
    assert error(whole, exact) < (1e-9 if cache_dtype == "model" else 0.02)
    first, rollout, _ = roll(model, spec, 18)
    rest, _, _ = roll(model, spec, 30, state=rollout.snapshot())
    assert torch.equal(torch.cat([first, rest], 2), whole)


def test_a_state_with_other_tensors_than_it_says_is_refused():
    model = TinyModel()
    spec = stored(spec_for(model, W=6), "fp8")
    _, rollout, _ = roll(model, spec, 9)
    state = rollout.snapshot()
    layer = state.cache[0]
    bad = [
        {"scales": layer.tensors["scales"][:, 1:]},
        {"keys": layer.tensors["keys"].float()},
        {"raw": layer.tensors["values"]},
    ]
    for tensors in bad:
        damaged = replace(layer, tensors=layer.tensors | tensors)
        with pytest.raises(ValueError, match="damaged"):
            roll(model, spec, 12, state=replace(state, cache=(damaged, *state.cache[1:])))


def test_refusals():
    model = TinyModel()
    with pytest.raises(ValueError, match="cache_dtype is 'fp4'; it must be one of model, fp8, int8"):
        stored(spec_for(model), "fp4")
    with pytest.raises(ValueError, match="cache_device is 'disk'; it must be one of gpu, host memory"):
        stored(spec_for(model), "model", "disk")
    with pytest.raises(ValueError, match="cache_dtype is fp8, which the device nowhere cannot cast; choose int8"):
        check_cache_dtype("fp8", "nowhere")
    _, rollout, _ = roll(model, spec_for(model), 6)
    state = rollout.snapshot()
    silent = replace(state, spec={name: v for name, v in state.spec.items() if name != "cache_dtype"})
    assert torch.equal(
        roll(model, spec_for(model), 9, state=silent)[0], roll(model, spec_for(model), 9, state=state)[0]
    )
