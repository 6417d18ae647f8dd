"""Running meters of a rollout's frames, cheap enough to be taken beside it: how far the picture has drifted, by four numbers.

`colour` is the distance (CIE 1976, in L*a*b* under D65) between the mean colour of a chunk and that of the first one measured;
`contrast`, `sharpness` and `motion` are those of `metrics.frame_meters`. They are for watching one run: they depend
on the size of the frames that are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from .compare import frame_meters
from .lab_colour import mean_lab

_PIXELS = 2048  # of a frame that its mean colour is taken of
METERS = ("colour", "contrast", "sharpness", "motion")


def _sampled(frame: numpy.ndarray) -> numpy.ndarray:
    """At most about 2,000 of a frame's pixels, on a grid: enough for a mean colour."""
    step = math.ceil(math.sqrt(frame.shape[0] * frame.shape[1] / _PIXELS))
    return frame[step // 2 :: step, step // 2 :: step]


class LiveMeters:
    """Meters of chunk after chunk; the first one measured is what `colour` is counted from."""

    def __init__(self) -> None:
        self._first: numpy.ndarray | None = None

    def measure(self, pairs: Sequence[tuple[numpy.ndarray | None, numpy.ndarray]]) -> dict[str, float]:
        """The meters of one chunk by some of its frames [h, w, 3] uint8, each as (the frame before it or None, itself)."""
        if not pairs:
            raise ValueError("there are no frames to measure")
        colour = mean_lab([_sampled(frame) for _, frame in pairs])
        if self._first is None:
            self._first = colour
        each = [frame_meters(frame, before) for before, frame in pairs]
        moving = [meters["motion"] for meters, (before, _) in zip(each, pairs, strict=True) if before is not None]
        return {
            "colour": float(numpy.linalg.norm(colour - self._first)),
            "contrast": float(numpy.mean([meters["contrast"] for meters in each])),
            "sharpness": float(numpy.mean([meters["sharpness"] for meters in each])),
            "motion": float(numpy.mean(moving)) if moving else 0.0,
        }
