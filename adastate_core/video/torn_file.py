"""A growing MP4 or MOV whose end a power cut tore: what was not asked onto the disk may be there in pieces, and one broken header
among it makes FFmpeg refuse the whole file. Its fragments until then are as they were written.

ISO/IEC 14496-12: a box is its length, its kind and what is in it; a fragment is a `moof` with a number (`mfhd`), then its `mdat`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# boxes that are made of boxes
_HOLDERS = (b"moof", b"traf")
# the longest `moof`: one frame's takes about a hundred bytes, a second of sound beside it some thousand
_LONGEST = 1 << 20


class Beginning(io.RawIOBase):
    """The first `size` bytes of a file, for reading."""

    def __init__(self, path: Path, size: int) -> None:
        self._file, self._size = open(path, "rb"), size  # noqa: SIM115
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return (
            self._file.seek(offset + self._size, os.SEEK_SET)
            if whence == os.SEEK_END
            else self._file.seek(offset, whence)
        )

    def readinto(self, buffer: memoryview) -> int:
        data = self._file.read(max(0, min(len(buffer), self._size - self.tell())))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def whole_fragments(path: Path) -> int:
    """Bytes up to the end of the last fragment before which nothing is torn; 0 where the file is none that grows in fragments."""
    end, number = 0, 0
    with open(path, "rb") as file:
        there, place = file.seek(0, os.SEEK_END), 0
        while (found := _box(file, place, there)) is not None:
            kind, size = found
            if kind == b"moof":
                told = _number(file, place, size) if size <= _LONGEST else None
                data = _box(file, place + size, there)
                if told is None or (number and told != number + 1) or data is None or data[0] != b"mdat":
                    break
                number, place = told, place + size + data[1]
                end = place
            elif number:  # something else among the fragments
                break
            else:
                place += size
    return end


def _box(file: IO[bytes], place: int, there: int) -> tuple[bytes, int] | None:
    """(kind, length) of the box at a place, None where no whole one is."""
    file.seek(place)
    head = file.read(8)
    size = int.from_bytes(head[:4], "big")
    return (head[4:], size) if len(head) == 8 and 8 <= size <= there - place else None


def _number(file: IO[bytes], place: int, size: int) -> int | None:
    """The number of a fragment; None if its boxes do not fill it, or it has none."""
    file.seek(place)
    boxes = list(_boxes(file.read(size)))
    numbers = [data for kind, data in boxes if kind == b"mfhd" and len(data) == 8]
    tracks = [kind for kind, _ in boxes if kind in (b"tfhd", b"trun")]
    if len(numbers) != 1 or len(tracks) < 2 or any(kind == b"" for kind, _ in boxes):
        return None
    return int.from_bytes(numbers[0][4:], "big")


def _boxes(data: bytes, depth: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """All boxes in one that holds them, and in those of them that do; one of no kind where they do not fill it."""
    place = 0
    while place < len(data):
        kind, size = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        if not 8 <= size <= len(data) - place or not kind.isalnum():
            yield b"", b""
            return
        inside = data[place + 8 : place + size]
        yield kind, inside
        if kind in _HOLDERS and depth < 2:  # no deeper: a hostile file may nest without end
            yield from _boxes(inside, depth + 1)
        place += size
