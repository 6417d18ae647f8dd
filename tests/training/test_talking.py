"""The talking demo: the trainer's S2V forward against the host's, whole clips against rollouts, the world against its measures."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from slow_liveavatar import Plain
from slow_rollout import gaussian

from adastate_core.audio.demo_ear import RATE, codes, heard
from adastate_core.audio.demo_tones import tones
from adastate_core.audio.resampling import frame_features
from adastate_core.rope import Rope
from adastate_core.schedules.schedule import Schedule
from training.host_models import build_denoiser
from training.latents import word_numbers
from training.optim import Optimiser
from training.talking_attention import REFERENCE_TIME, TalkingClip, TalkingRollout, clip_velocity, condition_turn
from training.talking_export import round_as_exported, scaled
from training.talking_measures import balloon_radius, follows, lantern_height, lantern_right
from training.talking_model import build_talking, condition_tokens, load_talking, sound_of
from training.talking_rollout import rolled_out, seeded_noise
from training.talking_world import LOUDEST, SOFTEST, TalkingScene
from training.teacher_forcing import install
from training.texts import Texts
from training.world import render

FRAMES, WINDOW = 9, 3


def tiny_talking(seed: int = 2, layers: int = 5):
    """One head, injectors at blocks 0 and 4; nothing is at the zero that training begins with."""
    torch.manual_seed(seed)
    text = build_denoiser(128, 64, layers).state_dict()
    model = build_talking(text, layers, 128, 64)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    install(model)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_talking()


@pytest.fixture(scope="module")
def ears():
    """[2, T50, 12]."""
    return torch.cat([codes(tones(3.0, seed)[0], RATE) for seed in (1, 2)])


def latents(seed: int, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(2, 16, frames, 8, 8, generator=torch.Generator().manual_seed(seed))


def words(chunks: int = FRAMES // 3) -> torch.Tensor:
    return torch.stack([word_numbers(TalkingScene.drawn(seed, chunks), chunks) for seed in (3, 4)])


@torch.no_grad()
def test_a_pass_is_the_hosts_own(model):
    """The host takes 25 layers of features, weighs them, and rotates by its own ids."""
    waves = [tones(2.0, seed)[0] for seed in (5, 6)]
    x, context = latents(1, 3), Texts().context(words()[:, 0])
    features = torch.stack([frame_features(heard(wave, RATE)[0], 16, 12) for wave in waves])
    embed = features.transpose(1, 2)[:, None].expand(-1, 25, -1, -1)
    sigma = torch.full((2,), 0.7)
    freqs = model.rope_encode(3, 8, 8, dtype=torch.float32)
    wanted = model.forward_orig(x.clone(), 1000 * sigma, context, audio_embed=embed, freqs=freqs)
    sound = sound_of(model, torch.cat([codes(wave, RATE) for wave in waves]), 3)
    cache = TalkingRollout.begin(model, Rope(128, 4, 4), WINDOW, context, None)
    found = cache.velocity(model, x, 0.7, context, sound)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    # and sound matters
    other = cache.velocity(model, x, 0.7, context, sound_of(model, torch.cat([codes(w, RATE) for w in waves[::-1]]), 3))
    assert (other - found).abs().max() > 1e-2


@torch.no_grad()
def test_condition_tokens_are_the_hosts(model):
    """The host packs 19 motion latents; those of a picture that stands still are all alike."""
    reference, motion = latents(2, 1), latents(3, 1)
    packed, _ = model.frame_packer(motion.expand(-1, -1, 19, -1, -1).clone(), model)
    tokens = condition_tokens(model, reference, motion)
    torch.testing.assert_close(tokens[:, 16:], packed + model.trainable_cond_mask.weight[2])
    patched = model.patch_embedding(reference).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, :16], patched + model.trainable_cond_mask.weight[1])


def test_the_conditions_positions():
    """Rotations by angles made the long way, in float64, at (time, row, column) of each token."""
    grid = [(row, column) for row in range(4) for column in range(4)]
    places = [(REFERENCE_TIME, *cell) for cell in grid] + [(-1.0, *cell) for cell in grid]
    places += [(-3.0, row, column) for row in (0, 3) for column in (0, 3)]
    places += [(time, 0, 0) for time in (-19.0, -14.0, -9.0, -4.0)]
    x = torch.randn(1, len(places), 1, 128, generator=torch.Generator().manual_seed(0))
    turned = Rope.rotate(x, condition_turn(Rope(128, 4, 4), 2.0))
    for token, (time, row, column) in enumerate(places):
        channel = 0
        for position, width in ((time + 2.0, 44), (row, 42), (column, 42)):
            for j in range(0, width, 2):
                angle = position * 10000.0 ** (-j / width)
                a, b = x[0, token, 0, channel].item(), x[0, token, 0, channel + 1].item()
                wanted = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
                assert turned[0, token, 0, channel : channel + 2].tolist() == pytest.approx(wanted, abs=1e-5)
                channel += 2


@torch.no_grad()
@pytest.mark.parametrize("referred", [True, False])
def test_a_whole_clip_is_the_rollout_chunk_by_chunk(model, ears, referred):
    clean, noisy, numbers = latents(4), latents(5), words()
    sigma = torch.tensor([[0.9, 0.5, 0.2], [0.9, 0.5, 0.2]]).repeat_interleave(3, 1)
    condition = condition_tokens(model, latents(6, 1), latents(7, 1)) if referred else None
    rope, texts = Rope(128, 4, 4), Texts()
    context, mask = texts.whole(numbers, 0.0, torch.Generator())
    clip = TalkingClip(rope, 16, FRAMES, 3, mask, WINDOW, 0, 40 if referred else 0)
    sound = sound_of(model, ears, FRAMES)
    whole = clip_velocity(model, clean, noisy, sigma, context, clip, sound, condition)
    contexts = [texts.context(numbers[:, i]) for i in range(3)]
    cache = TalkingRollout.begin(model, rope, WINDOW, contexts[0], condition)
    for i, context in enumerate(contexts):
        part, own = slice(3 * i, 3 * i + 3), sound.frames(3 * i, 3)
        found = cache.velocity(model, noisy[:, :, part], float(sigma[0, 3 * i]), context, own)
        torch.testing.assert_close(found, whole[:, :, part], atol=1e-4, rtol=1e-4)
        cache.velocity(model, clean[:, :, part], 0.0, context, own)
        cache.commit()


@torch.no_grad()
def test_a_rollout_is_the_slow_loops():
    """By whole histories in float64, which the pack's own rollout equals, too (tests/host/test_s2v.py)."""
    trained = tiny_talking(5)
    trained.cond_encoder.bias.zero_()  # what training leaves at its beginning
    wave, picture, context = tones(2.0, 9)[0], latents(9, 1)[:1], Texts().context(words()[:1, 0])
    schedule = Schedule.shifted(2, 5.0)
    slow = Plain(trained.state_dict(), context, seed=7, h=8, w=8, reference=picture, heard=heard(wave, RATE)[0])
    wanted = slow.roll(12, schedule.sigmas, W=WINDOW, mode="packed")["latents"]
    stills = picture.transpose(1, 2).expand(-1, 2, -1, -1, -1)
    ours = rolled_out(
        trained, [context] * 4, codes(wave, RATE), stills, lambda chunk, step: gaussian(7, chunk, step, (1, 16, 3, 8, 8)),
        schedule, WINDOW,
    )  # fmt: skip
    assert float((ours - wanted[:, :, :12]).abs().max()) < 1e-4


