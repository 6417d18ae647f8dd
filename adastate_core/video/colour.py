"""Colours of video frames: RGB from a frame by its own tags, and frames of RGB in a video's matrix.

A frame is read by arithmetic of our own, to the nearest of 256 values, since PyAV's converter is off by up to 3 and follows
the tags of a frame in its newer versions only. Chroma is repeated over the pixels that share it, alpha is left out. Transfer
and primaries are not converted: an HDR frame keeps its curve and looks flat, as it does in the host.
"""

from __future__ import annotations

import re
from functools import lru_cache

import av
import numpy
from av.video.reformatter import VideoReformatter

# H.273's numbers of matrices, as FFmpeg's AVColorSpace has them, with how much of red and of blue is in luma.
BT709, UNSPECIFIED = 1, 2
_LIMITED, _FULL = 1, 2
_BT601 = (0.299, 0.114)
_LUMA = {
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
    10: (0.2627, 0.0593),  # BT.2020 with constant luminance, read as without
}
_YCGCO = 8
_PLANAR = re.compile(r"yuv(?P<kind>[ja]?)(?P<chroma>4\d\d)p(?P<bits>\d*)(?P<order>le|be)?")
_GRAY = re.compile(r"gray(?P<bits>\d*)(?P<order>le|be)?")
_GBR = re.compile(r"gbra?p(?P<bits>\d*)(?P<order>le|be)?")
# Rows and columns of luma that share one value of chroma.
_SHARED = {"420": (2, 2), "422": (1, 2), "444": (1, 1), "440": (2, 1), "411": (1, 4), "410": (4, 4)}
_CHROMA = {shared: name for name, shared in _SHARED.items()}
_FRACTION = 5  # bits behind the point: with them every sum fits into 16 bits


def rgb(frame: av.VideoFrame) -> numpy.ndarray:
    """A decoded frame as uint8 [height, width, 3], by the matrix and the range that it is tagged with.

    A matrix that is not given, or is none of BT.601, 709, 2020, FCC, 240M and YCgCo, is read as BT.601. A range that is
    not given is limited for YUV, full for gray and yuvj. RGB is full whatever its tag says.
    """
    frame = _plain(frame)
    name = frame.format.name
    if found := _PLANAR.fullmatch(name):
        full = found["kind"] == "j" or frame.color_range == _FULL
        return _from_yuv(_planes(frame, found, 3), _bits(found), int(frame.colorspace), full, _SHARED[found["chroma"]])
    if found := _GRAY.fullmatch(name):
        luma, *_ = _tables(_bits(found), UNSPECIFIED, frame.color_range != _LIMITED)
        bright = luma.take(_planes(frame, found, 1)[0], mode="clip") >> _FRACTION
        return numpy.clip(bright, 0, 255).astype(numpy.uint8)[..., None].repeat(3, 2)
    if (found := _GBR.fullmatch(name)) and _bits(found) > 8:
        green, blue, red = _planes(frame, found, 3)
        return _from_deep([red, green, blue], _bits(found))
    return frame.to_ndarray(format="rgb24")


def frame_of(picture: numpy.ndarray, matrix: int = BT709, converter: VideoReformatter | None = None) -> av.VideoFrame:
    """uint8 RGB [height, width, 3], both even, as a yuv420p frame of limited range.

    `matrix` is BT709, or UNSPECIFIED for BT.601 without a tag. A `converter` that is kept for all frames saves its making.
    """
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    # The ranges as numbers of the converter's own: PyAV before 17 hands them on as they are, and 1 is full there.
    frame = (converter or VideoReformatter()).reformat(
        frame,
        format="yuv420p",
        src_colorspace=5,
        dst_colorspace=BT709 if matrix == BT709 else 5,
        src_color_range=0,
        dst_color_range=0,
    )
    frame.colorspace = matrix
    frame.color_range = _LIMITED if matrix == BT709 else 0
    return frame


def _bits(found: re.Match) -> int:
    return int(found["bits"] or 8)


