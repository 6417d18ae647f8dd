"""What a row that was begun before has left in its folder: a whole video, a state to go on from, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .graph import Course, Graph, behind, resumed
from .reading import parsed

STATE, REPORT = ".state.safetensors", ".report.json"
MOST_HEADER = 100_000_000
OWN_END = ("max_seconds", "disk", "file", "most")  # what ends a rollout that nobody stopped


@dataclass(frozen=True)
class Begun:
    """How a row is gone on with. `graph` is what to queue. `frame`: the video's frame from which it goes on; 0: from its start.
    `report`: of the whole video that is there already, with its path; then nothing is to be queued."""

    graph: Graph
    frame: int = 0
    report: dict[str, Any] | None = None
    report_file: str = ""
    note: str = ""


def begun(graph: Graph, course: Course, output: Path | None, folder: str, leave: frozenset[str] = frozenset()) -> Begun:
    """How to go on with a row whose files lie in `folder` of the `output` folder. States named in `leave` are passed over."""
    if output is None or not (output / folder).is_dir():
        return Begun(graph)
    if course.rollout and not behind(graph, course.rollout):
        for path, report in reports(output / folder):
            if is_whole(report):
                return Begun(graph, report=report, report_file=f"{folder}/{path.name}")
    if course.why_anew:
        return Begun(graph, note=course.why_anew)
    for path in _newest(output / folder, STATE):
        name = f"{folder}/{path.name}"
        frame = frames_in(path)
        if frame and name not in leave:
            return Begun(resumed(graph, course, f"{name} [output]"), frame)
    return Begun(graph)


def is_whole(report: dict[str, Any]) -> bool:
    """Whether a report is that of a video as it was asked for; *max_seconds* is what the row itself asks for."""
    stopped = report.get("stopped") or {}
    return report.get("ended") == "whole" or (report.get("ended") == "stopped" and stopped.get("by") in OWN_END)


def reports(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The reports in a folder, newest first; a file that is none is passed over."""
    for path in _newest(folder, REPORT):
        try:
            report = parsed(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and isinstance(report.get("ended"), str):
            yield path, report


def report_of(folder: Path, prompt_id: str) -> tuple[str, dict[str, Any]] | None:
    """The name and the report that a prompt left, whatever ended it; of several rollouts that of one that is not whole."""
    found = [(path.name, each) for path, each in reports(folder) if each.get("prompt_id") == prompt_id]
    return next((each for each in found if not is_whole(each[1])), found[0] if found else None)


def kept_frames(output: Path | None, folder: str) -> int:
    """The most frames of any state in a row's folder; 0 where there is none, or nobody sees it."""
    if output is None:
        return 0
    return max((frames_in(path) for path in _newest(output / folder, STATE)), default=0)


def frames_in(path: Path) -> int:
    """How many pictures the video has up to a saved state; 0 for a file that cannot be gone on from.

    Only the header is read: 8 bytes of length, then JSON (the safetensors format). The host reads the file itself, with all checks.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MOST_HEADER:
                return 0
            state = json.loads(json.loads(file.read(size))["__metadata__"]["state"])
        emitted, frames = int(state["emitted"]), state.get("stream", {}).get("file_frames")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError, OverflowError):
        return 0
    if isinstance(frames, list) and frames and all(type(count) is int for count in frames):
        return max(0, min(frames))
    return max(0, 4 * emitted - 3)


def _newest(folder: Path, suffix: str) -> list[Path]:
    found = []
    for path in folder.glob(f"*{suffix}"):
        try:
            found.append((path.stat().st_mtime_ns, path.name, path))
        except OSError:
            continue
    return [path for *_, path in sorted(found, reverse=True)]
