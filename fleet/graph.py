"""What the fleet reads from a row's workflow (the API form: node id -> class_type and inputs), and how it changes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ROLLOUT, STREAM, FRAMES = "AdaStateRollout", "AdaStateStreamOutput", "AdaStateStreamFrames"
LOAD = "fleet_state"  # the id of the node that loads a state to go on from
Graph = dict[str, dict[str, Any]]
DEFAULT_LENGTH, DEFAULT_SIDE = 81, 64  # where a number is linked and nobody knows it yet


def is_link(value: Any) -> bool:
    """Whether an input is linked: [node id, number of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def with_values(graph: Graph, values: dict[str, Any]) -> Graph:
    """The graph with `node.input` set to values; nodes that are not named are shared. The nodes are there."""
    changed = dict(graph)
    for place, value in values.items():
        node, _, name = place.partition(".")
        changed[node] = changed[node] | {"inputs": changed[node].get("inputs", {}) | {name: value}}
    return changed


def nodes_of(graph: Graph, class_type: str) -> list[str]:
    """The ids of the nodes of a class."""
    return [name for name, node in graph.items() if node["class_type"] == class_type]


def before(graph: Graph, node: str) -> set[str]:
    """A node and all that it depends on."""
    found, waiting = set(), [node]
    while waiting:
        name = waiting.pop()
        if name not in found and name in graph:
            found.add(name)
            waiting += [value[0] for value in graph[name].get("inputs", {}).values() if is_link(value)]
    return found


def behind(graph: Graph, node: str) -> list[str]:
    """The nodes that a node's outputs are linked to."""
    return [
        name
        for name, each in graph.items()
        if any(is_link(value) and value[0] == node for value in each.get("inputs", {}).values())
    ]


def canonical(graph: Graph, value: Any) -> Any:
    """What an input is made of, without the ids of nodes: equal for equal loaders. JSON-able."""
    if not is_link(value) or value[0] not in graph:
        return value
    node = graph[value[0]]
    inputs = {name: canonical(graph, each) for name, each in sorted(node.get("inputs", {}).items())}
    return {"class": node["class_type"], "output": value[1], "inputs": inputs}


@dataclass(frozen=True)
class Course:
    """The rollout of a graph. `streams`: the Stream To Video and Stream To Frames whose frames it writes, the first one's name is
    the report's; empty: none. `why_anew`: a sentence where the row cannot go on from an autosave, or empty."""

    rollout: str
    streams: tuple[str, ...]
    why_anew: str


def course_of(graph: Graph) -> Course:
    """Which node is rolled out, and whether that can go on from an autosave."""
    rollouts = nodes_of(graph, ROLLOUT)
    if len(rollouts) != 1:
        count = f"{len(rollouts)} rollouts" if rollouts else "no rollout"
        return Course("", (), f"its workflow has {count}, so it is made from its start")
    streams = tuple(_streams(graph, graph[rollouts[0]].get("inputs", {}).get("stream")))
    video = [name for name in streams if graph[name]["class_type"] == STREAM]
    reason = "" if video else "its workflow has no Stream To Video, so it is made from its start"
    return Course(rollouts[0], streams, reason)


def _streams(graph: Graph, link: Any) -> Iterator[str]:
    """The chain of stream nodes behind a link, the one that writes the video first."""
    chain: list[str] = []
    while is_link(link) and link[0] in graph and graph[link[0]]["class_type"] in (STREAM, FRAMES):
        if link[0] in chain:
            break
        chain.append(link[0])
        link = graph[link[0]].get("inputs", {}).get("stream")
    return reversed(chain)


def number_of(graph: Graph, node: str, name: str, default: int) -> int:
    """A number among a node's inputs, or the default where it is linked or not there."""
    value = graph.get(node, {}).get("inputs", {}).get(name, default)
    return int(value) if type(value) in (int, float) else default


def frames_of(graph: Graph) -> int:
    """How many video frames a row makes, all its rollouts and items together; at least 1."""
    total = 0
    for node in nodes_of(graph, ROLLOUT):
        total += max(1, number_of(graph, node, "length", DEFAULT_LENGTH)) * max(
            1, number_of(graph, node, "batch_size", 1)
        )
    return max(1, total)


def work_of(graph: Graph) -> int:
    """What orders rows: frames times pixels."""
    work = 0
    for node in nodes_of(graph, ROLLOUT):
        sides = [max(16, number_of(graph, node, side, DEFAULT_SIDE)) for side in ("width", "height")]
        frames = max(1, number_of(graph, node, "length", DEFAULT_LENGTH))
        work += frames * sides[0] * sides[1] * max(1, number_of(graph, node, "batch_size", 1))
    return max(1, work)


def model_of(graph: Graph) -> str:
    """Tells rows that use the same model from others: what the rollouts' model inputs are made of."""
    made = [canonical(graph, graph[node].get("inputs", {}).get("model")) for node in nodes_of(graph, ROLLOUT)]
    return json.dumps(made, sort_keys=True)


def with_names(graph: Graph, folder: str, name: str) -> Graph:
    """The graph with a file name of the row's own for all that it saves: `folder/name` for the stream, `folder/name_NODE` else."""
    streams = course_of(graph).streams
    first = streams[0] if streams else ""
    return {
        node: each | {"inputs": each["inputs"] | {"filename_prefix": f"{folder}/{name}" + ("" if node == first else f"_{node}")}}
        if isinstance(each.get("inputs", {}).get("filename_prefix"), str)
        else each
        for node, each in graph.items()
    }  # fmt: skip


def resumed(graph: Graph, course: Course, state: str) -> Graph:
    """The graph going on from a saved state, the old frames put in front."""
    changed = graph | {LOAD: {"class_type": "AdaStateLoadState", "inputs": {"file": state}}}
    rollout = changed[course.rollout]
    inputs = {name: value for name, value in rollout["inputs"].items() if name != "start_latent"}
    changed[course.rollout] = rollout | {"inputs": inputs | {"resume": [LOAD, 0]}}
    return with_values(changed, {f"{node}.join": True for node in course.streams})
