"""What was measured stream by stream, as a run that was cut finds it again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from adastate_core.files.whole_file import whole_file

ENDING = ".json.gz"


def rounded(value: Any) -> Any:
    """Figures to five digits, in whatever they are."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


class Kept:
    """What has been measured of one row, by stream, to five digits: JSON in gzip, a line a stream, whole after every stream.

    ValueError for a file of other rules or weights.
    """

    def __init__(self, file: Path, rules: dict[str, Any], weights: str | None = "") -> None:
        """`weights`: a digest of them where the rules do not hold it; None: they are gone, and those of the file stand."""
        self.file, self.rules, self.weights = file, json.loads(json.dumps(rules)), weights
        self.streams: dict[str, dict[str, Any]] = {}
        if not file.exists():
            return
        kept = read_kept(file)
        self.weights = kept["weights"] if weights is None else weights
        if kept["rules"] != self.rules or kept["weights"] != self.weights:
            raise ValueError(
                f"{file} was measured by other rules or weights than are asked for; delete it to measure again"
            )
        self.streams = kept["streams"]

    def keep(self, stream: int | str, found: dict[str, Any]) -> None:
        """Add to what is known of a stream."""
        self.streams[str(stream)] = self.streams.get(str(stream), {}) | rounded(found)
        told = json.dumps({"rules": self.rules, "weights": self.weights})
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in self.streams.items()]
        write_kept(self.file, f'{told[:-1]}, "streams": {{\n' + ",\n".join(lines) + "}}\n")

    def all(self, count: int, what: str) -> list[Any]:
        """One entry of the first `count` streams."""
        return [self.streams[str(stream)][what] for stream in range(count)]


def write_kept(file: Path, text: str) -> None:
    """JSON in gzip; the same text gives the same bytes."""
    with whole_file(file) as whole:
        whole.write(gzip.compress(text.encode(), mtime=0))


def read_kept(file: Path) -> dict[str, Any]:
    """What is in such a file; one of `Kept` holds "rules", "weights" and "streams"."""
    return json.loads(gzip.decompress(file.read_bytes()))
