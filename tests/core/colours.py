"""The judge of colours: the formulas of BT.601, 709 and 2020 in float64, and the tags of a file read byte by byte."""

from __future__ import annotations

from pathlib import Path

import av
import numpy

# How much of red and of blue is in luma, by H.273's number of the matrix.
LUMA = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
PATCHES = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 170, 140))


def patches(frames: int, width: int = 64, height: int = 64) -> numpy.ndarray:
    """uint8 [frames, height, width, 3]: a colour in every quarter."""
    picture = numpy.zeros((frames, height, width, 3), numpy.uint8)
    for number, colour in enumerate(PATCHES):
        top, left = number // 2 * (height // 2), number % 2 * (width // 2)
        picture[:, top : top + height // 2, left : left + width // 2] = colour
    return picture


def middles(picture: numpy.ndarray) -> numpy.ndarray:
    """The four colours in the middles of the quarters, float64 [4, 3]."""
    height, width = picture.shape[:2]
    return numpy.array([picture[y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)], numpy.float64)


def yuv_of(picture: numpy.ndarray, matrix: int, full: bool, bits: int = 8) -> numpy.ndarray:
    """RGB of 0..255 [..., 3] as codes of Y, Cb and Cr, float64 [..., 3]."""
    red, blue = LUMA[matrix]
    r, g, b = numpy.moveaxis(numpy.asarray(picture, numpy.float64) / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    unit, most = 2 ** (bits - 8), 2**bits - 1
    if full:
        return numpy.stack([y * most, cb * most + 128 * unit, cr * most + 128 * unit], -1)
    return numpy.stack([16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr], -1) * unit


def rgb_of(codes: numpy.ndarray, matrix: int, full: bool, bits: int = 8) -> numpy.ndarray:
    """The other way round, cut off at 0 and 255."""
    red, blue = LUMA[matrix]
    y, cb, cr = numpy.moveaxis(numpy.asarray(codes, numpy.float64) / 2 ** (bits - 8), -1, 0)
    most = (2**bits - 1) / 2 ** (bits - 8)
    y, cb, cr = (
        (y / most, (cb - 128) / most, (cr - 128) / most)
        if full
        else ((y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224)
    )
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return (numpy.stack([r, g, b], -1) * 255).clip(0, 255)


def codes_of(frame: av.VideoFrame) -> numpy.ndarray:
    """The codes of an 8-bit planar YUV frame as they lie in it, [height, width, 3], chroma repeated."""
    out = []
    for plane in frame.planes[:3]:
        rows = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        down, across = -(-frame.height // plane.height), -(-frame.width // plane.width)
        out.append(rows.repeat(down, 0).repeat(across, 1)[: frame.height, : frame.width])
    return numpy.stack(out, -1)


def made(name: str, planes: list[numpy.ndarray], width: int, height: int) -> av.VideoFrame:
    """A frame of a pixel format with these planes, one row after the other."""
    frame = av.VideoFrame(width, height, name)
    for plane, values in zip(frame.planes, planes, strict=False):
        rows = numpy.zeros((plane.buffer_size // plane.line_size, plane.line_size), numpy.uint8)
        held = numpy.ascontiguousarray(values).view(numpy.uint8).reshape(values.shape[0], -1)
        rows[: held.shape[0], : held.shape[1]] = held
        plane.update(rows.tobytes())
    return frame


def container_tags(path: Path) -> tuple[int, int, int, bool] | None:
    """Primaries, transfer, matrix and full range in an mp4's colr box; None without one."""
    data = path.read_bytes()
    at = data.find(b"colrnclx")
    if at < 0:
        return None
    primaries, transfer, matrix = (int.from_bytes(data[at + 8 + 2 * i : at + 10 + 2 * i], "big") for i in range(3))
    return primaries, transfer, matrix, bool(data[at + 14] >> 7)


class _Bits:
    def __init__(self, data: bytes) -> None:
        clean = data.replace(b"\x00\x00\x03", b"\x00\x00")
        self.bits, self.at = "".join(f"{byte:08b}" for byte in clean), 0

    def take(self, count: int) -> int:
        self.at += count
        return int(self.bits[self.at - count : self.at] or "0", 2)

    def golomb(self) -> int:
        zeros = self.bits.index("1", self.at) - self.at
        self.at += zeros
        return self.take(zeros + 1) - 1


def stream_tags(path: Path) -> tuple[int, int, int, bool] | None:
    """The same four from the H.264 parameter set of an mp4; None where the set does not say. High profile, progressive."""
    data = path.read_bytes()
    at = data.index(b"avcC") + 4
    size = int.from_bytes(data[at + 6 : at + 8], "big")
    bits = _Bits(data[at + 8 : at + 8 + size])
    assert bits.take(8) & 31 == 7
    assert bits.take(8) == 100
    bits.take(16)
    bits.golomb()
    assert bits.golomb() == 1
    bits.golomb(), bits.golomb(), bits.take(1)
    assert bits.take(1) == 0
    bits.golomb()
    order = bits.golomb()
    assert order in (0, 2)
    if order == 0:
        bits.golomb()
    bits.golomb(), bits.take(1), bits.golomb(), bits.golomb()
    assert bits.take(1) == 1
    bits.take(1)
    if bits.take(1):
        [bits.golomb() for _ in range(4)]
    if not bits.take(1):
        return None
    if bits.take(1) and bits.take(8) == 255:
        bits.take(32)
    if bits.take(1):
        bits.take(1)
    if not bits.take(1):
        return None
    bits.take(3)
    full = bool(bits.take(1))
    if not bits.take(1):
        return None
    primaries, transfer, matrix = (bits.take(8) for _ in range(3))
    return primaries, transfer, matrix, full
