"""Tables and rows for the tests of the fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fleet.manifest import Row, read_manifest

ROOT = Path(__file__).resolve().parents[2]
LONG = ROOT / "workflows" / "api" / "long_video.json"


def table(folder: Path, rows: list[dict[str, Any]], name: str = "batch.jsonl") -> Path:
    """A table of the shipped long video; each row gets a name and changes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    lines = [
        json.dumps({"name": f"v{number}", "workflow": str(LONG)} | row) + "\n" for number, row in enumerate(rows, 1)
    ]
    path.write_text("".join(lines))
    return path


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[Row]:
    return read_manifest(table(folder, list(rows)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
