"""What was measured stream by stream, as a run that was cut finds it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adastate_core.files.whole_file import whole_file


class Kept:
    """What has been measured of one row, by stream: a JSON file, whole after every stream. ValueError for one of other rules."""

    def __init__(self, file: Path, rules: dict[str, Any]) -> None:
        self.file, self.rules = file, json.loads(json.dumps(rules))
        self.streams: dict[str, dict[str, Any]] = {}
        if file.exists():
            kept = json.loads(file.read_text())
            if kept["rules"] != self.rules:
                raise ValueError(f"{file} was measured by other rules than the config's; delete it to measure again")
            self.streams = kept["streams"]

    def keep(self, stream: int, found: dict[str, Any]) -> None:
        self.streams[str(stream)] = self.streams.get(str(stream), {}) | found
        with whole_file(self.file) as file:
            file.write(json.dumps({"rules": self.rules, "streams": self.streams}, indent=1).encode())
