"""A batch as a table: one row a video, JSONL or CSV. Every fault is told with its line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FleetError
from .graph import ROLLOUT, Graph, frames_of, is_link, model_of, nodes_of, with_values, work_of
from .reading import parsed, read_text

NAME = re.compile(r"\w[\w .()+=@-]{0,99}")
PLACE = re.compile(r"[^.\s]+\.[^.\s]+")
MOST_FAULTS = 20
MOST_WORKFLOW = 2**24  # bytes; the largest of the pack's own has 5,000


@dataclass(frozen=True)
class Workflow:
    """An API workflow and where it came from."""

    path: Path
    graph: Graph = field(repr=False)
    digest: str


@dataclass(frozen=True)
class Row:
    """One video. `digest` tells it from a row of the same name with other values; `work` is frames times pixels, `model` equal for
    rows that share one."""

    name: str
    line: int
    workflow: Workflow = field(repr=False)
    values: dict[str, Any]
    digest: str
    frames: int
    work: int
    model: str = field(repr=False)

    @property
    def graph(self) -> Graph:
        """The workflow with the row's values in it."""
        return with_values(self.workflow.graph, self.values)


class Fault(Exception):
    """What is wrong with one line."""


def read_manifest(path: Path) -> list[Row]:
    """The rows of a .jsonl or .csv table. FleetError that names every faulty line."""
    read = {".jsonl": _json_lines, ".csv": _csv_lines}.get(path.suffix.lower())
    if read is None:
        raise FleetError(f"{path.name} must end in .jsonl or .csv, one row a video")
    try:
        text = read_text(path)
    except ValueError as error:
        raise FleetError(f"{path.name} cannot be read as a table: {error}; save it as text in UTF-8") from error
    rows: list[Row] = []
    faults: list[str] = []
    workflows: dict[str, Workflow] = {}
    lines: dict[str, int] = {}
    for line, cells in read(text):
        try:
            if isinstance(cells, Fault):
                raise cells
            row = _row(line, cells, path.parent, workflows, typed=read is _json_lines)
            if row.name.casefold() in lines:
                raise Fault(
                    f"the name {row.name!r} is that of line {lines[row.name.casefold()]}; give each row its own"
                )
            lines[row.name.casefold()] = line
            rows.append(row)
        except Fault as fault:
            faults.append(f"line {line}: {fault}")
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise FleetError("\n".join([f"{path.name} was not begun:", *faults[:MOST_FAULTS], *more]))
    if not rows:
        raise FleetError(f"{path.name} has no rows; give one line a video with a name and a workflow")
    return rows


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    for line, each in enumerate(text.split("\n"), 1):
        if not each.strip():
            continue
        try:
            cells = parsed(each)
        except ValueError as error:
            yield line, Fault(f"it is not JSON ({error})")
            continue
        yield line, cells if isinstance(cells, dict) else Fault("it must be a JSON object, {...}")


def _csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            line = reader.line_num
            if None in cells or None in cells.values():
                yield line, Fault(f"it must have {len(reader.fieldnames or [])} cells, as the first line has")
                continue
            yield line, {name: value for name, value in cells.items() if value.strip()}
    except csv.Error as error:
        yield max(line + 1, reader.line_num), Fault(f"it is not CSV ({error})")


def _row(line: int, cells: dict[str, Any], folder: Path, workflows: dict[str, Workflow], typed: bool) -> Row:
    name, file = cells.get("name"), cells.get("workflow")
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not NAME.fullmatch(name) or name[-1] in ". ":
        shown = "missing" if name is None else repr(name)[:80]
        raise Fault(
            f"its name is {shown}; a name has up to 100 letters, digits, spaces and .-_()+=@, and begins with a letter"
        )
    if not isinstance(file, str):
        raise Fault("it names no workflow; give the path of a workflow in API form as `workflow`")
    workflow = workflows.get(file) or workflows.setdefault(file, _workflow(file, folder))
    values = {}
    for place, value in cells.items():
        if place not in ("name", "workflow"):
            values[place] = _value(place, value, workflow, typed)
    graph = with_values(workflow.graph, values)
    _check_lengths(graph)
    told = json.dumps([workflow.digest, values], sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    return Row(name, line, workflow, values, digest, frames_of(graph), work_of(graph), model_of(graph))


def _workflow(file: str, folder: Path) -> Workflow:
    path = next((each for each in (folder / file, Path(file)) if each.is_file()), None)
    if path is None:
        raise Fault(f"there is no workflow {file}; its path counts from the table's folder")
    try:
        if path.stat().st_size > MOST_WORKFLOW:
            raise Fault(f"{file} is larger than any workflow")
        data = path.read_bytes()
        graph = parsed(data)
    except OSError as error:
        raise Fault(f"{file} cannot be read as a workflow ({error.strerror})") from error
    except ValueError as error:
        raise Fault(f"{file} cannot be read as a workflow ({error})") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise Fault(f"{file} is a workflow of the front end; save it with Export (API)")
    good = (
        isinstance(graph, dict)
        and graph
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs", {}), dict)
            for node in graph.values()
        )
    )
    if not good:
        raise Fault(f"{file} is not a workflow in API form: node ids with class_type and inputs")
    return Workflow(path, graph, hashlib.sha256(data).hexdigest()[:16])


def _value(place: str, value: Any, workflow: Workflow, typed: bool) -> Any:
    """A cell as its input takes it. In CSV the value that the workflow has says whether a cell is text."""
    if not PLACE.fullmatch(place):
        raise Fault(f"{place!r} says no place; columns are name, workflow, and NODE.INPUT such as 5.seed")
    node, _, name = place.partition(".")
    if node not in workflow.graph:
        raise Fault(f"{place}: {workflow.path.name} has no node {node}; it has {', '.join(list(workflow.graph)[:12])}")
    held = workflow.graph[node].get("inputs", {}).get(name)
    if not typed:
        value = _parsed(place, value, held)
    if held is None or is_link(held) or is_link(value):
        return value
    same = isinstance(value, str) == isinstance(held, str) and isinstance(value, bool) == isinstance(held, bool)
    if not same or (isinstance(held, (int, float)) and not isinstance(value, (int, float))):
        raise Fault(f"{place} is {json.dumps(value)[:80]}; it must be a {_kind(held)}, as {json.dumps(held)[:40]} is")
    return value


def _parsed(place: str, cell: str, held: Any) -> Any:
    if isinstance(held, str):
        return cell
    try:
        return parsed(cell.strip().lower() if isinstance(held, bool) else cell)
    except ValueError:
        if held is None:
            return cell
        raise Fault(f"{place} is {cell[:80]!r}; it must be a {_kind(held)}") from None


def _kind(value: Any) -> str:
    return (
        "switch (true or false)" if isinstance(value, bool) else "number" if isinstance(value, (int, float)) else "text"
    )


def _check_lengths(graph: Graph) -> None:
    """A row ends by itself."""
    for node in nodes_of(graph, ROLLOUT):
        inputs = graph[node].get("inputs", {})
        if inputs.get("length") == 0 and not inputs.get("max_seconds"):
            raise Fault(f"{node}.length is 0, a video without an end; give a length, or {node}.max_seconds")
