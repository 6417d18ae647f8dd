"""What is trained is what is run: the trainers' parallel forms against the host's own code and the product's rollout."""

from __future__ import annotations

import pytest
import torch

from adastate_core.anchors import Anchor, AnchorStatic
from adastate_core.attention.cached import CachedAttention, plain_attention
from adastate_core.attention.wan import SESSION, cross_attention_forward, self_attention_forward
from adastate_core.cache.kv_cache import KVCache
from adastate_core.prompts.demo_words import VOCABULARY, prompt
from adastate_core.rollout import ModelGeometry, RolloutSpec
from adastate_core.rope import Layout, Rope
from training.codec import decode_clip, encode_clip, normalised, psnr
from training.host_models import LATENT_MEAN, LATENT_STD, build_codec, build_denoiser
from training.latents import word_numbers
from training.optim import Average, Muon, Optimiser, orthogonalise
from training.run import Run
from training.teacher_forcing import ClipAttention, install, velocity
from training.texts import Texts
from training.world import LANTERN_STATES, Scene, chunk_of_frame, render


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    model = build_codec(4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_the_whole_clip_codec_is_the_chunked_one(codec):
    pixels = torch.rand(2, 3, 17, 32, 32) * 2 - 1
    mean, _ = encode_clip(codec, pixels)
    torch.testing.assert_close(mean, codec.encode(pixels), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_clip(codec, mean), codec.decode(mean), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_normalising_the_codec_keeps_its_pictures(codec):
    clips = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    before = decode_clip(codec, encode_clip(codec, clips)[0])
    other = build_codec(4)
    other.load_state_dict(normalised(codec, clips))
    latents, _ = encode_clip(other, clips)
    torch.testing.assert_close(decode_clip(other, latents), before, atol=1e-3, rtol=1e-3)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
    unit = (latents - mean) / std
    assert unit.mean((0, 2, 3, 4)).abs().max() < 1e-3 and (unit.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
    assert psnr(other, clips) == pytest.approx(psnr(codec, clips), abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("window", [3, 6, 18])
@pytest.mark.parametrize("sink", [0, 1, 3])
def test_teacher_forcing_is_the_rollouts_own_attention(window, sink):
    """Every chunk's noisy pass, run through the product's cache filled by its clean passes, gives the same velocity."""
    torch.manual_seed(1)
    model = build_denoiser(128, 64, 2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    frames, rows = 12, 4
    clean, noisy = torch.randn(1, 16, frames, rows, rows), torch.randn(1, 16, frames, rows, rows)
    sigma = torch.tensor([[0.9, 0.3, 1.0, 0.6]]).repeat_interleave(3, 1)
    words = {"terrain": "snow", "pace": "fast", "balloon": "gold", "lantern": "lantern"}
    numbers = torch.tensor([[[VOCABULARY[s].index(w) for s, w in words.items()]] * 4])
    originals = [(b.self_attn.forward, b.cross_attn.forward) for b in model.blocks]
    install(model)
    words_of_all, mask = Texts().whole(numbers, 0.0, torch.Generator())
    clip = ClipAttention(Rope(128, 2, 2), 4, frames, 3, mask, window, sink)
    parallel = velocity(model, clean, noisy, sigma, words_of_all, clip)

    for i, (block, (own, cross)) in enumerate(zip(model.blocks, originals, strict=True)):
        block.self_attn.forward = self_attention_forward(block.self_attn, i, own)
        block.cross_attn.forward = cross_attention_forward(block.cross_attn, i, cross)
    anchor = AnchorStatic(sink) if sink else Anchor()
    spec = RolloutSpec(ModelGeometry(16, 2, 1, 128), 1, rows, rows, 3, window, anchor, "packed", torch.float32)
    attention = CachedAttention(KVCache(spec.plan(), 1), Rope(128, 2, 2), plain_attention)
    context = prompt(words)

    def run(x: torch.Tensor, timestep: float, first: int, is_clean: bool) -> torch.Tensor:
        cache = attention.cache
        layout = Layout("packed", anchor.frames, window, 0, cache.anchor_present, cache.window_present, first)
        attention.place(layout)
        attention.begin(layout, 3, is_clean)
        return model.forward_orig(x, torch.tensor([timestep]), context, transformer_options={SESSION: attention})

    for chunk in range(4):
        part = slice(3 * chunk, 3 * chunk + 3)
        v = run(noisy[:, :, part], 1000 * float(sigma[0, 3 * chunk]), 3 * chunk, False)
        torch.testing.assert_close(parallel[:, :, part], v, atol=2e-5, rtol=2e-5)
        run(clean[:, :, part], 0.0, 3 * chunk, True)
        attention.cache.commit(anchor, 3 * chunk, 3)


def test_left_out_words_are_masked():
    numbers = torch.zeros(200, 3, len(VOCABULARY), dtype=torch.long)
    _, mask = Texts().whole(numbers, 0.25, torch.Generator().manual_seed(0))
    assert mask.shape == (200, 3, sum(map(len, VOCABULARY.values())))
    assert bool(mask[..., -2].all()), "the lantern's word is never left out"
    assert 0.65 < mask[..., 0].float().mean() < 0.85
    assert bool((mask[:, 0] == mask[:, 1]).all())


def test_the_worlds_lantern_moves_at_chunk_borders_and_keeps_its_colour():
    scene = Scene.draw(
        torch.Generator().manual_seed(4), 7, lantern=(LANTERN_STATES[0], *[LANTERN_STATES[1]] * 3, LANTERN_STATES[0])
    )
    assert [int(chunk_of_frame(torch.tensor(f))) for f in (0, 8, 9, 20, 21)] == [0, 0, 1, 1, 2]
    heights = scene.truth(torch.arange(60))["lantern_y"]
    assert bool((heights[:9] == heights[0]).all()) and bool((heights[13:45] < -9).all())
    shown = render(scene, torch.tensor([4, 59]))[:, 18, 46]
    assert torch.allclose(shown[0], shown[1], atol=1e-6)
    assert [scene.words(i)["lantern"] for i in (0, 1, 4, 9)] == [LANTERN_STATES[i] for i in (0, 1, 0, 0)]
    assert word_numbers(scene, 5)[:, -1].tolist() == [0, 1, 1, 1, 0]


def test_the_camera_moves_as_fast_as_the_truth_says():
    scene = Scene.draw(torch.Generator().manual_seed(5), 2)
    picture = render(scene, torch.tensor([0, 20]))
    shift = round(float(scene.truth(torch.tensor([20]))["pan"][0]))
    road = picture[:, 57]
    light = road[1].mean() / road[0].mean()
    assert (road[1, : 64 - shift] - road[0, shift:] * light).abs().mean() < 0.05
    assert (road[1] - road[0] * light).abs().mean() > 0.05


def test_muon_steps_along_an_orthogonal_matrix():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60)))
    assert bool(((values > 0.6) & (values < 1.3)).all())
    weight = torch.nn.Parameter(torch.zeros(8, 4, 3))
    weight.grad = torch.randn(8, 4, 3)
    Muon([weight], lr=1.0).step()
    assert float(weight.detach().norm()) == pytest.approx(0.2 * 12**0.5 * 8**0.5, rel=0.2)


def test_a_run_resumes_to_the_same_weights(tmp_path):
    def train(stop_at: int, fresh: bool) -> torch.Tensor:
        torch.manual_seed(0)
        run = Run({"steps": 6, "seed": 0, "log_every": 2}, tmp_path, fresh)
        model = torch.nn.Linear(4, 4)
        optimiser, average = Optimiser(model, 1e-2), Average(model, 0.9)
        run.resume(model=model, optimiser=optimiser, average=average)
        while run.step < stop_at:
            model(torch.full((1, 4), float(run.step))).square().mean().backward()
            optimiser.step(run.done)
            average.update(model)
            run.advance(loss=0.0)
        run.save()
        return torch.cat([model.weight.flatten(), average.shadow["weight"].flatten()]).detach()

    whole = train(6, fresh=True)
    train(3, fresh=True)
    assert torch.equal(train(6, fresh=False), whole)
