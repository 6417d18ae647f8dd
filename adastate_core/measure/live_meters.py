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

_PIXELS = 2048  # of a frame that its mean colour is taken of
METERS = ("colour", "contrast", "sharpness", "motion")
# sRGB to XYZ, its rows divided by the white point of D65
_TO_XYZ = numpy.array(
    [[0.4339531, 0.3762192, 0.1898277], [0.2126729, 0.7151522, 0.0721750], [0.0177567, 0.1094753, 0.8727680]],
    numpy.float32,
)

_VALUES = numpy.arange(256) / 255
# light of each byte of sRGB; in float32, since powers and roots of a chunk's pixels are what the meters cost
_LINEAR = numpy.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4).astype(numpy.float32)


def mean_lab(frame: numpy.ndarray) -> numpy.ndarray:
    """The mean L*, a*, b* of [h, w, 3] uint8 sRGB, as float64 [3]."""
    xyz = _LINEAR[frame.reshape(-1, 3)] @ _TO_XYZ.T
    f = numpy.cbrt(xyz)
    dark = xyz <= (6 / 29) ** 3
    f[dark] = xyz[dark] / (3 * (6 / 29) ** 2) + 4 / 29
    x, y, z = f.mean(0, dtype=numpy.float64)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


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
        colour = numpy.mean([mean_lab(_sampled(frame)) for _, frame in pairs], axis=0)
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
