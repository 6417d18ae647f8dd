"""Another reader of PNG, TIFF and EXR: by their specifications, byte by byte, with zlib alone beside numpy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy


def png_blocks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, data) of every block, its sum checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        held = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + held)
        found.append((kind, held))
        at += 12 + size
    assert found[-1][0] == b"IEND"
    return found


def png_texts(path: Path) -> dict[str, str]:
    """The texts of a PNG by their names."""
    pairs = [held.split(b"\0", 1) for kind, held in png_blocks(path.read_bytes()) if kind == b"tEXt"]
    return {name.decode("latin-1"): text.decode("latin-1") for name, text in pairs}


def read_png(path: Path) -> numpy.ndarray:
    """[height, width, 3], uint8 or uint16, of a PNG in RGB."""
    blocks = png_blocks(path.read_bytes())
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", blocks[0][1])
    assert (colour, interlaced) == (2, 0)
    raw = zlib.decompress(b"".join(held for kind, held in blocks if kind == b"IDAT"))
    step, row = 3 * bits // 8, width * 3 * bits // 8
    above, rows = bytearray(row), []
    for y in range(height):
        kind, line = raw[y * (row + 1)], bytearray(raw[y * (row + 1) + 1 : (y + 1) * (row + 1)])
        for x in range(row):
            left, up, corner = (line[x - step], above[x], above[x - step]) if x >= step else (0, above[x], 0)
            guess = (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]
            line[x] = (line[x] + guess) % 256
        rows.append(bytes(line))
        above = line
    return numpy.frombuffer(b"".join(rows), ">u2" if bits == 16 else "u1").reshape(height, width, 3)


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda each: abs(guess - each))


def read_tiff(path: Path) -> numpy.ndarray:
    """[height, width, 3] uint16 of a little-endian TIFF in RGB, plain or packed."""
    data = path.read_bytes()
    magic, at = struct.unpack("<4sI", data[:8])
    assert magic == b"II*\0"
    count, tags = struct.unpack("<H", data[at : at + 2])[0], {}
    for entry in range(count):
        tag, kind, number, value = struct.unpack("<HHI4s", data[at + 2 + 12 * entry : at + 14 + 12 * entry])
        size, form = {1: (1, "B"), 2: (1, "s"), 3: (2, "H"), 4: (4, "I"), 5: (8, "Q")}[kind]
        if number * size > 4:
            begin = struct.unpack("<I", value)[0]
            value = data[begin : begin + number * size]
        tags[tag] = struct.unpack(f"<{number}{form}", value[: number * size])
    assert tags[258] == (16, 16, 16) and tags[262] == (2,)
    raw = b""
    for begin, size in zip(tags[273], tags[279], strict=True):
        strip = data[begin : begin + size]
        raw += _unpacked(strip) if tags[259] == (32773,) else strip
    assert tags[259][0] in (1, 32773)
    return numpy.frombuffer(raw, "<u2").reshape(tags[257][0], tags[256][0], 3)


def _unpacked(strip: bytes) -> bytes:
    out, at = bytearray(), 0
    while at < len(strip):
        count = strip[at]
        if count < 128:
            out += strip[at + 1 : at + 2 + count]
            at += 2 + count
        else:
            out += strip[at + 1 : at + 2] * (257 - count if count > 128 else 0)
            at += 2
    return bytes(out)


def read_exr(path: Path) -> numpy.ndarray:
    """[height, width, 3] float32 of an EXR of plain scan lines with the channels B, G and R."""
    data, at, about = path.read_bytes(), 8, {}
    assert struct.unpack("<II", data[:8]) == (20000630, 2)
    while data[at]:
        name, kind = (text.decode() for text in data[at:].split(b"\0", 2)[:2])
        at += len(name) + len(kind) + 2
        size = struct.unpack("<I", data[at : at + 4])[0]
        about[name], at = data[at + 4 : at + 4 + size], at + 4 + size
    at += 1
    assert about["compression"] == b"\0"
    left, top, right, bottom = struct.unpack("<4i", about["dataWindow"])
    width, height = right - left + 1, bottom - top + 1
    held, channels = about["channels"], []
    while held[0]:
        name, _, rest = held.partition(b"\0")
        channels.append((name, struct.unpack("<I", rest[:4])[0]))
        held = rest[16:]
    assert channels == [(b"B", 2), (b"G", 2), (b"R", 2)]
    out = numpy.zeros((height, width, 3), numpy.float32)
    for offset in struct.unpack(f"<{height}Q", data[at : at + 8 * height]):
        y, size = struct.unpack("<iI", data[offset : offset + 8])
        line = numpy.frombuffer(data[offset + 8 : offset + 8 + size], "<f4").reshape(3, width)
        out[y - top] = line[::-1].T
    return out
