"""Attention shares against probabilities worked out by hand, and through a rollout whose attention is known."""

from __future__ import annotations

import pytest
import torch
from systems_fast import rollout_of
from tiny_model import TinyModel

from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic
from adastate_core.measure.attention_share import frame_shares, measure_share, measure_shares, share_table
from adastate_core.rollout import ModelGeometry, Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule


def test_shares_are_softmax_masses():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 32, generator=generator), torch.randn(2, 20, 32, generator=generator)
    shares = frame_shares(q, k, heads=4, tokens=4, first_query=4)
    expected = torch.zeros(5)
    for b in range(2):
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            for row in range(4, 12):
                logits = [float(q[b, row, part] @ k[b, j, part]) / 8**0.5 for j in range(20)]
                weights = torch.tensor(logits).exp()
                expected += (weights / weights.sum()).view(5, 4).sum(1) / (2 * 4 * 8)
    torch.testing.assert_close(shares.float(), expected, atol=1e-5, rtol=1e-4)
    assert float(shares.sum()) == pytest.approx(1.0)


class Pointing:
    """A model whose queries look at frames of one brightness: layer 0 nowhere in particular, layer 1 at the past."""

    geometry = ModelGeometry(channels=2, layers=2, heads=1, head_dim=6)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[int] = []

    def velocity(self, x, timestep, attention):
        tokens = x.shape[2] * 4
        mark = torch.zeros(1, tokens, 6)
        mark[..., 2] = (
            8.0 if timestep == 0 else 0.0
        )  # what a clean pass writes stands out; channels 2.. turn with space
        look = torch.zeros(1, tokens, 6)
        attention.attend(0, look, mark, mark)
        look[..., 2] = 8.0
        out = attention.attend(1, look, mark, mark)
        self.seen.append(out.shape[1])
        return torch.zeros_like(x)


@pytest.mark.parametrize("anchor", [Anchor(), AnchorStatic(1), AnchorAdaptive(1)], ids=str)
def test_a_rollouts_shares_name_their_frames(anchor):
    spec = RolloutSpec(Pointing.geometry, 1, 4, 4, 3, 5, anchor, "packed", torch.float32)
    rollout = Rollout(Pointing(), spec, Settings(0, Schedule.shifted(2, 5.0)))
    share = measure_share(rollout, 4)
    past = [f"past {i}" for i in range(-5, 0)]
    front = ["anchor 0"] if anchor.frames else []
    states = ["state 0"] if anchor.state_frames else []
    assert share.labels == [*front, *past, *states, "current 0", "current 1", "current 2"]
    assert len(share.layers) == 2 and all(sum(layer) == pytest.approx(1.0) for layer in share.layers)
    assert share.layers[0] == pytest.approx([1 / len(share.labels)] * len(share.labels), abs=1e-6)
    looked_back = sum(v for name, v in zip(share.labels, share.layers[1], strict=True) if name in (*front, *past))
    assert looked_back > 0.9
    assert share.mean == pytest.approx([(a + b) / 2 for a, b in zip(*share.layers, strict=True)])
    assert rollout.attention.observe is None
    assert share_table([(5, share)])[0]["labels"] == share.labels


def test_a_rollout_that_has_begun_cannot_be_measured():
    spec = RolloutSpec(Pointing.geometry, 1, 4, 4, 3, 3, Anchor(), "packed", torch.float32)
    rollout = Rollout(Pointing(), spec, Settings(0, Schedule.shifted(2, 5.0)))
    list(rollout.chunks(3))
    with pytest.raises(ValueError, match="a fresh rollout"):
        measure_share(rollout, 2)


def test_several_chunks_at_once_have_no_share_of_their_own():
    with pytest.raises(ValueError, match="5 chunks are denoised together, so no pass is a chunk's own"):
        measure_share(rollout_of("rolling_forcing", TinyModel()), 3)


def test_the_share_of_the_past_alone_and_its_course():
    """Of every chunk: what the last one gives is what a measurement of it alone gives, and the past's shares keep their ratios."""

    def rollout():
        spec = RolloutSpec(Pointing.geometry, 1, 4, 4, 3, 5, AnchorStatic(1), "packed", torch.float32)
        return Rollout(Pointing(), spec, Settings(0, Schedule.shifted(2, 5.0)))

    course = measure_shares(rollout(), 4)
    assert len(course) == 4 and course[-1] == measure_share(rollout(), 4)
    assert course[0].past.labels == [] and course[0].past.mean == []
    assert course[1].past.labels == ["anchor 0", "past -2", "past -1"]
    past = course[-1].past
    assert past.labels == ["anchor 0", *(f"past {i}" for i in range(-5, 0))]
    for layer, everything in zip(past.layers, course[-1].layers, strict=True):
        assert sum(layer) == pytest.approx(1.0)
        held = everything[: len(layer)]
        assert layer == pytest.approx([value / sum(held) for value in held])
