"""What it costs that a state knows whether it is whole: writing and reading tensors with checksums and without, in turns.

python3 run.py bench state_files
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import write_table

from adastate_core.files import tensor_file, whole_file
from adastate_core.files.header_check import check_values


def blake2b(data: memoryview, before: int = 0) -> int:
    """BLAKE2b in the place of a CRC; only its speed is looked at."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


class Ways:
    """Each way writes or reads the same tensors in `folder`; what was read is in `held`."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.path, self.tensors = folder / "state.safetensors", tensors
        self.sum, self.fsync = zlib.crc32, os.fsync
        self.held: list[torch.Tensor] = []

    def _write(self, checksum: object, fsync: object) -> None:
        tensor_file.zlib.crc32, whole_file.os.fsync = checksum, fsync
        try:
            tensor_file.write_tensors(self.path, self.tensors, {"format": "x"})
        finally:
            tensor_file.zlib.crc32, whole_file.os.fsync = self.sum, self.fsync

    def library(self) -> None:
        save_file(self.tensors, self.path, metadata={"format": "x"})

    def library_synced(self) -> None:
        self.library()
        whole_file.sync_file(self.path)

    def plain(self) -> None:
        self._write(lambda data, before=0: 0, lambda descriptor: None)

    def crc(self) -> None:
        self._write(self.sum, lambda descriptor: None)

    def blake(self) -> None:
        self._write(blake2b, lambda descriptor: None)

    def crc_synced(self) -> None:
        self._write(self.sum, self.fsync)

    def library_read(self) -> None:
        self.held = [
            tensor.clone() for tensor in load_file(self.path).values()
        ]  # which maps the file and reads nothing yet

    def crc_read(self) -> None:
        with open(self.path, "rb") as file:
            self.held = list(tensor_file.TensorFile(file).read(checked=True).values())

    def whole_read(self) -> None:
        with open(self.path, "rb") as file:
            tensors = tensor_file.TensorFile(file).read(checked=True)
        for name, tensor in tensors.items():
            check_values(name, tensor)
        self.held = list(tensors.values())


WRITES = {
    "library": "safetensors' save_file",
    "plain": "own writer, no checksum, no fsync",
    "crc": "own writer, CRC-32, no fsync",
    "blake": "own writer, BLAKE2b, no fsync",
    "library_synced": "safetensors' save_file, then fsync",
    "crc_synced": "own writer, CRC-32, fsync: as the pack writes",
}
READS = {
    "library_read": "safetensors' load_file, copied to memory",
    "crc_read": "own reader, CRC-32 verified",
    "whole_read": "own reader, CRC-32 verified, no NaN or infinity: as the pack reads",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the system's for temporary files"
    )
    arguments = parser.parse_args()
    layers = 32
    elements = arguments.mib * 2**20 // 2 // layers
    tensors = {f"cache.{i}": torch.randn(elements).bfloat16() for i in range(layers)}
    seconds: dict[str, list[float]] = {name: [] for name in WRITES | READS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ways = Ways(Path(folder), tensors)
        for _ in range(arguments.rounds):
            for name in seconds:
                ways.held = []
                os.sync()
                start = time.perf_counter()
                getattr(ways, name)()
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, label in (WRITES | READS).items():
        base = "library" if name in WRITES else "library_read"
        rate = arguments.mib / statistics.median(seconds[name])
        ratios = [other / one for one, other in zip(seconds[base], seconds[name], strict=True)]
        rows.append([label, f"{rate:.0f}", f"{statistics.median(ratios):.2f}"])
    notes = [
        f"A state of {arguments.mib} MiB in {layers} tensors of bfloat16; medians of {arguments.rounds} rounds, in which all "
        "ways took turns. Time is a ratio to the library's in the same round.",
        "Without fsync the bytes are in the system's memory, not on the disk: those rates are of memory and processor. Reads come "
        "from the system's memory too.",
    ]
    write_table("state-files", "Checksums of states", ["way", "MiB/s", "time to the library's"], rows, notes)


if __name__ == "__main__":
    main()
