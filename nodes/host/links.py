"""Which outputs of a node somebody takes, and what feeds it, read from the prompt that the host executes.

The front end writes a subgraph's nodes into the prompt under ids such as "12:3", with links from node to node, so a link through
a subgraph is a link like any other.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_execution.graph_utils import is_link

from .safely import attempt

try:
    from comfy_execution.progress import get_progress_state
except ImportError:  # a host that does not say which prompt it executes: all outputs count as linked
    get_progress_state = None

_sees_graph: dict[str, bool] = {}  # by class name: a pack's classes stay what they are while the host runs


def linked_slots(prompt_id: str, node_id: str) -> frozenset[int] | None:
    """The outputs, by their index, of a node of the prompt under way that are some node's input, executed or not.

    None where that cannot be known, so that all of them count as linked: for a node that another node put into the graph while it
    ran, and beside nodes that are given the whole graph and may link to any node of it while they run.
    """
    graph = _graph(prompt_id)
    if graph is None or node_id not in graph.original_prompt:
        return None
    nodes = [*graph.original_prompt.values(), *graph.ephemeral_prompt.values()]
    if any(_may_link(str(node.get("class_type"))) for node in nodes):
        return None
    return slots_of(nodes, node_id)


def plainly_linked_slots(prompt_id: str, node_id: str) -> frozenset[int]:
    """Those of them that can be seen: the prompt under way itself links to them."""
    graph = _graph(prompt_id)
    return frozenset() if graph is None else slots_of(graph.original_prompt.values(), node_id)


def slots_of(nodes: Iterable[Any], node_id: str) -> frozenset[int]:
    """The outputs of a node that `nodes` of its prompt link to; what is no node of a prompt is passed over."""
    inputs = [node.get("inputs") for node in nodes if isinstance(node, Mapping)]
    values = [value for each in inputs if isinstance(each, Mapping) for value in each.values()]
    return frozenset(int(value[1]) for value in values if is_link(value) and value[0] == node_id)


def fed_by(prompt_id: str, node_id: str) -> str | None:
    """A digest of all that a node of the prompt under way is made from, by which the host tells whether its result may be used
    again: the nodes before it, their widgets and their fingerprints. None where the host would not use one again."""
    graph = _graph(prompt_id)
    if graph is None:
        return None
    try:
        return _digest(graph.original_prompt, node_id, {}, own=True)
    except (
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ):  # an ephemeral node, or a fingerprint that is equal to none
        return None


def _graph(prompt_id: str) -> Any:
    """The host's DynamicPrompt of the prompt under way, or None."""
    if get_progress_state is None:
        return None
    state, _ = attempt("the prompt under way could not be read", get_progress_state)
    graph = getattr(state, "dynprompt", None)
    whole = isinstance(getattr(graph, "original_prompt", None), Mapping)
    whole = whole and isinstance(getattr(graph, "ephemeral_prompt", None), Mapping)
    return graph if whole and getattr(state, "prompt_id", None) == prompt_id else None


def _may_link(class_type: str) -> bool:
    """Whether nodes of this class are given the whole graph while it runs: those that repeat parts of it, in loops, ask for it."""
    if class_type not in _sees_graph:
        kind = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(class_type)
        inputs, _ = attempt(f"the inputs of {class_type} could not be read", lambda: kind.INPUT_TYPES())
        hidden = (inputs or {}).get("hidden", {}).values()
        _sees_graph[class_type] = inputs is None or "DYNPROMPT" in hidden
    return _sees_graph[class_type]


def _digest(prompt: Mapping[str, Any], node_id: str, known: dict[str, str], own: bool = False) -> str:
    """Of a node and all before it; its `own` fingerprint is left out. ValueError for one that is equal to none (NaN)."""
    if node_id not in known:
        node = prompt[node_id]
        inputs = {
            name: ["link", _digest(prompt, value[0], known), int(value[1])] if is_link(value) else ["value", value]
            for name, value in node["inputs"].items()
        }
        parts = [node_id, node["class_type"], inputs, None if own else node.get("is_changed")]
        text = json.dumps(parts, sort_keys=True, allow_nan=False)
        known[node_id] = hashlib.sha256(text.encode()).hexdigest()
    return known[node_id]
