"""The world whose first picture goes out of view: its truth, its pictures against it, and its condition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adastate_core.prompts.demo_words import prompt
from training.bare_model import load_codec
from training.codec import psnr
from training.journey import DAY_FRAMES, REACH, SLOTS, SPEEDS, Scene, render
from training.latents import word_numbers
from training.texts import Texts
from training.world import SIZE, sky_light
from training.worlds import world_of

CODEC = str(Path(__file__).resolve().parents[2] / "models" / "vae" / "adastate_demo_vae.safetensors")


def scene(seed: int, **changed) -> Scene:
    return replace(Scene.draw(torch.Generator().manual_seed(seed), 1), **changed)


def test_most_of_the_first_picture_stays_for_81_pictures_and_nothing_for_481():
    streams = [scene(seed) for seed in range(64)]
    travel = torch.stack([one.truth(torch.tensor([0, 80, 480]))["pan"] for one in streams])
    assert (travel[:, 1] < SIZE / 2).all() and (travel[:, 2] > SIZE).all()
    speeds = travel[:, 1] / 80
    assert speeds.min() < SPEEDS[0] + 0.03 and speeds.max() > SPEEDS[1] - 0.03, "every stream draws its own"
    passed = torch.stack([one.truth(torch.tensor([0, 480]))["borders"][1] for one in streams])
    assert passed.min() >= 1, "the landscape has changed by then"


def test_regions_differ_from_the_two_before_and_have_no_period():
    for seed in range(8):
        kinds = scene(seed).landscape.kinds
        assert (kinds[1:] != kinds[:-1]).all() and (kinds[2:] != kinds[:-2]).all()
        assert all((kinds[lag:] == kinds[:-lag]).float().mean() < 0.9 for lag in range(1, len(kinds) // 2))


def test_the_landscape_moves_as_far_as_the_truth_says():
    """At a quarter of a pixel a picture, 40 pictures are 10 columns; what is on the ground is the same but for the light."""
    one = scene(3, speed=0.25)
    frames = torch.tensor([0, 40])
    light = sky_light(one.truth(frames)["clock"])[:, None, None, None]
    ground = render(one, frames)[:, 52:] / light
    torch.testing.assert_close(ground[1, :, : SIZE - 10], ground[0, :, 10:], atol=1e-4, rtol=1e-4)
    assert (ground[1] - ground[0]).abs().mean() > 0.02
    # between two columns, a column is the mean of its halves: four steps of a quarter make one of a pixel
    quarter = render(one, torch.arange(5))[:, 52:] / sky_light(one.truth(torch.arange(5))["clock"])[:, None, None, None]
    halves = (quarter[0, :, 10:50] + quarter[0, :, 11:51]) / 2
    assert (quarter[2, :, 10:50] - halves).abs().mean() < 0.4 * (quarter[0, :, 10:50] - halves).abs().mean() + 0.01


def test_a_part_of_a_stream_is_the_same_as_in_the_whole():
    one = scene(4)
    whole = render(one, torch.arange(0, 200, 10))
    torch.testing.assert_close(render(one, torch.tensor([150])), whole[15:16], atol=2e-4, rtol=0)


def test_a_day_is_several_horizons_long():
    one = scene(5)
    truth = one.truth(torch.tensor([0, 80, DAY_FRAMES]))
    assert truth["days"].tolist() == pytest.approx([0, 0.125, 1]) and DAY_FRAMES >= 4 * 80
    assert truth["clock"][2] == pytest.approx(float(truth["clock"][0]), abs=1e-5)


def test_the_condition_tells_the_balloon_alone():
    one, other = scene(6), scene(6, speed=SPEEDS[1], clock=0.1, landscape=scene(7).landscape)
    assert tuple(one.words(0)) == SLOTS and one.words(0) == other.words(5)
    context = Texts(SLOTS).context(word_numbers(one, 3)[:1])
    torch.testing.assert_close(context, prompt(one.words(0)))
    _, mask = Texts(SLOTS).whole(word_numbers(one, 3)[None], 0.0, torch.Generator())
    assert mask.sum(-1).unique().tolist() == [len(SLOTS)]


@torch.no_grad()
def test_the_demos_codec_reaches_30_db():
    clips = [render(scene(100 + i), torch.arange(0, 17)).permute(3, 0, 1, 2) * 2 - 1 for i in range(4)]
    assert psnr(load_codec(CODEC), torch.stack(clips)) > 30


def test_what_there_is_no_picture_of_is_refused():
    with pytest.raises(ValueError, match=f"beyond the landscape's {REACH}"):
        render(scene(8), torch.tensor([20_000]))
    with pytest.raises(ValueError, match="size is 32"):
        render(scene(8), torch.tensor([0]), 32)
    with pytest.raises(ValueError, match="world is 'moon'; it must be one of demo, journey"):
        world_of({"world": "moon"})
    assert world_of({}).DAY_FRAMES == 320 and world_of({"world": "journey"}).DAY_FRAMES == DAY_FRAMES
