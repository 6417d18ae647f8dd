"""Frames of more than 8 bits from float pictures, by arithmetic of our own: exact codes of BT.709, to the nearest.

Colour is the mean of the pixels that share it, which is where `colour.rgb` puts it back. RGB is written as it is.
"""

from __future__ import annotations

import av
import numpy

from .colour import BT709

_LIMITED, _FULL = 1, 2
_RED, _BLUE = 0.2126, 0.0722


def deep_frame(picture: numpy.ndarray, pixels: str, chroma: tuple[int, int]) -> av.VideoFrame:
    """float32 RGB [height, width, 3] in 0..1 as a frame: yuv42xp10le of limited range, tagged BT.709, or gbrp16le.

    `chroma`: how many pixels across and down share a colour; they divide the sides.
    """
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], pixels)
    if pixels == "gbrp16le":
        deep = numpy.rint(picture.astype(numpy.float64) * 65535).clip(0, 65535)
        planes = [deep[..., channel] for channel in (1, 2, 0)]
        frame.color_range = _FULL
    else:
        planes = ten_bit_codes(picture, chroma)
        frame.colorspace, frame.color_range = BT709, _LIMITED
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[: plane.height]
        rows[:, : plane.width * 2].view("<u2")[:] = values
    return frame


def ten_bit_codes(picture: numpy.ndarray, chroma: tuple[int, int]) -> list[numpy.ndarray]:
    """Y, Cb and Cr of float32 RGB as codes 64..940 and 64..960, float32, rounded to the nearest."""
    height, width = picture.shape[:2]
    luma = picture @ numpy.array([_RED, 1 - _RED - _BLUE, _BLUE], numpy.float32)
    across, down = chroma
    codes = [64 + 876 * luma]
    for channel, weight in ((2, _BLUE), (0, _RED)):
        colour = (picture[..., channel] - luma) / numpy.float32(2 * (1 - weight))
        shared = colour.reshape(height // down, down, width // across, across).mean((1, 3))
        codes.append(512 + 896 * shared)
    return [numpy.rint(values).clip(4, 1019) for values in codes]
