"""Meters of a running rollout against colours and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from adastate_core.measure.lab_colour import lab, mean_lab
from adastate_core.measure.live_meters import LiveMeters


def flat(*colour: int) -> np.ndarray:
    return np.full((6, 8, 3), colour, dtype=np.uint8)


# published CIE values of the sRGB primaries, white and mid grey under D65
@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
    ],
)
def test_colours_in_lab(colour, lab):
    assert mean_lab([flat(*colour)]) == pytest.approx(lab, abs=0.02)


def test_colour_counts_from_the_first_chunk_and_motion_from_the_frame_before():
    meters = LiveMeters()
    assert meters.measure([(None, flat(255, 255, 255))])["colour"] == 0
    second = meters.measure([(flat(119, 119, 119), flat(0, 0, 0)), (flat(0, 0, 0), flat(0, 0, 0))])
    assert second["colour"] == pytest.approx(100, abs=0.01)
    assert second["motion"] == pytest.approx(119 / 255 / 2, abs=1e-4)
    assert second["contrast"] == second["sharpness"] == 0


@pytest.mark.parametrize("size", [(64, 64), (117, 160), (160, 90)])
def test_the_colour_of_a_large_frame_is_nearly_that_of_all_its_pixels(size):
    draw = np.random.default_rng(3)
    frames = []
    for _ in range(2):
        picture = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size[::-1], Image.BICUBIC)
        frames.append(np.asarray(picture))
    meters = LiveMeters()
    found = [meters.measure([(None, frame)])["colour"] for frame in frames][1]
    whole = [lab(torch.from_numpy(frame.copy()).double() / 255).mean((0, 1)) for frame in frames]
    assert found == pytest.approx(float((whole[1] - whole[0]).norm()), abs=0.5) and found > 2


def test_contrast_and_sharpness_of_stripes():
    stripes = np.zeros((4, 8, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    found = LiveMeters().measure([(None, stripes)])
    assert found["contrast"] == pytest.approx(0.5, abs=1e-5)
    assert found["sharpness"] == pytest.approx(0.5, abs=1e-5)  # 1 across, 0 down
    assert found["motion"] == 0


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        LiveMeters().measure([])
