"""Every measure on the world's own renders, where the right answer is known, and on ones spoilt on purpose."""

from __future__ import annotations

import pytest
import torch

from training import measures
from training.world import FPS, LANTERN_STATES, PACE_PIXELS, Scene, render

DOWN = LANTERN_STATES[1]


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, torch.Tensor]]:
    drawn = [Scene.draw(torch.Generator().manual_seed(60 + i), 1, (DOWN,)) for i in range(4)]
    return [(scene, render(scene, torch.arange(10 * FPS))) for scene in drawn]


def test_the_balloon_is_followed(scenes):
    for scene, video in scenes:
        truth = scene.truth(torch.arange(len(video)))
        place = measures.balloon_place(video, scene)
        assert torch.nanmean((place[:, 0] - truth["balloon_x"]).abs()) < 1.0
        assert torch.nanmean((place[:, 1] - truth["balloon_y"]).abs()) < 1.0
        assert measures.balloon_found(video, scene).float().mean() > 0.98
        assert torch.nanmean(measures.balloon_colour_error(video, scene)) < 3
        assert measures.balloon_travel(video, scene) > 1.5
        still = video[:1].expand(64, -1, -1, -1)
        assert measures.balloon_travel(still, scene) == 0


def test_the_ground_flows_as_the_truth_says(scenes):
    for scene, video in scenes:
        assert measures.flow_error(video, scene).median() <= 0.125
        if scene.pace != "fast":  # twice that is beyond what can be told from the pattern's period
            assert measures.pan_speed(video[::2]).median() == pytest.approx(2 * PACE_PIXELS[scene.pace], abs=0.13)
        still = video[:1].expand(64, -1, -1, -1)
        assert measures.flow_error(still, scene).median() == pytest.approx(PACE_PIXELS[scene.pace])


def test_the_sky_tells_the_time(scenes):
    for scene, video in scenes:
        clock, residual = measures.sky_reading(video)
        truth = scene.truth(torch.arange(len(video)))["clock"]
        error = ((clock - truth + 0.5) % 1 - 0.5).abs()
        assert error.quantile(0.9) < 0.02 and residual.quantile(0.9) < 4
        assert measures.clock_rate(video) == pytest.approx(1.0, abs=0.1)
        assert measures.clock_rate(video.flip(0)) == pytest.approx(-1.0, abs=0.1)
        assert measures.clock_rate(video[:1].expand(64, -1, -1, -1)) == 0
        washed = measures.sky_reading(0.5 * video + 0.5 * video.mean(-1, keepdim=True))[1]
        assert washed.mean() > residual.mean() + 5, "faded colours are on no sky"


def test_seams_show(scenes):
    _, video = scenes[0]
    assert measures.seam(video) == pytest.approx(1.0, abs=0.15)
    jumping = video.clone()
    for start in range(9, len(video), 24):
        jumping[start : start + 12] = (jumping[start : start + 12] + 0.1).clamp(0, 1)
    assert measures.seam(jumping) > 2 > measures.seam(jumping, 4)
    assert measures.seam(jumping[5:], 5) > 2


def test_lab_is_the_standards():
    """White, mid grey and the sRGB primaries, as tables of CIE Lab (D65) give them."""
    colours = torch.tensor([[1.0, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 0, 1]])
    expected = torch.tensor([[100.0, 0, 0], [53.39, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    torch.testing.assert_close(measures.lab(colours), expected, atol=0.1, rtol=0.01)