def _plain(frame: av.VideoFrame) -> av.VideoFrame:
    """The same samples in planes of their own, for formats that hold them otherwise (nv12, p010, yuyv422 ...)."""
    form = frame.format
    if any(pattern.fullmatch(form.name) for pattern in (_PLANAR, _GRAY, _GBR)) or form.name.startswith("xyz"):
        return frame
    bits = form.components[0].bits if form.components else 8
    if form.is_rgb or form.has_palette:
        target = "gbrp16le" if bits > 8 else "rgb24"
    elif len(form.components) < 3:
        target = "gray16le" if bits > 8 else "gray"
    else:
        shared = 4 // form.chroma_height(4), 4 // form.chroma_width(4)
        deep = 8 if bits <= 8 else bits if bits in (9, 10, 12) else 16
        target = f"yuv{_CHROMA.get(shared, '444')}p" + (f"{deep}le" if deep > 8 else "")
    plain = frame.reformat(format=target)
    plain.colorspace, plain.color_range = frame.colorspace, frame.color_range
    return plain


def _planes(frame: av.VideoFrame, found: re.Match, count: int) -> list[numpy.ndarray]:
    """The first planes as arrays [height, width] that share the frame's memory."""
    kind = numpy.dtype(("<u2", ">u2")[found["order"] == "be"] if _bits(found) > 8 else "u1")
    planes = []
    for plane in frame.planes[:count]:
        rows = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[: plane.height]
        planes.append(rows[:, : plane.width * kind.itemsize].view(kind))
    return planes


def _from_deep(parts: list[numpy.ndarray], bits: int) -> numpy.ndarray:
    """Red, green and blue of more than 8 bits, to the nearest of 256 values."""
    luma, *_ = _tables(bits, UNSPECIFIED, True)
    return (luma.take(numpy.stack(parts, -1), mode="clip") >> _FRACTION).astype(numpy.uint8)


@lru_cache(maxsize=16)
def _tables(bits: int, matrix: int, full: bool) -> tuple[numpy.ndarray, ...]:
    """What each code adds, int16 with a fraction: luma to all, Cr to red, Cb and Cr to green, Cb to blue."""
    code, unit = numpy.arange(2**bits, dtype=numpy.float64), 2 ** (bits - 8)
    luma_span, chroma_span = (2**bits - 1,) * 2 if full else (219 * unit, 224 * unit)
    if matrix == _YCGCO and not full:
        chroma_span = luma_span
    luma = (code - (0 if full else 16 * unit)) / luma_span * 255 + 0.5
    chroma = (code - 128 * unit) / chroma_span * 255
    return tuple(
        numpy.round(values * 2**_FRACTION).astype(numpy.int16)
        for values in (luma, *(chroma * weight for weight in _weights(matrix)))
    )


def _weights(matrix: int) -> tuple[float, float, float, float, float, float]:
    """How much of the first and of the second chroma goes to red, green and blue."""
    if matrix == _YCGCO:
        return -1.0, 1.0, 1.0, 0.0, -1.0, -1.0
    red, blue = _LUMA.get(matrix, _BT601)
    green = 1 - red - blue
    return (
        0.0,
        2 * (1 - red),
        -2 * (1 - blue) * blue / green,
        -2 * (1 - red) * red / green,
        2 * (1 - blue),
        0.0,
    )


def _from_yuv(
    planes: list[numpy.ndarray], bits: int, matrix: int, full: bool, shared: tuple[int, int]
) -> numpy.ndarray:
    luma, *weighted = _tables(bits, matrix, full)
    (height, width), (down, across) = planes[0].shape, shared
    rows, columns = planes[1].shape
    out = numpy.empty((rows * down, columns * across, 3), numpy.uint8)
    bright = luma.take(_padded(planes[0], out.shape[:2]), mode="clip").reshape(rows, down, columns * across)
    sums = numpy.empty_like(bright)
    for channel in range(3):
        first, second = weighted[2 * channel : 2 * channel + 2]
        colour = first.take(planes[1], mode="clip") + second.take(planes[2], mode="clip")
        numpy.add(bright, colour.repeat(across, 1)[:, None], out=sums)
        numpy.right_shift(sums, _FRACTION, out=sums)
        numpy.clip(sums, 0, 255, out=sums)
        out[..., channel] = sums.reshape(out.shape[:2])
    return out[:height, :width]


def _padded(plane: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    """A plane whose last row and column are repeated up to a size that chroma divides."""
    if plane.shape == size:
        return plane
    return numpy.pad(plane, [(0, to - at) for at, to in zip(plane.shape, size, strict=True)], mode="edge")
