"""The talking demo's stages: what is drawn for a clip, the ODE's end, and the table."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from adastate_core.audio.demo_ear import RATE, codes, frames_heard
from adastate_core.schedules.schedule import Schedule
from training.codec import encode_clip
from training.few_step import on_path
from training.host_models import build_codec
from training.latents import unit_latents
from training.talking_denoiser import Given, noised, some, weighted
from training.talking_evaluate import STILL, Segment, bars, picture_table, seen, table
from training.talking_find_back import BALLOON, shown, with_true_balloon
from training.talking_latents import clip, load, wrong_clip
from training.talking_trajectories import given_of, solve
from training.talking_world import TalkingScene, WrongBalloon
from training.texts import Texts
from training.world import render

CONFIG = {
    "drop_words": 0.5, "drop_reference": 0.5, "shift": 5.0, "full_noise": 0.2, "blur_share": 0.5, "blur_most": 0.2,
    "subject_weight": 2.0, "first_chunk_weight": 3.0, "trajectories_seed": 3, "window_frames": 3, "long_window": 0.5,
    "long_window_frames": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return partial(encode_clip, build_codec(4))


@pytest.fixture(scope="module")
def clips(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    made = [clip(encoder, seed, 2) for seed in (1, 2)]
    for number, one in enumerate(made):
        save_file({name: value[None] for name, value in one.items()}, folder / f"train_{number:05d}.safetensors")
    return load(str(folder), "train")


@torch.no_grad()
def test_a_clip_is_the_scenes_with_its_sound_and_pictures_of_it(clips, encoder):
    scene = TalkingScene.drawn(2, 2)
    assert clips["latents"].shape == (2, 16, 6, 8, 8) and clips["references"].shape == (2, 4, 2, 16, 8, 8)
    seconds = (12 * 2 + 4) / 16
    assert clips["codes"].shape == (2, frames_heard(round(seconds * RATE)), 12)
    torch.testing.assert_close(clips["codes"][1].float(), codes(scene.waveform, RATE)[0], atol=1e-3, rtol=1e-3)
    # the first reference is the first picture: alone it is the clip's own first latent, standing still another one
    assert torch.equal(clips["references"][1, 0, 0], clips["latents"][1, :, 0])
    still = render(scene, torch.arange(1)).permute(3, 0, 1, 2)[None].expand(-1, -1, 5, -1, -1) * 2 - 1
    wanted = unit_latents(encoder(still)[0])[0, :, 1]
    torch.testing.assert_close(clips["references"][1, 0, 1].float(), wanted, atol=2e-3, rtol=2e-3)


def test_no_clips_are_said_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="there are no clips in .*; run the stage `talking_latents` first"):
        load(str(tmp_path), "train")


def test_words_and_pictures_are_left_out_at_times_and_always_alike(clips):
    drawn = [Given.draw(Texts(), clips, CONFIG, torch.Generator().manual_seed(seed)) for seed in range(24)]
    assert 4 < sum(given.pictures is None for given in drawn) < 20
    assert {given.window for given in drawn} == {3, 12}
    # of the words only the lantern's is always there: 4 slots of a chunk at most
    told = torch.stack([given.mask.sum(-1) for given in drawn]).float()
    assert told.min() >= 1 and told.max() <= 4 and 2.0 < told.mean() < 3.0
    again, generator = given_of(7, type("Losses", (), {"texts": Texts()}), clips, CONFIG)
    other, _ = given_of(7, type("Losses", (), {"texts": Texts()}), clips, CONFIG)
    assert torch.equal(again.mask, other.mask) and again.some(torch.tensor([1])).mask.shape[0] == 1
    both = next(given for given in drawn if given.pictures is not None)
    stills = clips["references"].float()
    for picture in both.pictures:  # one of the clip's own references, in one of its two kinds
        away = (stills - picture[:, None, None, :, 0]).abs().flatten(3).amax(-1)
        assert (away.flatten(1).amin(1) == 0).all()
    noisy, sigma, wanted, past = noised(clips, CONFIG, torch.Generator().manual_seed(0))
    level = sigma[:, None, :, None, None]
    torch.testing.assert_close(noisy - level * wanted, clips["latents"].float(), atol=1e-5, rtol=1e-4)
    assert past.shape == noisy.shape and not torch.equal(past, clips["latents"].float())


def test_a_wrong_past_is_the_same_scene_with_another_balloon(encoder):
    spoken, silent = (wrong_clip(encoder, seed, 2) for seed in (5, 6))
    for made, seed in ((spoken, 5), (silent, 6)):
        scene = TalkingScene.drawn(seed, 2)
        wrong = WrongBalloon.drawn_of(scene.hushed() if seed == 6 else scene, torch.Generator().manual_seed(seed))
        frames = torch.arange(21)
        right, shown = (render(one, frames) for one in (scene.hushed() if seed == 6 else scene, wrong))
        differs = (right - shown).abs().amax((0, 3))
        assert (
            differs.max() > 0.1 and differs[:, 36:].max() == 0 and differs[40:].max() == 0
        )  # but for the balloon's place
        assert not torch.equal(made["past"], made["latents"])
        batch = {name: value[None] for name, value in made.items()}
        plain = CONFIG | {"blur_most": 0.0}
        _, _, _, past = noised(batch, plain, torch.Generator().manual_seed(0))
        torch.testing.assert_close(past, batch["past"].float())
    assert (silent["codes"] == silent["codes"][:1]).all() and not (spoken["codes"] == spoken["codes"][:1]).all()


def test_a_wrong_balloon_has_its_own_size_and_in_half_of_them_its_own_colour():
    scene, generator = TalkingScene.drawn(5, 2).hushed(), torch.Generator().manual_seed(0)
    drawn = [WrongBalloon.drawn_of(scene, generator) for _ in range(200)]
    sizes = torch.tensor([one.truth(torch.arange(1))["balloon_radius"].item() for one in drawn])
    assert sizes.min() < 1 and sizes.max() > 7 and len(sizes.unique()) > 150
    off = torch.stack([one.balloon_rgb() - scene.balloon_rgb() for one in drawn]).norm(dim=1)
    assert 70 < int((off > 0).sum()) < 130 and off.max() > 0.8
    assert len(off[(off > 0) & (off < 0.25)]) > 20  # what a rollout comes to first: a shade beside its own


def test_the_first_chunk_and_the_subjects_count_more():
    errors = torch.zeros(1, 6, 8, 8)
    errors[0, 4, 7, 0] = 1.0
    plain = weighted(errors, CONFIG)
    for place, factor in (((0, 7, 0), 3.0), ((4, 2, 3), 2.0), ((0, 2, 3), 6.0)):
        moved = torch.zeros_like(errors)
        moved[(0, *place)] = 1.0
        assert weighted(moved, CONFIG) / plain == pytest.approx(factor)


def test_the_ode_ends_where_its_velocity_points(clips):
    """A velocity that points at one clip everywhere: every kept level lies on the line there."""
    end = torch.randn(clips["latents"].shape, generator=torch.Generator().manual_seed(4))

    class Straight:
        def velocity(self, codes, given, x, sigma, past):
            assert codes is clips["codes"] and torch.equal(past, clips["latents"].float())
            return (x - end) / sigma[:, None, :, None, None]

    schedule = Schedule.shifted(8, 5.0)
    solved = solve(Straight(), clips, None, schedule, 4, torch.Generator().manual_seed(5))
    torch.testing.assert_close(solved[:, -1], end, atol=1e-4, rtol=1e-4)
    levels = torch.tensor(Schedule.shifted(4, 5.0).sigmas)
    start = solved[:, 0]
    for kept, level in zip(solved[:, :4].unbind(1), levels, strict=True):
        torch.testing.assert_close(kept, end + level * (start - end), atol=1e-4, rtol=1e-4)
    noisy, wanted, sigma = on_path(solved, levels, torch.Generator().manual_seed(6))
    level = sigma.repeat_interleave(3, 1)[:, None, :, None, None]
    torch.testing.assert_close(noisy - level * wanted, end, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", range(4))
def test_a_student_finds_back_from_where_its_rollout_stands(clips, step):
    """A guide that points at the true past, which is told from the wrong one: what it shows lies between that and noise."""
    schedule, wrong = Schedule.shifted(4, 5.0), clips | {"past": clips["latents"] + 1}
    asked = []

    class Guide:
        def velocity(self, codes, given, x, sigma, past):
            asked.append(sigma[0, 0].item())
            return (x - past) / sigma[:, None, :, None, None]

    x, level, v = shown(Guide(), wrong, None, schedule, step, torch.Generator().manual_seed(5))
    assert asked == pytest.approx(schedule.sigmas[: step + 1]) and (level == asked[-1]).all()
    torch.testing.assert_close(x - asked[-1] * v, clips["latents"].float(), atol=1e-4, rtol=1e-4)
    noise = (x - (1 - asked[-1]) * clips["latents"].float()) / asked[-1]
    assert noise.std().item() == pytest.approx(1, abs=0.05) and abs(noise.mean().item()) < 0.05
    again, _, _ = shown(Guide(), wrong, None, schedule, step, torch.Generator().manual_seed(5))
    other, _, _ = shown(Guide(), wrong, None, schedule, step, torch.Generator().manual_seed(6))
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_where_the_balloon_flies_the_clip_shows_the_way(clips):
    noisy, wanted = (torch.randn(2, 16, 6, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    taught = with_true_balloon(wanted, noisy, torch.full((2, 6), 0.625), clips)
    end = noisy - 0.625 * taught
    torch.testing.assert_close(end[BALLOON], clips["latents"].float()[BALLOON], atol=1e-4, rtol=1e-4)
    assert end[BALLOON].shape == (2, 16, 3, 5, 5)
    taught[BALLOON] = wanted[BALLOON]
    assert torch.equal(taught, wanted)


def test_some_clips_are_these(clips):
    assert torch.equal(some(clips, torch.tensor([1]))["words"], clips["words"][1:])


def test_true_pictures_follow_their_own_sound_alone():
    scene, other = (TalkingScene.drawn(seed, 12, up=True) for seed in (21, 22))
    rows = {}
    for segment in (Segment("1x", range(0, 21)), Segment("2x", range(21, 33))):
        frames = torch.tensor(segment.pictures)
        assert frames[0] == (81 if segment.latents.start else 0) and frames[-1] == (
            128 if segment.latents.start else 80
        )
        rows[segment.name] = [seen(render(scene, frames), scene, other, segment)]
        row = rows[segment.name][0]
        assert row["size, own"] > 0.97 and row["height, own"] > 0.97
        assert max(abs(row["size, another"]), abs(row["size, later"])) < 0.6
        assert row["lantern in its colour"] == 1 and row["no balloon"] == 0 and row["terrain right"] > 0.9
    text = table(rows, dict.fromkeys(("own", "another", "silence"), rows))
    own = rows["2x"][0]["size, own"]
    assert text.count("| size, own |") == 2 and f"| {own:.2f} [{own:.2f}, {own:.2f}] |" in text
    silent = {
        name: [one | {"size varies, px": 0.25 * one["size varies, px"]} for one in some] for name, some in rows.items()
    }
    lower = {
        name: [one | {"size, own": 0.5 * one["size, own"], "size, later": one["size, later"] - 0.3} for one in some]
        for name, some in rows.items()
    }
    for (one,) in rows.values():
        one[STILL] = 0.2 * one["size varies, px"]
    asked = bars(rows, {"own": lower, "another": rows, "silence": silent})
    own = [some[0]["size, own"] for some in rows.values()]
    assert f"| {own[0] / 2:.2f}, 0.50 | {own[1] / 2:.2f}, 0.50 |" in asked
    assert "| within .15 | -0.30 | -0.30 |" in asked and "| <= .33 | 0.25 | 0.25 |" in asked
    assert "the median stream | | 0.25 | 0.25 |" in asked
    less = ((0.25**2 - 0.2**2) / (1 - 0.2**2)) ** 0.5
    assert f"taken off (in squares) | | {less:.2f} | {less:.2f} |" in asked
    assert "what the measure sees in them | | 0.20 | 0.20 |" in asked and STILL not in table(
        rows, dict.fromkeys(("own", "another", "silence"), rows)
    )
    shares = {
        "own picture": {"terrain": [1.0], "lantern": [0.5]},
        "another's picture": {"terrain": [0.0], "lantern": [1.0]},
    }
    assert "| another's picture | 0.00 [0.00, 0.00] | 1.00 [1.00, 1.00] |" in picture_table([shares])
