"""The differentiable rollout against the product's own: same values, and gradients as finite differences see them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_denoiser import tiny_denoiser

from adastate_core.anchors import (
    Anchor,
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
    anchor_from,
)
from adastate_core.attention.cached import CachedAttention, plain_attention
from adastate_core.attention.wan import SESSION
from adastate_core.cache.kv_cache import KVCache
from adastate_core.prompts.demo_words import VOCABULARY, prompt
from adastate_core.rollout import ModelGeometry, Rollout, RolloutSpec, Settings
from adastate_core.rope import Layout, Rope
from adastate_core.schedules.noise import noise
from adastate_core.schedules.schedule import Schedule
from adastate_core.schedules.solvers import denoised, renoised
from training.bare_model import BareModel, patch_attention
from training.graph_attention import Frame, Gradients, GraphAttention
from training.parallel import Workers
from training.recurrence import ClipRecurrence, Draws, figures

WORDS = {"terrain": "snow", "pace": "fast", "balloon": "gold", "lantern": "lantern"}
CONFIG = {
    "anchor": {"kind": "adaptive", "state_frames": 1},
    "window_frames": 3,
    "positions": "fixed",
    "window_gradient": True,
    "state_gradient": 7,
    "shift": 5.0,
    "full_noise": 0.3,
    "blur_share": 0.5,
    "blur_most": 0.2,
    "drop_words": 0.0,
}


@pytest.fixture(scope="module")
def model():
    return tiny_denoiser()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["fixed", "packed"])
@pytest.mark.parametrize("window", [3, 5, 6])
@pytest.mark.parametrize(
    "anchor",
    [
        Anchor(), AnchorStatic(2), AnchorEMA(1, 0.9), AnchorMemory(1), AnchorReplay(6), AnchorAdaptive(1), AnchorAdaptive(2),
        AnchorAdaptive(2, True), AnchorAdaptive(1, strength=0.5), AnchorAdaptive(1, freeze_frame=6),
        AnchorAdaptive(1, reset_frames=6),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.sampled(3)
def test_the_rollout_with_gradient_is_the_products(model, anchor, window, positions):
    bare = BareModel(copy.deepcopy(model), prompt(WORDS))
    spec = RolloutSpec(bare.geometry, 1, 4, 4, 3, window, anchor, positions, torch.float32)
    schedule = Schedule.shifted(4, 5.0)
    product = [c.latents for c in Rollout(bare, spec, Settings(5, schedule)).chunks(15)]

    session = GraphAttention(Rope(128, 2, 2), 2, 1, anchor, window, positions)
    ours = []
    for chunk in range(5):
        session.place()
        states = anchor.state_frames

        def draw(step: int, chunk: int = chunk, states: int = states) -> torch.Tensor:
            parts = [noise(5, chunk, step, (1, 16, 3, 4, 4))]
            if states:
                parts.insert(0, noise(5, chunk, step, (1, 16, states, 4, 4), state=True))
            return torch.cat(parts, 2)

        x = draw(0)
        for step, sigma in enumerate(schedule.sigmas):
            x0 = denoised(x, bare.velocity(x, 1000 * sigma, session.begin(3)), sigma)
            if step + 1 < len(schedule.sigmas):
                x = renoised(x0, draw(step + 1), schedule.sigmas[step + 1])
        bare.velocity(x0, 0.0, session.begin(3))
        session.commit(3)
        ours.append(x0[:, :, states:])
    for a, b in zip(ours, product, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_what_chooses_tokens_is_refused_by_name():
    with pytest.raises(ValueError, match="the deep anchor chooses tokens"):
        GraphAttention(Rope(128, 2, 2), 2, 1, AnchorDeep(3, 4, 8), 8, "packed")


class Double(torch.nn.Module):
    """The host feeds its patch embedding float32 whatever the model's dtype is."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.double())


def two_workers() -> list[Workers]:
    workers = [Workers(), Workers()]
    for rank, worker in enumerate(workers):
        worker.rank, worker.world = rank, 2
    return workers


