"""Named tensors and texts in the safetensors format, written tensor by tensor with checksums, and read as a stranger's.

The format (github.com/huggingface/safetensors): a little-endian u64, so many bytes of JSON, then the tensors' bytes without
gaps. JSON gives each tensor's dtype, shape and place, and a map of texts. Every reader of safetensors reads these files.

`checksums`, the first of the texts, is a CRC-32 of the header (with its own eight digits as zeros) and one of each tensor, in
the order of the file, as hexadecimal of a fixed width: zeros are written first and filled in at the end, so that each tensor
is looked at once, while it is written. A CRC finds every single flipped bit and every torn block, at several times the speed of
BLAKE2b, which is below that of a fast disk (benchmarks/state_files.py); against someone who means harm neither helps, since
whoever can change a file can change its checksum. Against that the readers check what they take.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .header_check import Damage, Unreadable, shown
from .text_fault import text_fault
from .whole_file import whole_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUMS = "checksums"
_START = b'{"__metadata__":{"checksums":"'
_DIGITS = 8
# what is hashed and written, or read and hashed, at once: it stays in the processor's cache
_BLOCK = 1 << 21
_MOST_HEADER = 100_000_000


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    new: bool = False,
    beside: Path | None = None,
) -> Path:
    """Write `path` in one piece, as `whole_file` does, which says what `new` and `beside` are. Of tensors that lie elsewhere one
    at a time is copied."""
    path = Path(path)
    order, header, _ = _laid_out(tensors, texts)
    with whole_file(path, new, beside) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        sums = [_write(file, tensors[name]) for name in order]
        place = len(_START) + _DIGITS
        header[place : place + _DIGITS * len(sums)] = "".join(f"{one:08x}" for one in sums).encode()
        header[len(_START) : place] = f"{zlib.crc32(header):08x}".encode()
        file.seek(8)
        file.write(header[: place + _DIGITS * len(sums)])
    return path


def file_bytes(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> int:
    """Bytes of the file that `write_tensors` writes."""
    _, header, end = _laid_out(tensors, texts)
    return 8 + len(header) + end


def _laid_out(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> tuple[list[str], bytearray, int]:
    """The tensors' names in the order of the file, its header with zeros for checksums, and the bytes of all tensors."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each aligned to its own size
    table, end = {}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    blank = "0" * (_DIGITS * (1 + len(order)))
    header = json.dumps({"__metadata__": {CHECKSUMS: blank, **texts}, **table}, separators=(",", ":")).encode()
    return order, bytearray(header + b" " * (-len(header) % 8)), end


def _write(file: IO[bytes], tensor: torch.Tensor) -> int:
    """Write a tensor's bytes; their CRC."""
    data, checksum = memoryview(_bytes_of(tensor.detach().cpu().contiguous())), 0
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        checksum = zlib.crc32(block, checksum)
        file.write(block)
    return checksum


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, of any dtype: the same memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, in bytes after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open file of the format: its `texts` and `entries` in the order of the file. Unreadable for what is not one.

    OSError if it cannot be read at all.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise Unreadable("it is not a safetensors file, or cut off")
        self._header = file.read(length)
        header = parsed(self._header)
        if not isinstance(header, dict):
            raise Unreadable("its header is no table")
        self.texts: dict[str, str] = _texts(header.pop("__metadata__", {}))
        self.entries = sorted((_entry(name, one) for name, one in header.items()), key=lambda e: (e.start, e.end))
        self._data, end = 8 + length, 0
        for entry in self.entries:
            if entry.start != end:
                raise Unreadable(f"the bytes of {shown(entry.name)} are not where the ones before end")
            end = entry.end
        if self._data + end != size:
            raise Unreadable(
                f"it has {size} bytes where its header says {self._data + end}: it is cut off or has grown"
            )

    def check_header(self) -> None:
        """Damage unless the header is as it was written, by its checksum."""
        digits = self.texts.get(CHECKSUMS, "")
        place, count = len(_START), _DIGITS * (1 + len(self.entries))
        if len(digits) != count or self._header[: place + count] != _START + digits.encode():
            raise Damage("its checksums are missing")
        blank = bytearray(self._header)
        blank[place : place + _DIGITS] = b"0" * _DIGITS
        if f"{zlib.crc32(blank):08x}" != digits[:_DIGITS]:
            raise Damage("its header does not match its checksum")

    def read(self, checked: bool) -> dict[str, torch.Tensor]:
        """All tensors, on the CPU. `checked`: Damage, naming the tensor, for one that does not match its checksum."""
        if checked:
            self.check_header()
        tensors = {}
        for i, entry in enumerate(self.entries, 1):
            tensor, checksum = self._read(entry, checked)
            if checked and f"{checksum:08x}" != self.texts[CHECKSUMS][_DIGITS * i : _DIGITS * (i + 1)]:
                raise Damage(f"{shown(entry.name)} does not match its checksum")
            tensors[entry.name] = tensor
        return tensors

    def _read(self, entry: Entry, checked: bool) -> tuple[torch.Tensor, int]:
        try:
            tensor, checksum = torch.empty(entry.shape, dtype=entry.dtype), 0
        except RuntimeError as error:
            size = entry.end - entry.start
            raise MemoryError(f"there is no room in memory for {shown(entry.name)}, {size} bytes") from error
        data = memoryview(_bytes_of(tensor))
        self._file.seek(self._data + entry.start)
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if self._file.readinto(block) != len(block):
                raise Damage(f"{shown(entry.name)} is cut off")
            if checked:
                checksum = zlib.crc32(block, checksum)
        return tensor, checksum


def _entry(name: str, table: Any) -> Entry:
    what = f"the header's entry for {shown(name)}"
    if not isinstance(table, dict) or set(table) != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"{what} is not one of a tensor")
    dtype, shape, offsets = table["dtype"], table["shape"], table["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Unreadable(f"{what} has dtype {shown(dtype)}, which no file of the pack has")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or len(offsets) != 2 or len(shape) > 16:
        raise Unreadable(f"{what} has a shape or place that is no list of whole numbers")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise Unreadable(f"{what} has a place of another size than its shape")
    return Entry(name, DTYPES[dtype], tuple(shape), *offsets)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unreadable("its header's metadata are no texts")
    return metadata


def parsed(text: str | bytes) -> Any:
    """JSON with no name twice, no NaN and no infinity. Unreadable for anything else."""
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its header is not JSON ({text_fault(error)})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise Unreadable("its header has a name twice")
    return table


def _no_constant(name: str) -> Any:
    raise Unreadable(f"its header holds {name} where numbers belong")
