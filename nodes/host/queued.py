"""The prompt that is being queued, for a node's `check` to look at: the host shows a node its own inputs alone, and no links.

The host's server hands a prompt to its handlers and validates it afterwards, in one task. So the prompt of this task is known here,
and no other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from .links import slots_of
from .rerun import executing
from .server import prompt_server

_prompt: ContextVar[Mapping[str, Any] | None] = ContextVar("adastate_prompt_being_queued", default=None)


def watch() -> None:
    """Have the host's server, if there is one, tell of every prompt that comes."""
    server = prompt_server()
    if hasattr(server, "add_on_prompt_handler"):
        server.add_on_prompt_handler(_remember)


def _remember(asked: Any) -> Any:
    prompt = asked.get("prompt") if isinstance(asked, Mapping) else None
    _prompt.set(prompt if isinstance(prompt, Mapping) else None)
    return asked


def _inputs() -> Mapping[str, Any] | None:
    """Those of the node at work in the prompt that is being queued; None where either is not known."""
    place, prompt = executing(), _prompt.get()
    node = None if place is None or prompt is None else prompt.get(place.node_id)
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else None


def feeds(name: str) -> bool | None:
    """Whether anything comes to this input of the node at work; None where that is not known."""
    inputs = _inputs()
    return None if inputs is None else inputs.get(name) is not None


def linked_slots() -> frozenset[int]:
    """The outputs of the node at work that the prompt links to; none where it is not known."""
    return frozenset() if _inputs() is None else slots_of(_prompt.get().values(), executing().node_id)