def test_gradients_reach_everything_that_is_trained(model, ears):
    clean, noisy, numbers = latents(4), latents(5), words()
    condition = condition_tokens(model, latents(6, 1), latents(7, 1))
    context, mask = Texts().whole(numbers, 0.0, torch.Generator())
    clip = TalkingClip(Rope(128, 4, 4), 16, FRAMES, 3, mask, WINDOW, 0, 40)
    sound = sound_of(model, ears, FRAMES)
    clip_velocity(
        model, clean, noisy, torch.full((2, FRAMES), 0.5), context, clip, sound, condition
    ).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    # the last block's keys of the condition are used, its outputs are not
    assert all(grad is not None and bool(grad.any()) for grad in trained.values())
    assert "frame_packer.proj_2x.weight" in trained and "cond_encoder.weight" not in trained


def test_a_rate_of_its_own_for_what_is_new(model):
    optimiser = Optimiser(model, 1e-3, muon=False, rates={"audio_injector": 4.0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimiser.step(0.4)
    moved = {name: float((p - before[name]).abs().mean().detach()) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    ratio = moved["audio_injector.injector.0.o.weight"] / moved["blocks.0.self_attn.o.weight"]
    assert ratio == pytest.approx(4.0, rel=0.01)


@torch.no_grad()
def test_the_host_reads_the_exported_file(tmp_path, ears):
    """The standard loader finds an S2V model in scaled fp8, which computes what the student computed while it was trained."""
    import comfy.sd

    trained = tiny_talking()
    trained.frame_packer.proj_4x.weight.zero_()
    for parameter in trained.parameters():  # what is kept in bf16 is compared as such
        parameter.copy_(parameter.to(torch.bfloat16))
    path = str(tmp_path / "talking.safetensors")
    save_file(scaled(trained.state_dict()), path, metadata={"format": "pt"})
    assert load_file(path)["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn
    loaded = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
    assert type(loaded.model.model_config).__name__ == "WAN22_S2V"
    round_as_exported(trained)
    stills, contexts = latents(8, 2).transpose(1, 2), [Texts().context(words()[:, i]) for i in range(2)]
    schedule, noise = Schedule.shifted(2, 5.0), seeded_noise(1, (2, 16, 3, 8, 8))
    wanted, read = (
        rolled_out(m, contexts, ears, stills, noise, schedule, WINDOW) for m in (trained, load_talking(path))
    )
    torch.testing.assert_close(read, wanted, atol=1e-4, rtol=1e-4)
    x, context = latents(1, 3), contexts[0]
    sigma = torch.full((2,), 0.7)
    features = torch.stack([frame_features(heard(tones(2.0, seed)[0], RATE)[0], 16, 12) for seed in (5, 6)])
    audio = {"audio_embed": features.transpose(1, 2)[:, None].expand(-1, 25, -1, -1)}
    wanted, found = (m(x.clone(), 1000 * sigma, context, **audio) for m in (trained, loaded.model.diffusion_model))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_demos_file_stays_within_twelve_megabytes():
    """At the shipped demo's sizes, whatever the values are."""
    torch.manual_seed(0)
    weights = build_talking(build_denoiser(256, 1024, 6).state_dict(), 6, 256, 1024).state_dict()
    assert len(save(scaled(weights))) <= 12e6


@pytest.mark.parametrize("seed", [17, 33, 900000019])  # lanterns as blue as their sky, and one that the sun passes
def test_true_pictures_follow_their_sound(seed):
    scene = TalkingScene.drawn(seed, 7, up=True)
    frames = torch.arange(81)
    video, truth = render(scene, frames), scene.truth(frames)
    assert follows(balloon_radius(video, scene), truth["loudness"]) > 0.98
    assert follows(-lantern_height(video), truth["pitch"]) > 0.98
    assert (lantern_height(video) - truth["lantern_y"]).abs().max() < 1
    assert bool(lantern_right(video, scene.lantern_colour).all())
    radius = balloon_radius(video, scene)
    assert radius.min() == pytest.approx(SOFTEST, abs=0.6) and radius.max() < LOUDEST + 0.6
    other = TalkingScene.drawn(18, 7, up=True).truth(frames)
    assert abs(follows(radius, other["loudness"])) < 0.5


def test_what_does_not_move_follows_nothing():
    told = torch.linspace(0, 1, 40)
    assert follows(torch.full((40,), 3.0), told) == 0.0
    assert math.isnan(follows(torch.full((40,), math.nan), told))
    seen = 2 * told + 1
    seen[7] = math.nan
    assert follows(seen, told) == pytest.approx(1.0)
