"""Dense flow on made-up videos whose motion is known, and the camera's part of it."""

from __future__ import annotations

import sys

import numpy
import pytest

from adastate_core.measure.dense_flow import FLOW_MEANS, DenseFlow, camera_flow
from adastate_core.measure.metrics import measure_video

HEIGHT, WIDTH = 144, 256


@pytest.fixture
def flow():
    pytest.importorskip("cv2", reason="OpenCV is no requirement of the pack")
    return DenseFlow()


def texture(seed: int, height: int = 200, width: int = 300, smooth: int = 2) -> numpy.ndarray:
    """[height, width, 3] uint8: random blobs."""
    noise = numpy.random.default_rng(seed).normal(size=(height, width, 3))
    for axis in (0, 1):
        noise = sum(numpy.roll(noise, shift, axis) for shift in range(-smooth, smooth + 1))
    return (127 + 40 * noise / noise.std()).clip(0, 255).astype(numpy.uint8)


GROUND, THING = texture(0), texture(1)


def scene(number: float, camera: tuple[int, int], thing: tuple[int, int]) -> numpy.ndarray:
    """The ground and a square thing on it (7 % of the picture), each moved by (x, y) a picture."""
    ground, square = (tuple(round(number * by) for by in way) for way in (camera, thing))
    picture = numpy.roll(GROUND, ground[::-1], (0, 1))[:HEIGHT, :WIDTH].copy()
    top, left = 45 + square[1], 60 + square[0]
    picture[top : top + 50, left : left + 50] = THING[:50, :50]
    return picture


def last(flow: DenseFlow, pictures: list[numpy.ndarray]) -> dict[str, float]:
    return [flow.add(picture) for picture in pictures][-1]


@pytest.mark.parametrize(
    ("camera", "thing"), [((2, 0), (2, 0)), ((2, 1), (6, 0)), ((0, 0), (4, 3)), ((4, 0), (0, 0)), ((0, 0), (0, 0))]
)
def test_camera_and_objects_are_told_apart(flow, camera, thing):
    found = last(flow, [scene(i, camera, thing) for i in range(4)])
    own = numpy.hypot(thing[0] - camera[0], thing[1] - camera[1])
    assert found["camera_motion"] == pytest.approx(numpy.hypot(*camera), abs=0.1)
    assert found["object_motion"] == pytest.approx(own, abs=0.1 + 0.05 * own)
    share = 2500 / (HEIGHT * WIDTH)
    mean = (1 - share) * numpy.hypot(*camera) + share * numpy.hypot(*thing)
    assert found["flow"] == pytest.approx(mean, abs=0.15)
    assert found["flow_top"] == pytest.approx(max(numpy.hypot(*camera), numpy.hypot(*thing)), abs=0.2)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (64, 64), (16, 200)])
def test_lengths_are_in_the_pictures_own_pixels(flow, height, width):
    picture = texture(2, height, width, smooth=max(2, min(height, width) // 60))
    found = last(flow, [numpy.roll(picture, 3 * i, 1) for i in range(3)])
    assert found["camera_motion"] == pytest.approx(3, abs=0.2)


def test_a_picture_that_is_not_half_way_is_seen(flow):
    smooth = last(flow, [scene(i, (4, 0), (4, 0)) for i in (0, 1, 2)])["halfway_error"]
    jerky = last(DenseFlow(), [scene(i, (4, 0), (4, 0)) for i in (0, 1.75, 2)])["halfway_error"]
    flickering = [scene(i, (4, 0), (4, 0)) for i in (0, 1, 2)]
    flickering[1] = (flickering[1] * 0.8).astype(numpy.uint8)
    assert smooth < 0.01 and jerky > 5 * smooth
    assert last(DenseFlow(), flickering)["halfway_error"] == pytest.approx(0.2 * GROUND.mean() / 255, abs=0.02)


def test_the_cameras_part_is_the_homography_of_most_of_the_picture():
    """A zoom with a turn and a little perspective, written out point by point, and a tenth of the picture that goes elsewhere."""
    matrix = numpy.array([[1.03, -0.02, 1.5], [0.02, 1.03, -2.0], [1e-5, 2e-5, 1.0]])
    flow = numpy.empty((HEIGHT, WIDTH, 2))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            a, b, c = matrix @ (x, y, 1)
            flow[y, x] = a / c - x, b / c - y
    expected = flow.copy()
    flow[40:90, 100:174] += (5, -3)
    found = camera_flow(flow.astype(numpy.float32))
    assert numpy.abs(found - expected).max() < 0.05


def test_the_smallest_picture_is_measured(flow):
    assert all(numpy.isfinite(value) for value in last(flow, [texture(i, 16, 16) for i in range(3)]).values())


def test_a_still_picture_has_no_motion():
    assert not camera_flow(numpy.zeros((48, 64, 2), numpy.float32)).any()


def test_it_is_part_of_the_chunks_rows(flow):
    found = measure_video([scene(i, (2, 0), (2, 0)) for i in range(12)], flow=flow)
    for row in found["chunks"]:
        assert set(FLOW_MEANS) <= set(row)
        assert row["camera_motion"] == pytest.approx(2, abs=0.1) and row["halfway_error"] < 0.01
    plain = measure_video([scene(i, (2, 0), (2, 0)) for i in range(2)])
    assert not set(FLOW_MEANS) & set(plain["chunks"][0])


def test_without_opencv_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless.*or turn dense_flow off"):
        DenseFlow()
