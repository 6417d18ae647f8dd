"""Every preset through the nodes, with everything at auto, against the loop of its system (tests/core/published_loops.py)."""

from __future__ import annotations

import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorDeep, AnchorEMA
from adastate_pack.adastate_core.rollout import RolloutSpec
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.host import model as adapter
from published_loops import PUBLISHED, DeepForcingCode, LongLive
from test_absorption import DEFAULTS
from test_models import AUTO, latents_of, report_of
from test_prompt_rollout import context, timeline

CASES = {name: (name, loop, PRESETS[name].compared_chunks, {}) for name, loop in PUBLISHED.items()}
CASES["the authors' deep forcing"] = ("deep_forcing", DeepForcingCode, 11, {"anchor": AnchorDeep(shift_selected=False)})


class Bare:
    """The host's model as a slow loop calls it: latents are float64, attention is what the loop says."""

    context = None

    def __init__(self, model, positive, batch=1) -> None:
        self.host = adapter.HostModel(model, positive[0][0], batch)
        spec = RolloutSpec(self.host.geometry, batch, 4, 4, 3, 18, Anchor(), "packed", self.host.dtype)
        self.host.load(spec.plan(16))
        self.geometry, self._text = self.host.geometry, {}

    def set_context(self, context):
        self.host.set_context(context.float())
        self._text = {}

    def velocity(self, x, timestep, loop):
        self.loop = loop
        return self.host.velocity(x.float(), timestep, self).double()

    def attend(self, layer, q, k, v):
        return self.loop.attend(layer, q, k, v).to(q.dtype)

    def uses(self, layer):
        return False

    def takes_unnormed(self, layer, dtype):
        return False

    def kernel(self, q, k, v, heads):
        return self.host.kernel(q, k, v, heads)

    def text(self, layer, key, make):
        if layer not in self._text:
            self._text[layer] = make()
        return self._text[layer]


@pytest.mark.parametrize(("name", "loop", "chunks", "more"), CASES.values(), ids=CASES)
@pytest.mark.sampled(2)
def test_a_preset_through_the_nodes_is_its_published_loop(rollout, model, positive, node, name, loop, chunks, more):
    """In one go, and stopped and gone on with twice."""
    given = node("AdaStateModelPreset")(model=model, preset=name).args[0]

    def made(upto, **resumed):
        return rollout(model=given, length=4 * upto * loop.F - 3, **AUTO, **more, **resumed)

    ours = latents_of(made(chunks))
    with torch.inference_mode():
        slow = loop(Bare(model, positive), seed=5, h=4, w=4).roll(chunks)
        theirs = adapter.to_vae_space(model, slow)
    assert float((ours - theirs).abs().max()) < 1e-4
    first = made(chunks // 3)
    second = made(chunks - 2, resume=first.args[1])
    rest = made(chunks, resume=second.args[1])
    assert torch.equal(latents_of(rest), ours)  # a state keeps the latents that have left


def recached(frames, transition="recache"):
    """Prompts that change at latent frames, at 16 frames a second, by a transition."""
    later = ((frame / 4, context(2 + i), transition) for i, frame in enumerate(frames))
    return timeline((0.0, context(1), "cut"), *later)


@pytest.mark.parametrize("frames", [(9,), (12,), (18,), (6, 15)], ids=str)
def test_longlives_recache_through_the_nodes_is_its_published_one(rollout, model, node, frames):
    """In one go; stopped and gone on with before the chunk of each change, and behind it."""
    given, chunks = node("AdaStateModelPreset")(model=model, preset="longlive").args[0], 9
    prompts = recached(frames)

    def before_chunk(loop):
        if loop.f in frames:
            loop.model.set_context(context(2 + frames.index(loop.f)))
            loop.recache()

    def made(upto, **resumed):
        return rollout(model=given, positive=prompts, length=4 * upto * LongLive.F - 3, **AUTO, **resumed)

    out = made(chunks)
    ours, report = latents_of(out), report_of(out)
    assert report["warnings"] == [] and report["kv_bytes_used"] == report["kv_bytes_planned"]
    with torch.inference_mode():
        bare = Bare(model, [[context(1), {}]])
        slow = LongLive(bare, seed=5, h=4, w=4, before_chunk=before_chunk).roll(chunks)
        theirs = adapter.to_vae_space(model, slow)
    assert float((ours - theirs).abs().max()) < 1e-4
    state = {}
    for upto in sorted({n for frame in frames for n in (frame // 3, frame // 3 + 1)}):
        state = {"resume": made(upto, **state).args[1]}
    assert torch.equal(latents_of(made(chunks, **state)), ours)


def test_a_recache_of_one_pass_is_planned_and_told(rollout, model, node):
    """Its forward is over more frames; what does not go with it is said."""
    given = node("AdaStateModelPreset")(model=model, preset="longlive").args[0]
    more = {"model": given, **AUTO, "width": 64, "height": 64, "length": 93}

    def planned(transition, at=15, **inputs):
        report = report_of(rollout(positive=recached((at,), transition), **(more | inputs)))
        return report["memory_planned"]["device"], report["warnings"]

    (cut, _), (recache, told) = planned("cut"), planned("recache")
    assert told == [] and recache["host_forward"] > 3 * cut["host_forward"] and recache["working"] > cut["working"]
    assert {n for n in cut if cut[n] != recache[n]} == {"host_forward", "working"}
    short, _ = planned("recache", at=3, length=21)
    assert short["host_forward"] < recache["host_forward"]
    ema, told = planned("recache", anchor=AnchorEMA(3))
    assert ema["host_forward"] == cut["host_forward"]
    assert told == [
        "with the ema anchor a recache makes the window again chunk after chunk, and not in the one pass that LongLive makes"
    ]
    assert planned("cut", anchor=AnchorEMA(3))[1] == []
    absorption = node("AdaStateAbsorption")(**DEFAULTS).args[0]
    assert any("with an absorption a recache" in one for one in planned("recache", absorption=absorption)[1])
    text = node("AdaStatePlan")(model=given, width=64, height=64, length=93).args[0]
    assert "a prompt that changes by a recache takes" in text and "one over 12 latent frames" in text
    assert "by a recache" not in node("AdaStatePlan")(model=model, width=64, height=64, length=93).args[0]
