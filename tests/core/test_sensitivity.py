"""The choice of layers by what the picture owes to their history, against a slow pass; interrupted, resumed, stored otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slow_rollout import SlowAttention, gaussian
from test_absorption import absorbed_spec
from test_rollout import SCHEDULE, W_PIXELS, H, roll
from tiny_model import TinyModel

from adastate_core.absorption import absorber as absorber_module
from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import AnchorAdaptive
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import Rollout, Settings

F, LOCAL = 3, 3


class Stop(Exception):
    pass


class SlowTrial(SlowAttention):
    """Every layer sees all frames, but for one, which sees the first frame, the newest LOCAL ones and the pass's own."""

    def try_without(self, layer, correction):
        self.layer, self.correction, self.all = layer, correction, (self.past, self.past_positions)

    def attend(self, layer, q, k, v):
        frames = len(self.past_positions)
        if layer != self.layer:
            return super().attend(layer, q, k, v)
        near = [0, *range(frames - LOCAL, frames)]
        whole, positions = self.past, self.past_positions
        self.past = {layer: [whole[layer][i] for i in near]}
        self.past_positions = [positions[i] for i in near]
        out = super().attend(layer, q, k, v)
        self.past, self.past_positions = whole, positions
        return out + out @ torch.block_diag(*self.correction.matrix) + self.correction.constant


def test_the_change_is_that_of_a_slow_pass_without_the_layers_history(monkeypatch):
    """semantics: Absorption: which layers."""
    model, asked = TinyModel(layers=3), {}
    changes_without = absorber_module.changes_without

    def kept(corrections, again, fits, on_device):
        asked.update(fits)
        return changes_without(corrections, again, fits, on_device)

    monkeypatch.setattr(absorber_module, "changes_without", kept)
    latents, rollout, _ = roll(model, absorbed_spec(model, ridge=0.3), 12)
    slow = SlowTrial(model.geometry.heads, H // 2, W_PIXELS // 2)
    slow.layer = None
    tokens = (H // 2) * (W_PIXELS // 2)
    for first in range(0, 9, F):  # the newest chunk, which is made again, is not seen
        slow.positions = [float(first + i) for i in range(F)]
        model.velocity(latents[:, :, first : first + F], 0.0, slow)
        for layer, pair in slow.seen.items():
            frames = zip(*(t.split(tokens, 1) for t in pair), strict=True)
            slow.past.setdefault(layer, []).extend(frames)
        slow.past_positions = slow.past_positions + slow.positions
    x, sigma = gaussian(7, 4, 0, latents[:, :, :F].shape), SCHEDULE.sigmas[0]
    slow.positions = [9.0, 10.0, 11.0]
    whole = x - sigma * model.velocity(x, 1000 * sigma, slow)
    for layer, fit in asked.items():
        slow.layer, slow.correction = layer, fit.correction
        changed = x - sigma * model.velocity(x, 1000 * sigma, slow)
        expected = float((changed - whole).square().mean())
        assert rollout.absorber.solution.changes[layer] == pytest.approx(expected, rel=2e-3)
    assert len(asked) == 3


def with_one_layer_that_counts(layer: int) -> TinyModel:
    model = TinyModel(layers=4)
    for i, block in enumerate(model.blocks):
        if i != layer:
            block.o.weight.mul_(1e-3)
    return model


@pytest.mark.parametrize(
    ("storage", "anchor", "batch"),
    [({}, None, 2), ({"cache_dtype": "int8"}, None, 1), ({"cache_device": "host memory"}, AnchorAdaptive(1), 1)],
    ids=["plain", "int8", "host"],
)
def test_every_layer_but_the_one_that_carries_the_history_is_switched(storage, anchor, batch):
    """And the passes by which it is found leave no trace: the run is that of the same layers named beforehand."""
    model = with_one_layer_that_counts(2)
    anchors = {} if anchor is None else {"anchor": anchor}
    spec = replace(absorbed_spec(model, ratio=0.75, window=18, ridge=3.0, **anchors), **storage, batch=batch)
    found, rollout, _ = roll(model, spec, 21)
    assert rollout.absorber.report()["layers"] == [0, 1, 3]
    named = replace(spec.absorption, select="saved", saved_layers=(3, 1, 0))
    expected, other, _ = roll(model, replace(spec, absorption=named), 21)
    assert torch.equal(found, expected)
    assert rollout.absorber.report()["selection_passes"] == 5 and other.absorber.report()["selection_passes"] == 0
    changes = [entry["change"] for entry in rollout.absorber.report()["residuals"]]
    assert max(changes[i] for i in (0, 1, 3)) < 0.1 * changes[2]


def contexts(model, seed):
    return torch.randn(1, 3, model.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stop", [0, 2])
def test_an_interrupt_in_the_passes_keeps_all_before_and_goes_on_bit_for_bit(stop):
    """The passes are made again, under the words of the chunk that they make again."""
    model = TinyModel(layers=3)
    spec = absorbed_spec(model)
    plan = PromptPlan([PromptChange(0, contexts(model, 1)), PromptChange(6, contexts(model, 2), "cut")], F)

    def made(on_step=None, state=None):
        model.set_context(contexts(model, 1))
        return Rollout(model, spec, Settings(7, SCHEDULE), state, True, on_step=on_step, prompts=plan)

    seen = []
    straight = made(lambda *told: seen.append(told[:3]))
    expected = straight.passes(21)
    list(straight.chunks(21))
    assert len(seen) == expected and [told[1] for told in seen if told[2] == 4] == [0, 1, 2, 3]
    assert straight.passes(24) == 3 and made().passes(9) == 9

    def interrupt(chunk, step, steps, x0):
        if (step, steps) == (stop, 4):
            raise Stop

    rollout = made(interrupt)
    with pytest.raises(Stop):
        list(rollout.chunks(21))
    state = rollout.snapshot()
    assert (state.next_frame, state.absorption["phase"]) == (12, "warming")
    rollout.on_step = None
    for one in (rollout, made(state=state)):
        list(one.chunks(21))
        assert torch.equal(one.kept_latents, straight.kept_latents)
        assert one.absorber.solution.changes == straight.absorber.solution.changes


def test_where_nothing_is_to_choose_no_pass_is_made():
    for ratio in (0.0, 1.0):
        assert AbsorptionSettings(ratio=ratio).selection_passes(30) == 0
    assert AbsorptionSettings().selection_passes(30) == 31
    assert AbsorptionSettings(select="residual").selection_passes(30) == 0


def test_a_past_that_is_all_local_before_the_newest_chunk_is_asked_by_the_next_one():
    """Of 6 frames 3 are local, and the newest chunk, which would be made again, is the rest."""
    model = with_one_layer_that_counts(1)
    spec = absorbed_spec(model, window=6, ratio=0.75, sink_frames=0)
    _, rollout, _ = roll(model, spec, 15)
    assert rollout.absorber.report()["layers"] == [0, 2, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"select": "saved"}, "select saved takes the layers of a saved absorption"),
        ({"saved_layers": (1,)}, "saved_layers are given and select is 'sensitivity'"),
        ({"select": "saved", "saved_layers": (1, 1)}, r"saved_layers are \[1, 1\]"),
        ({"select": "saved", "saved_layers": (5,), "ratio": 0.25}, "name layer 5 and the model has 4"),
        ({"select": "saved", "saved_layers": (1,)}, "ratio 0.5 of 4 layers are 2, and saved_layers name 1"),
    ],
)
def test_a_list_of_layers_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        absorbed_spec(TinyModel(layers=4), **settings)