def clip(chunks: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    words = torch.tensor([[VOCABULARY[slot].index(word) for slot, word in WORDS.items()]] * chunks)
    words[1:3, -1] = 1
    return torch.randn(2, 16, 3 * chunks, 4, 4, generator=generator), words[None].expand(2, -1, -1)


class Reference:
    """The same training step through the product's cache, one clip at a time, with no graph at all.

    What carries no gradient in training is taken from a run of `still`, the weights before they moved.
    """

    def __init__(self, still: torch.nn.Module, moved: torch.nn.Module, config: dict) -> None:
        self.still, self.moved, self.config = still, moved, config
        self.anchor = anchor_from(config["anchor"])

    def cache(self) -> CachedAttention:
        window, positions = self.config["window_frames"], self.config["positions"]
        spec = RolloutSpec(
            ModelGeometry(16, 2, 1, 128), 1, 4, 4, 3, window, self.anchor, positions, torch.float64, layers=None
        )
        return CachedAttention(KVCache(spec.plan(), 1), Rope(128, 2, 2), plain_attention)

    def run(self, model, cache, x, sigma, chunk, context, clean=False):
        layout = Layout(
            self.config["positions"], self.anchor.frames, self.config["window_frames"], self.anchor.state_frames,
            cache.cache.anchor_present, cache.cache.window_present, 3 * chunk,
        )  # fmt: skip
        cache.place(layout)
        cache.begin(layout, 3, clean)
        cache.cache._text.clear()
        return model.forward_orig(x, 1000 * sigma, context, transformer_options={SESSION: cache})

    @torch.no_grad()
    def loss(self, latents, words, draws, cuts) -> float:
        total, states = [], self.anchor.state_frames
        for b in range(len(latents)):
            still, moved = self.cache(), self.cache()
            for i in range(words.shape[1]):
                context = prompt({s: VOCABULARY[s][int(n)] for s, n in zip(VOCABULARY, words[b, i], strict=True)})
                context, part = context.double(), slice(3 * i, 3 * i + 3)
                sigma, blur = draws.sigma[b : b + 1, i], float(draws.level[b, i])
                clean, eps = latents[b : b + 1, :, part], draws.content[b : b + 1, :, part]
                start, fresh = draws.state[i, :, b : b + 1]
                one = torch.ones_like(sigma)
                first = self.run(self.still, still, torch.cat([start, eps], 2), one, i, context)
                x0 = start - first[:, :, :states]
                state = start if sigma == 1 else (1 - sigma) * x0 + sigma * fresh
                x = torch.cat([state, (1 - sigma) * clean + sigma * eps], 2)
                past = (1 - blur) * clean + blur * draws.blur[b : b + 1, :, part]
                for model, cache in ((self.still, still), (self.moved, moved)):
                    v = self.run(model, cache, x, sigma, i, context)
                    written = torch.cat([state - sigma * v[:, :, :states], past], 2)
                    self.run(model, cache, written, one * 0, i, context, clean=True)
                    cache.cache.commit(self.anchor, 3 * i, 3)
                total.append((v[:, :, states:] - (eps - clean)).square().mean())
                if i in cuts:
                    moved.cache.restore(still.cache.snapshot())
        return float(torch.stack(total).mean())


@pytest.mark.parametrize("cut_every", [7, 2, 1])
def test_gradients_are_those_of_finite_differences(model, cut_every):
    """A directional derivative over all weights, against the product's cache at two nearby sets of weights.

    `cut_every` 7 lets the gradient cross everything. For 1 and 2 both window and state are cut after those chunks,
    so that the reference can take its whole past from the weights that stand still.
    """
    config = CONFIG | {"state_gradient": cut_every, "window_gradient": cut_every == 7}
    model = copy.deepcopy(model).double()
    model.patch_embedding = Double(model.patch_embedding)
    latents, words = clip()
    latents = latents.double()
    draws = Draws.make(latents.shape, 1, 3, config, 4)
    draws = Draws(*(t.double() if isinstance(t, torch.Tensor) else t for t in vars(draws).values()))
    draws = Draws(*list(vars(draws).values())[:-1], offset=0)
    clips = ClipRecurrence(copy.deepcopy(model), config).double()
    trained = clips.model
    if cut_every == 2:
        config["window_gradient"] = True
        clips.session = lambda *_: _CutAll(clips, latents, cut_every)
    clips(latents, words, draws).mean().backward()
    generator = torch.Generator().manual_seed(1)
    grads = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    direction = {n: torch.randn(g.shape, generator=generator).double() for n, g in grads.items()}
    slope = sum(float((grads[n] * direction[n]).sum()) for n in grads)

    still, moved, step, losses = copy.deepcopy(model), copy.deepcopy(model), 2e-4, []
    patch_attention(still), patch_attention(moved)
    cuts = [i for i in range(4) if (i + 1) % cut_every == 0]
    for sign in (1, -1):
        for (name, parameter), origin in zip(moved.named_parameters(), model.parameters(), strict=True):
            if name in direction:
                parameter.data = origin.data + sign * step * direction[name]
        losses.append(Reference(still, moved, config).loss(latents, words, draws, cuts))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-3)


