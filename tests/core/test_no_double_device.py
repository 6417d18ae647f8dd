"""The core on a device with neither float64 nor complex numbers, whose tensors do not mix with the CPU's: same latents."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import test_transitions as transitions
import torch
from no_double_device import NoDoubleDevice, model_on
from systems_fast import latents_of, rollout_of
from test_rollout import ANCHORS, SCHEDULE, spec_for
from tiny_model import TinyModel
from tiny_talking import TinyTalking

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import AnchorDeep, AnchorMemory, AnchorReplay
from adastate_core.cache.byte_plan import CACHE_DEVICES, CACHE_DTYPES
from adastate_core.measure.attention_share import measure_share
from adastate_core.rollout import Rollout, Settings
from adastate_core.weights.presets import PRESETS

NEAR = dict(atol=2e-5, rtol=2e-5)
# a value on the border of two codes may fall to either side
NEAR_CODES = dict(atol=2e-2, rtol=2e-2)


@pytest.fixture
def device():
    with NoDoubleDevice() as device:
        yield device


def test_the_stand_in_refuses_what_such_a_device_refuses(device):
    x, other = torch.zeros(3, 4, device=device), torch.zeros(3, 4)
    refused = [
        lambda: x.double(),
        lambda: torch.zeros(3, dtype=torch.float64, device=device),
        lambda: torch.tensor([1.0, 2.0], dtype=torch.float64).to(device),
        lambda: torch.view_as_complex(x.unflatten(-1, (-1, 2))),
        lambda: x.sum(dtype=torch.float64),
        lambda: torch.zeros(3, dtype=torch.complex64).to(device),
        lambda: x + other,
        lambda: other.add_(x),
        lambda: torch.cat([x, other]),
        lambda: x @ other.T,
        lambda: x.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
        lambda: torch.where(other > 0, x, x),
    ]
    for number, operation in enumerate(refused):
        with pytest.raises((TypeError, RuntimeError), match="does not have it|on one device"):
            pytest.fail(f"{number} gave {operation()}")
    x[:, [0, 1]] = torch.ones(3, 2, device=device)
    x[1].mul_(3.0)
    other.copy_(x + torch.tensor(1.0))
    assert other.tolist() == [[2, 2, 1, 1], [4, 4, 1, 1], [2, 2, 1, 1]] and float(x.sum()) == 10
    assert torch.tensor([1.0, 2.0], device=device).cpu().tolist() == [1, 2]


def rolled_in_two(make, near=NEAR, lengths=(9, 15)) -> None:
    """`make(model, state)` rolled out on the CPU, and on the device with a snapshot and another rollout at every length."""
    expected = latents_of(make(TinyTalking(), None), lengths[-1])
    with NoDoubleDevice() as device:
        model, state, pieces = model_on(device, TinyTalking()), None, []
        for length in lengths:
            rollout = make(model, state)
            pieces.append(latents_of(rollout, length))
            state = rollout.snapshot()
    torch.testing.assert_close(torch.cat(pieces, 2), expected, **near)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.sampled(4, offset=3)
def test_every_preset(name):
    rolled_in_two(lambda model, state: rollout_of(name, model, state=state), lengths=(12, 24))


OTHERS = {
    "memory": AnchorMemory(2, long_rate=0.3, short_rate=0.6),
    "replay": AnchorReplay(9),
    "deep": AnchorDeep(2, 4, 8),
    "deep, not shifted": AnchorDeep(2, 4, 8, shift_selected=False),
}
STORES = [(dtype, place) for place in CACHE_DEVICES for dtype in CACHE_DTYPES]
STORED = ["longlive", "memrope", "causvid", "adaptive", "rolling_forcing", "rolling_sink"]


@pytest.mark.parametrize("name", [*ANCHORS, *OTHERS])
@pytest.mark.parametrize("positions", ["packed", "fixed", "absolute"])
@pytest.mark.sampled(4, offset=3)
def test_every_anchor(name, positions):
    anchor = (ANCHORS | OTHERS)[name]
    if positions == "absolute" and anchor.relative_only or anchor.kind == "deep" and positions != "packed":
        pytest.skip("refused: tested in test_rollout, test_deep_forcing")
    changed = dict(anchor=anchor, window_frames=6, positions=positions, batch=2)
    rolled_in_two(lambda model, state: rollout_of("self_forcing", model, state=state, **changed))


@pytest.mark.parametrize(
    ("name", "cache_dtype", "cache_device"),
    [(name, *store) for i, name in enumerate(STORED) for store in STORES[i % 2 :: 2]],
)
@pytest.mark.sampled(4, offset=3)
def test_every_storage(name, cache_dtype, cache_device):
    changed = dict(cache_dtype=cache_dtype, cache_device=cache_device)
    if name == "adaptive":
        name, changed = "infinity_rope", changed | dict(anchor=ANCHORS["adaptive2"])
    near = NEAR if cache_dtype == "model" else NEAR_CODES
    rolled_in_two(lambda model, state: rollout_of(name, model, state=state, **changed), near)


@pytest.mark.parametrize(("kind", "transition"), transitions.CASES)
@pytest.mark.sampled(4, offset=3)
def test_every_transition(kind, transition):
    expected = transitions.whole(kind, transition)
    with NoDoubleDevice() as device:
        model = model_on(device, transitions.model_of(kind))
        found = latents_of(transitions.make(kind, transition, model), transitions.LENGTH)
    torch.testing.assert_close(found, expected, **NEAR)


@cache
def absorbed_spec(scope, refresh, name="none", positions="packed", cache_dtype="model", cache_device="gpu"):
    settings = AbsorptionSettings(
        ratio=1.0, warmup_frames=12, local_window_frames=3, scope=scope, rank=4, refresh=refresh, monitor_layers=-1,
        monitor_chunks=2,
    )  # fmt: skip
    spec = spec_for(TinyModel(), W=30, anchor=ANCHORS[name], positions=positions)
    return replace(spec, absorption=settings, cache_dtype=cache_dtype, cache_device=cache_device)


ABSORBED = [
    ("head", "never"), ("layer", "never"), ("lowrank", "never"), ("head", "drift"), ("head", "always"), ("layer", "always"),
    ("lowrank", "always"), ("head", "always", "adaptive1"), ("head", "always", "none", "absolute"),
    ("layer", "always", "ema2", "packed", "model", "host memory"), ("head", "always", "static1", "packed", "int8"),
]  # fmt: skip


@pytest.mark.parametrize("numbers", ABSORBED, ids="-".join)
@pytest.mark.sampled(4, offset=3)
def test_absorption_is_solved_and_refreshed(numbers):
    """Over the switch, two measurements and what they solve anew; the corrections, the residuals and the latents."""
    spec, reports = absorbed_spec(*numbers), []

    def make(model, state):
        rollout = Rollout(model, spec, Settings(7, SCHEDULE), state=state)
        reports.append(rollout.absorber)
        return rollout

    near = NEAR_CODES if "int8" in numbers else dict(atol=5e-4, rtol=5e-4)
    rolled_in_two(make, near, lengths=(9, 15, 21))
    here, there = reports[0].report(), reports[-1].report()
    assert there["phase"] == "switched" and any(entry["ridge"] != "inf" for entry in there["residuals"])
    for one, other in zip(
        [*here["residuals"], *here["monitor"]], [*there["residuals"], *there["monitor"]], strict=True
    ):
        for name, number in one.items():
            assert other[name] == (number if name == "ridge" else pytest.approx(number, rel=2e-2, abs=1e-3)), name
    if numbers[1] != "drift":
        assert any(entry["refreshed"] for entry in there["monitor"]) == (numbers[1] == "always")


def test_attention_shares():
    def share(model):
        return measure_share(Rollout(model, spec_for(model, W=6, anchor=ANCHORS["static1"]), Settings(7, SCHEDULE)), 4)

    expected = share(TinyModel())
    with NoDoubleDevice() as device:
        found = share(model_on(device, TinyModel()))
    assert found.labels == expected.labels and found.mean == pytest.approx(expected.mean, abs=1e-5)
