"""The core on CUDA tensors that are not there: no operation over two devices, shapes and dtypes as CUDA's operators give them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_no_double_device as others
import test_transitions as transitions
import torch
from fake_cuda import fake_cuda
from no_double_device import model_on
from systems_fast import latents_of, rollout_of
from test_rollout import ANCHORS, SCHEDULE, spec_for
from tiny_model import TinyModel
from tiny_talking import TinyTalking

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import AnchorDeep
from adastate_core.rollout import Rollout, Settings
from adastate_core.weights.presets import PRESETS

STORES = [store for store in others.STORES if store != ("model", "gpu")]
ABSORBED = {
    "warmup_frames": 12,
    "local_window_frames": 3,
    "rank": 4,
    "monitor_layers": -1,
    "monitor_chunks": 1,
    "ratio": 1.0,
}


def rolled(make, lengths) -> None:
    """Roll out with a snapshot and another rollout at every length; latents and states are the CPU's, the cache CUDA's."""
    with fake_cuda() as (device, mode):
        model, state, reached = model_on(device, TinyTalking()), None, 0
        for length in lengths:
            rollout = make(model, state)
            latents = latents_of(rollout, length)
            sides = rollout.spec.height, rollout.spec.width
            assert latents.shape == (1, 4, length - reached, *sides) and latents.device.type == "cpu"
            assert all(layer.k.device == layer.v.device == device for cache in rollout.past.caches for layer in cache)
            assert rollout.past.reference is None or rollout.past.reference.keys.device == device
            state, reached = rollout.snapshot(), length
            kept = [
                state.pending,
                state.noisy,
                state.hidden,
                state.reference,
                state.first,
                *(t for layer in state.cache for t in layer.tensors.values()),
            ]
            assert all(t.device.type == "cpu" for t in kept if t is not None)
        assert mode.pinned or rollout.spec.blocks > 1


def lengths_of(name):
    return (3, 5) if PRESETS[name].chunk_frames == 1 else (9, 15) if PRESETS[name].reference_rolls else (9, 12)


def test_the_stand_in_refuses_two_devices_and_locked_memory_of_the_gpu():
    with fake_cuda() as (device, _):
        here, there = torch.zeros(3), torch.zeros(3, device=device)
        for operation in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.pin_memory()):
            with pytest.raises(RuntimeError, match="same device|page-locked"):
                operation()
        assert (there + here.pin_memory().to(device, non_blocking=True)).device == device


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.sampled(4, offset=1)
def test_every_preset(name):
    rolled(lambda model, state: rollout_of(name, model, state=state), lengths_of(name))


@pytest.mark.parametrize(
    ("name", "cache_dtype", "cache_device"),
    [(name, *STORES[i % len(STORES)]) for i, name in enumerate(name for name in PRESETS if name != "deep_forcing")],
)
@pytest.mark.sampled(4, offset=1)
def test_every_storage(name, cache_dtype, cache_device):
    changed = dict(cache_dtype=cache_dtype, cache_device=cache_device)
    rolled(lambda model, state: rollout_of(name, model, state=state, **changed), lengths_of(name))


@pytest.mark.parametrize("name", [*ANCHORS, *others.OTHERS])
@pytest.mark.sampled(4, offset=1)
def test_every_anchor(name):
    changed = dict(anchor=(ANCHORS | others.OTHERS)[name], window_frames=6, positions="packed")
    rolled(lambda model, state: rollout_of("self_forcing", model, state=state, **changed), (9, 12))


@pytest.mark.parametrize(("kind", "transition"), transitions.CASES)
@pytest.mark.sampled(4, offset=1)
def test_every_transition(kind, transition):
    with fake_cuda() as (device, _):
        model = model_on(device, TinyModel(layers=1))
        rollout = transitions.make(kind, transition, model)
        assert latents_of(rollout, 12).shape[2] == 12
        assert latents_of(transitions.make(kind, transition, model, rollout.snapshot()), 15).shape[2] == 3


@pytest.mark.parametrize("scope", ["head", "layer", "lowrank"])
@pytest.mark.parametrize(("cache_dtype", "cache_device"), [("model", "gpu"), ("int8", "host memory")])
@pytest.mark.sampled(4, offset=1)
def test_absorption(scope, cache_dtype, cache_device):
    spec = replace(
        spec_for(TinyModel(), W=30, anchor=ANCHORS["static1"]), cache_dtype=cache_dtype, cache_device=cache_device,
        absorption=AbsorptionSettings(scope=scope, refresh="always", **ABSORBED),
    )  # fmt: skip

    def make(model, state):
        return Rollout(model, spec, Settings(7, SCHEDULE), state=state)

    rolled(make, (9, 12, 18))


def test_half_precision_with_tokens_chosen():
    """bfloat16 keys, float32 scores, int64 ids."""
    changed = dict(anchor=AnchorDeep(2, 4, 8, shift_selected=False), window_frames=6, dtype=torch.bfloat16)
    rolled(lambda model, state: rollout_of("deep_forcing", model, state=state, **changed), (12, 15))
