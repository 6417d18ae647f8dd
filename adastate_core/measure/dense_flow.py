"""Dense optical flow without weights, what of it is the camera's, and how well a picture lies half-way between its neighbours.

The flow is DIS (Kroeger et al. 2016), by OpenCV. OpenCV is imported when a flow is asked for and is no requirement of the pack:
its four distributions fill one folder, so that pip would put another one over that which a user's other packs need.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch

FLOW_MEANS = ("flow", "flow_top", "camera_motion", "object_motion", "halfway_error")
# pixels of the long side that flow is found at, at most, and of the short side at least
_LONG, _SHORT = 256, 32
_GRID = 8  # pixels between the points that the camera's motion is fitted to
_TOP = 0.05  # the share of pixels that move most
# pixels beyond which a point counts little for the camera, in one fit after the other: the first ones find the background
_TOLERANCES = (4.0, 1.0, 0.5)


def opencv() -> Any:
    """The module cv2. ValueError, in a sentence, where there is none."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "dense flow needs OpenCV, which is not installed; run `pip install opencv-python-headless` in ComfyUI's environment, "
            "or turn dense_flow off"
        ) from error
    return cv2


class DenseFlow:
    """Measures of a video's pictures, given one after the other; holds two of them, reduced to grey."""

    def __init__(self) -> None:
        self._cv2 = opencv()
        self._dis = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._held: list[numpy.ndarray] = []

    def add(self, picture: numpy.ndarray) -> dict[str, float]:
        """What is known with [h, w, 3] uint8 that was not before: nothing with the first picture, `halfway_error` (of the picture
        before) from the third one on. Lengths are in pixels of the picture."""
        grey, scale = self._reduced(picture)
        found: dict[str, float] = {}
        if self._held:
            found |= _lengths(self._between(self._held[-1], grey) / scale)
        if len(self._held) == 2:
            found["halfway_error"] = self._halfway_error(*self._held, grey)
        self._held = [*self._held[-1:], grey]
        return found

    def _reduced(self, picture: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(grey uint8, its width and height as shares of the picture's)."""
        height, width = picture.shape[:2]
        factor = min(1.0, _LONG / max(height, width))
        factor = max(factor, _SHORT / min(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        way = self._cv2.INTER_AREA if factor < 1 else self._cv2.INTER_LINEAR
        grey = self._cv2.resize(self._cv2.cvtColor(picture, self._cv2.COLOR_RGB2GRAY), size, interpolation=way)
        return grey, numpy.array([size[0] / width, size[1] / height], numpy.float32)

    def _between(self, first: numpy.ndarray, second: numpy.ndarray) -> numpy.ndarray:
        """Where each pixel of the first went, [h, w, 2] as (x, y)."""
        return self._dis.calc(first, second, None)

    def _halfway_error(self, first: numpy.ndarray, middle: numpy.ndarray, last: numpy.ndarray) -> float:
        """Mean absolute difference, 0..1, of the middle picture from the one that the flow from first to last puts half-way."""
        half = self._between(first, last) / 2
        rows, columns = numpy.indices(middle.shape, dtype=numpy.float32)

        def moved(grey: numpy.ndarray, by: float) -> numpy.ndarray:
            places = columns + by * half[..., 0], rows + by * half[..., 1]
            linear, edge = self._cv2.INTER_LINEAR, self._cv2.BORDER_REPLICATE
            return self._cv2.remap(grey.astype(numpy.float32), *places, linear, borderMode=edge)

        between = (moved(first, -1) + moved(last, 1)) / 2
        return float(numpy.abs(between - middle).mean() / 255)


def _lengths(flow: numpy.ndarray) -> dict[str, float]:
    """Mean length of a flow [h, w, 2]; of the 5 % of it that are longest; of the camera's part; of the longest 5 % of the rest."""
    camera = camera_flow(flow)
    return {
        "flow": float(numpy.linalg.norm(flow, axis=-1).mean()),
        "flow_top": _top(flow),
        "camera_motion": math.nan if camera is None else float(numpy.linalg.norm(camera, axis=-1).mean()),
        "object_motion": math.nan if camera is None else _top(flow - camera),
    }


def _top(flow: numpy.ndarray) -> float:
    lengths = numpy.linalg.norm(flow, axis=-1).ravel()
    count = max(1, round(_TOP * lengths.size))
    return float(numpy.partition(lengths, -count)[-count:].mean())


def camera_flow(flow: numpy.ndarray) -> numpy.ndarray | None:
    """The part [h, w, 2] of a flow that one homography makes, as a camera that turns, zooms or passes a plane does. It is fitted to
    most of the picture: what moves otherwise loses its weight. None where no homography fits."""
    from kornia.geometry.homography import find_homography_dlt, find_homography_dlt_iterated

    height, width = flow.shape[:2]
    rows, columns = numpy.mgrid[_GRID // 2 : height : _GRID, _GRID // 2 : width : _GRID]
    start = torch.from_numpy(numpy.stack([columns, rows], -1).reshape(1, -1, 2).astype(numpy.float64))
    end = start + torch.from_numpy(flow[rows, columns].reshape(1, -1, 2).astype(numpy.float64))
    weights = torch.ones(start.shape[:2], dtype=torch.float64)
    if float((end - start).abs().max()) < 1e-6:
        return numpy.zeros_like(flow)
    try:
        found = find_homography_dlt(start, end, weights)
        for tolerance in _TOLERANCES:
            apart = (_through(found, start) - end).norm(dim=-1)
            weights = torch.exp(-(apart**2) / (2 * tolerance**2)) + 1e-6
            found = find_homography_dlt_iterated(start, end, weights, tolerance, 5)
    except RuntimeError:  # points that lie so that no homography can be solved
        return None
    every = numpy.stack(numpy.meshgrid(numpy.arange(width), numpy.arange(height)), -1).reshape(1, -1, 2)
    places = torch.from_numpy(every.astype(numpy.float64))
    made = (_through(found, places) - places)[0].numpy().reshape(height, width, 2)
    return made if numpy.isfinite(made).all() else None


def _through(homography: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Points [1, n, 2] through a homography [1, 3, 3]."""
    from kornia.geometry.linalg import transform_points

    return transform_points(homography, points)
