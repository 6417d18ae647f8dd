"""Bytes changed by chance: what a bad disk, a cut download and a forger do to any format."""

from __future__ import annotations

import random
import struct

NUMBERS = (0, 1, 2, 7, 255, 256, 32_767, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def number(size: int, chance: random.Random) -> bytes:
    """An extreme number of so many bytes, in either order."""
    return (chance.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, chance.choice(["little", "big"]))


def damaged(data: bytes, chance: random.Random, head: float = 0.5) -> tuple[bytes, str]:
    """(changed bytes, what was done). `head`: the share of the places that lies in the first 600 bytes or in the last 600."""
    done = []
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        how = chance.choice(list(_WAYS))
        data = _WAYS[how](bytearray(data), chance, _place(len(data), chance, head))
        done.append(how)
    return bytes(data), " ".join(done)


def _place(length: int, chance: random.Random, head: float) -> int:
    if not length:
        return 0
    if chance.random() < head:
        place = chance.randrange(min(600, length))
        return place if chance.random() < 0.8 else length - 1 - place
    return chance.randrange(length)


def _flip(data: bytearray, chance: random.Random, at: int) -> bytearray:
    if data:
        data[at] ^= 1 << chance.randrange(8)
    return data


def _byte(data: bytearray, chance: random.Random, at: int) -> bytearray:
    data[at : at + 1] = bytes([chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])])
    return data


def _number(data: bytearray, chance: random.Random, at: int) -> bytearray:
    size = chance.choice([2, 4, 4, 8])
    data[at : at + size] = number(size, chance)[: max(0, len(data) - at)]
    return data


def _cut(data: bytearray, chance: random.Random, at: int) -> bytearray:
    return data[:at] if chance.random() < 0.8 else data[at:]


def _zeros(data: bytearray, chance: random.Random, at: int) -> bytearray:
    count = min(len(data) - at, chance.choice([1, 4, 64, 4096]))
    data[at : at + count] = bytes(count)
    return data


def _noise(data: bytearray, chance: random.Random, at: int) -> bytearray:
    count = min(len(data) - at, chance.choice([1, 4, 64, 1024]))
    data[at : at + count] = chance.randbytes(count)
    return data


def _splice(data: bytearray, chance: random.Random, at: int) -> bytearray:
    """A piece of the file in another place of it: in addition, or over what is there."""
    count, source = chance.choice([4, 16, 100, 3000]), chance.randrange(len(data) or 1)
    piece = data[source : source + count]
    data[at : at + (0 if chance.random() < 0.5 else len(piece))] = piece
    return data


def _drop(data: bytearray, chance: random.Random, at: int) -> bytearray:
    del data[at : at + chance.choice([1, 2, 4, 64, 2000])]
    return data


def _grown(data: bytearray, chance: random.Random, at: int) -> bytearray:
    return data + chance.choice([b"\0" * 5000, bytes(data), chance.randbytes(700), b"\0"])


_WAYS = {
    "flip": _flip,
    "byte": _byte,
    "number": _number,
    "cut": _cut,
    "zeros": _zeros,
    "noise": _noise,
    "splice": _splice,
    "drop": _drop,
    "grown": _grown,
}


def boxes(data: bytes, begin: int = 0, end: int | None = None, depth: int = 0) -> list[tuple[int, int, bytes]]:
    """(begin, end, kind) of every box of an mp4, those in boxes too."""
    found, at, end = [], begin, len(data) if end is None else end
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8 or at + size > end:
            break
        found.append((at, at + size, kind))
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"dinf", b"udta", b"mvex"):
            found += boxes(data, at + 8, at + size, depth + 1)
        at += size
    return found


def damaged_boxes(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """An mp4 whose boxes lie: about their sizes, kinds, and the numbers in them."""
    out, done = bytearray(data), []
    for _ in range(chance.choice([1, 1, 2, 4])):
        every = [box for box in boxes(bytes(out)) if box[2] != b"mdat" or chance.random() < 0.1]
        if not every:
            break
        begin, end, kind = chance.choice(every)
        how = chance.choice(["field", "field", "field", "field", "size", "kind", "drop", "twice"])
        if how == "field" and end - begin > 12:
            size = chance.choice([1, 2, 4, 4, 4, 8])
            at = chance.randrange(begin + 8, max(begin + 9, min(end - size, begin + 120) + 1))
            out[at : at + size] = number(size, chance)
        elif how == "size":
            out[begin : begin + 4] = number(4, chance)
        elif how == "kind":
            out[begin + 4 : begin + 8] = chance.choice(
                [b"free", b"moov", b"trak", b"stsd", b"zzzz", b"\0\0\0\0", b"co64"]
            )
        elif how == "drop":
            del out[begin:end]
        elif how == "twice":
            out[end:end] = out[begin:end]
        done.append(f"{how} {kind!r}")
    return bytes(out), " ".join(done)