class _CutAll(GraphAttention):
    """Cuts the window together with the state, at the same chunks."""

    def __init__(self, clips: ClipRecurrence, latents: torch.Tensor, every: int) -> None:
        super().__init__(Rope(128, 2, 2), 2, 1, clips.anchor, 3, "fixed", Gradients(True, every, 0))

    def commit(self, content_frames: int) -> None:
        cut = self.gradients.cuts_state(self.next_chunk)
        super().commit(content_frames)
        for layer in self.layers if cut else ():
            layer.window = [Frame(f.index, f.key.detach(), f.value.detach()) for f in layer.window]
            layer.anchor = {s: Frame(f.index, f.key.detach(), f.value.detach()) for s, f in layer.anchor.items()}


def test_a_state_written_without_gradient_teaches_nothing_across_chunks(model):
    """What the pilot found to decide: with M = 0 no loss of a later chunk reaches the state's own noise path."""
    latents, words = clip()
    draws = Draws.make(latents.shape, 1, 3, CONFIG, 4)
    reached = []
    for writes in (0, 7):
        config = CONFIG | {"state_gradient": writes, "window_gradient": False}
        clips = ClipRecurrence(copy.deepcopy(model), config)
        state = draws.state.clone().requires_grad_()
        errors = clips(latents, words, Draws(**vars(draws) | {"state": state}))
        errors[:, 3].mean().backward()
        reached.append(state.grad[0].abs().sum().item())
    assert reached[0] == 0 < reached[1]


def test_blocks_computed_again_give_the_same_gradients(model):
    latents, words = clip()
    draws = Draws.make(latents.shape, 1, 3, CONFIG, 4)
    grads = []
    for again in (False, True):
        clips = ClipRecurrence(copy.deepcopy(model), CONFIG | {"checkpoint_blocks": again})
        clips(latents, words, draws).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in clips.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-7, rtol=1e-5)


def test_every_anchor_sees_the_same_content_noise():
    shape = torch.Size((4, 16, 12, 4, 4))
    with_state, without = (Draws.make(shape, frames, 3, CONFIG, 11) for frames in (1, 0))
    for name in ("content", "blur", "sigma", "level"):
        assert torch.equal(getattr(with_state, name), getattr(without, name))
    shares = [with_state.share(worker) for worker in two_workers()]
    assert torch.equal(torch.stack([s.content for s in shares], 1).flatten(0, 1), with_state.content)


def test_the_log_singles_out_lanterns_that_come_back():
    words = torch.ones(1, 5, 4, dtype=torch.long)
    words[0, [1, 4], -1] = 0
    errors = torch.zeros(1, 5, 3, 8, 8)
    errors[0, 1] = 5.0
    errors[0, 4, :, 1:3, 5:7] = 2.0
    found = figures(errors, words, torch.ones(1, 5))
    assert found["returns"] == pytest.approx(2.0), "the first showing is no return"
    assert "returns" not in figures(errors, words, torch.full((1, 5), 0.5))
