"""Manifests that mean harm: tables of a batch, workflows, books, presets, what lies beside videos."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .damage import damaged
from .json_values import VALUES, hostile_json

WORKFLOW = {
    "1": {"class_type": "AdaStateDemoPrompt", "inputs": {"text": "meadow"}},
    "4": {"class_type": "AdaStateStreamOutput", "inputs": {"filename_prefix": "a", "fps": 16.0, "join": False}},
    "5": {
        "class_type": "AdaStateRollout",
        "inputs": {"positive": ["1", 0], "stream": ["4", 0], "length": 33, "width": 64, "height": 64, "seed": 3},
    },
}
SEQUENCE = {"run_id": "abc", "format": "png", "width": 16, "height": 16, "fps": "16", "first_frame": 0}
REPORT = {
    "ended": "whole",
    "error": None,
    "videos": ["a_00001_.mp4"],
    "length": 33,
    "frames_total": 33,
    "prompt_id": "x",
    "warnings": ["one"],
    "stopped": {"by": "file", "frame": 3},
    "state_bytes": 12,
    "prompts": [{"seconds": 0, "text": "a"}],
}
PRESET = """name = "my_model"
title = "Mine"
space = "Wan 2.1"
timesteps = [1000, 750, 500, 250]
shift = 5.0
chunk_frames = 3
window_frames = 21
positions = "packed"
fps = 16.0
anchor = { kind = "static", sink_frames = 3 }
"""
_TOML = (
    "1",
    "-1",
    "1e400",
    "nan",
    "inf",
    "9" * 5000,
    '"a"',
    '""',
    "true",
    "[]",
    "[1]",
    "[[1]]",
    '["a"]',
    "{}",
    "{ a = 1 }",
    "1979-05-27",
    "07:32:00",
    "0x10",
    "'''a\nb'''",
    '"\\ud800"',
    '"\\u0000"',
    "1_000",
    "-0.0",
    "[" * 3000,
    "{ kind = 5 }",
    '{ kind = "adaptive" }',
    '{ kind = "nothing" }',
    '{ kind = "static", sink_frames = 1e9 }',
    '{ kind = "static", sink_frames = -1 }',
    '{ kind = "ema", x = 1 }',
)
_RAW_TABLES = (
    b"",
    b"\n" * 5000,
    b"\xff\xfe",
    b"\x00" * 300,
    b"name,workflow\n",
    b'"',
    b"a\r\n" * 30_000,
    b"[" * 100_000,
    b"{}\n" * 3000,
)


def table(folder: Path, chance: random.Random) -> tuple[Path, str]:
    """A batch's table, or a workflow that it names."""
    rows: list[Any] = [
        {"name": f"v{i}", "workflow": "w.json", "5.seed": i, "5.length": 33, "4.join": True} for i in range(3)
    ]
    (folder / "w.json").write_text(json.dumps(WORKFLOW))
    what = chance.choice(["row", "row", "bytes", "workflow", "workflow", "csv", "csv"])
    if what == "workflow":
        data, done = hostile_json(WORKFLOW, chance)
        if chance.random() < 0.2:
            data, done = damaged(data, chance)
        (folder / "w.json").write_bytes(data)
        what += f" {done}"
    path = folder / ("t.csv" if what == "csv" else "t.jsonl")
    if what == "row":
        lines = [hostile_json(row, chance) if chance.random() < 0.6 else (json.dumps(row).encode(), "") for row in rows]
        data, what = b"\n".join(line for line, _ in lines), f"row {[done for _, done in lines]}"
    elif what == "csv":
        cells = [
            chance.choice([str(value)[:9000], "v1", "w.json", "3", '"', "a,b"]) for value in chance.choices(VALUES, k=4)
        ]
        data = "name,workflow,5.seed,4.join\n" + ",".join(cells) + "\nv2,w.json,1,true\n"
        data = data.encode("utf-8", "surrogatepass")
        what = f"csv {cells!r:.200}"
    else:
        data = "\n".join(map(json.dumps, rows)).encode()
    if what == "bytes":
        data, done = (chance.choice(_RAW_TABLES), "raw") if chance.random() < 0.4 else damaged(data, chance)
        what += f" {done}"
    path.write_bytes(data)
    return path, what


def preset(folder: Path, chance: random.Random, base: str = PRESET) -> tuple[Path, str]:
    """A TOML file that may be a preset."""
    lines = base.splitlines()
    path, done = folder / chance.choice(["mine.toml", "m\u0435.toml"]), []
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(lines))
        name = lines[at].partition(" = ")[0]
        how = chance.choice(["value"] * 6 + ["drop", "twice", "rename", "deep", "more"])
        if how == "value":
            lines[at] = f"{name} = {chance.choice(_TOML)}"
        elif how == "drop" and len(lines) > 1:
            del lines[at]
        elif how == "twice":
            lines.insert(at, lines[at])
        elif how == "rename":
            lines[at] = lines[at].replace(name, chance.choice(["x", '"__class__"', "cached", "name", '""', "a.b.c"]), 1)
        elif how == "deep":
            lines[at] = f"{name} = {'[' * 2000}{']' * 2000}"
        elif how == "more":
            lines.append(f"[{chance.choice(['anchor', 'a.b', 'name'])}]\nx = 1")
        done.append(f"{how} {lines[min(at, len(lines) - 1)][:60]}")
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if chance.random() < 0.15:
        data, more = damaged(data, chance)
        done.append(more)
    if chance.random() < 0.03:
        data += b"#" * 70_000
    path.write_bytes(data)
    return path, "; ".join(done)


def books(folder: Path, chance: random.Random, write: Callable[[Path], None]) -> str:
    """A batch's folder, with lines in its books that are none. `write` makes whole books."""
    write(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    path = chance.choice(paths)
    lines = path.read_bytes().split(b"\n")
    done = []
    for i, line in enumerate(lines):
        if line and chance.random() < 0.6:
            lines[i], what = hostile_json(json.loads(line), chance)
            done.append(what)
    data = b"\n".join(lines)
    if chance.random() < 0.3:
        data, what = damaged(data, chance)
        done.append(what)
    path.write_bytes(data)
    return f"{path.name}: {done!r:.300}"


def lied(value: Any, path: Path, chance: random.Random) -> str:
    """Write a JSON file of `value` that lies."""
    data, done = hostile_json(value, chance)
    if chance.random() < 0.1:
        data, more = damaged(data, chance)
        done += more
    path.write_bytes(data)
    return f"{path.name}: {done}"
