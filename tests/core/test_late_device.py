"""Host-memory caches and snapshots on a GPU that does nothing before somebody waits for it: the latents and states of one that
does all at once, and the CPU's."""

from __future__ import annotations

from functools import cache

import pytest
import test_no_double_device as others
import test_transitions as transitions
import torch
from late_device import Event, LateDevice, Stream
from no_double_device import model_on
from systems_fast import rollout_of
from test_rollout import ANCHORS, SCHEDULE
from tiny_model import TinyModel

from adastate_core.anchors import AnchorAdaptive, AnchorMemory, AnchorReplay
from adastate_core.kv_storage import Workspace
from adastate_core.rollout import Rollout, Settings

HOST = "host memory"
KINDS = ("model", "fp8", "int8")
KEPT = {
    "none": ANCHORS["none"],
    "static": ANCHORS["static1"],
    "ema": ANCHORS["ema2"],
    "memory": AnchorMemory(2, long_rate=0.3, short_rate=0.6),
    "replay": AnchorReplay(9),
    "adaptive": ANCHORS["adaptive2"],
    "adaptive, slower": AnchorAdaptive(1, strength=0.5),
}
# a chunk is given up before this pass of it
STOPS = {(3, 2), (4, 1)}


class Stop(Exception):
    pass


def rolled(make, lengths, every_chunk=False, stops=frozenset()):
    """Latents, and tensors of the states: after every length, from which another rollout goes on, or `every_chunk`.

    `make(state, on_step)`. A rollout that is stopped before a pass of `stops` goes on as it is."""
    left, pieces, states, state = set(stops), [], [], None

    def stop(chunk, step, steps, x0):
        if (chunk, step) in left:
            left.remove((chunk, step))
            raise Stop

    for length in lengths:
        rollout = make(state, stop)
        while rollout.emitted < length:
            try:
                for chunk in rollout.chunks(length):
                    pieces.append(chunk.latents.clone())
                    if every_chunk:
                        states.append(tensors_of(rollout.snapshot()))
            except Stop:
                continue
        state = rollout.snapshot()
        states.append(tensors_of(state))
    assert not left
    return torch.cat(pieces, 2), states


def tensors_of(state):
    """As they are now: nothing that lands later may change them."""
    kept = [state.pending, state.hidden, state.recent, state.noisy]
    kept += [t for layer in state.cache for t in layer.tensors.values()]
    kept += [t for t in state.absorption.values() if isinstance(t, torch.Tensor)]
    return [t.clone() for t in kept if t is not None]


def on(when, make, **how):
    """`rolled` on the device; `make(model, state, on_step)`."""
    with LateDevice(when) as late:
        model = model_on(late.device, TinyModel())
        out = rolled(lambda state, stop: make(model, state, stop), **how)
        late.synchronize()
        assert late.from_host and late.to_host
    return out


def same(found, expected):
    """Whether latents and states are the same bits."""
    (latents, states), (others_latents, others_states) = found, expected
    pairs = zip(states, others_states, strict=True)
    return torch.equal(latents, others_latents) and all(
        torch.equal(a.float(), b.float()) for one, other in pairs for a, b in zip(one, other, strict=True)
    )


def check(make, near, **how):
    at_once = on("at once", make, **how)
    expected, _ = rolled(lambda state, stop: make(TinyModel(), state, stop), **how)
    torch.testing.assert_close(at_once[0], expected, **near)
    for when in ("late", "early"):
        assert same(on(when, make, **how), at_once), when


def near_of(cache_dtype):
    return others.NEAR if cache_dtype == "model" else others.NEAR_CODES


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("cache_dtype", KINDS)
def test_anchors(name, cache_dtype):
    """A snapshot in the middle that another rollout goes on from, or one after every chunk."""
    every_chunk = (list(KEPT).index(name) + KINDS.index(cache_dtype)) % 2 == 1
    changed = dict(anchor=KEPT[name], window_frames=6, positions="packed", cache_dtype=cache_dtype, cache_device=HOST)

    def make(model, state, stop):
        return rollout_of("self_forcing", model, state=state, on_step=stop, **changed)

    check(make, near_of(cache_dtype), lengths=(18,) if every_chunk else (12, 18), every_chunk=every_chunk)


@pytest.mark.parametrize(
    ("transition", "cache_dtype"), [("recache", "model"), ("recache", "int8"), ("flush", "model"), ("flush", "fp8")]
)
@pytest.mark.parametrize("name", ["longlive", "memrope"])
def test_transitions(name, transition, cache_dtype):
    """Undone where the chunk is interrupted, and made again."""
    plan = transitions.plan_of(transitions.rows_of(transition), 3)

    def make(model, state, stop):
        return rollout_of(
            name, model, state=state, on_step=stop, prompts=plan, cache_dtype=cache_dtype, cache_device=HOST
        )

    check(make, near_of(cache_dtype), lengths=(18,), stops=STOPS)


@pytest.mark.parametrize(("scope", "name", "cache_dtype"), [("head", "static1", "model"), ("layer", "ema2", "int8")])
@pytest.mark.parametrize("every_chunk", [False, True])
def test_absorption(scope, name, cache_dtype, every_chunk):
    """Caches that shrink, and the monitor's history of what leaves them."""
    spec = others.absorbed_spec(scope, "always", name, "packed", cache_dtype, HOST)

    def make(model, state, stop):
        return Rollout(model, spec, Settings(7, SCHEDULE), state=state, on_step=stop)

    near = others.NEAR_CODES if cache_dtype == "int8" else dict(atol=5e-4, rtol=5e-4)
    check(make, near, lengths=(21,) if every_chunk else (15, 21), every_chunk=every_chunk)
