"""An animated WebP that is whole after every picture: its container, written picture by picture.

https://developers.google.com/speed/webp/docs/riff_container: a RIFF file of a header (VP8X), how often it is shown (ANIM), and a
block (ANMF) for each picture. Readers take what the size at its beginning says, which is set last.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

MOST_BYTES = 2**32  # what its size has room for
_ANIMATED = 0x02
_NO_BLEND = 0x02
_PARTS = (b"ALPH", b"VP8 ", b"VP8L")  # what of a still picture goes into an animation


def _block(kind: bytes, data: bytes) -> bytes:
    return kind + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2)


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _blocks(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(kind, data) of the blocks of a WebP, one at a time, as far as the file goes; ValueError if it is none."""
    there = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WEBP":
        raise ValueError("it is no WebP")
    end = min(int.from_bytes(head[4:8], "little") + 8, there)
    while file.tell() + 8 <= end:
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        if file.tell() + size > there:
            return
        data = file.read(size + size % 2)
        yield kind, data[:size]


class GrowingAnimation:
    """A WebP that grows. `add` a still WebP of the same size for each picture; `frames` are how many it holds."""

    def __init__(self, path: Path, width: int, height: int, fps: Fraction) -> None:
        """FileExistsError if there is one."""
        self.path, self._size, self._fps, self.frames = path, (width, height), fps, 0
        self._file = open(path, "x+b")  # noqa: SIM115
        head = bytes([_ANIMATED, 0, 0, 0]) + _three(width - 1) + _three(height - 1)
        # a background that nobody sees; shown again and again
        self._append(b"RIFF\0\0\0\0WEBP" + _block(b"VP8X", head) + _block(b"ANIM", b"\xff" * 4 + b"\0" * 2))

    @property
    def nbytes(self) -> int:
        return self._file.tell()

    def add(self, still: bytes) -> None:
        """A picture as a WebP file of its own."""
        parts = b"".join(_block(kind, data) for kind, data in _blocks(io.BytesIO(still)) if kind in _PARTS)
        until, since = (round((self.frames + step) * 1000 / self._fps) for step in (1, 0))
        place = _three(0) * 2 + _three(self._size[0] - 1) + _three(self._size[1] - 1)
        self._add(place + _three(until - since) + bytes([_NO_BLEND]) + parts)

    def copy(self, source: Path, frames: int) -> Iterator[int]:
        """Copy the first pictures of another animation of the same size and pace; how many there are, after each. ValueError if it
        holds fewer."""
        with open(source, "rb") as file:
            blocks = _blocks(file)
            while self.frames < frames:
                try:
                    kind, data = next(blocks, (b"", b""))
                except ValueError as error:
                    raise ValueError(
                        f"{source.name} cannot be joined to: {error}; put it back, or turn join off"
                    ) from error
                if not kind:
                    break
                if kind == b"ANMF":
                    self._add(data)
                    yield self.frames
        if self.frames < frames:
            raise ValueError(f"{source.name} holds {self.frames} frames of the {frames} that were to be joined")

    def _add(self, data: bytes) -> None:
        self._append(_block(b"ANMF", data))
        self.frames += 1

    def _append(self, data: bytes) -> None:
        """The data first, then the size that counts it."""
        self._file.write(data)
        self._file.flush()
        size = self._file.tell()
        self._file.seek(4)
        self._file.write((size - 8).to_bytes(4, "little"))
        self._file.flush()
        self._file.seek(size)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
