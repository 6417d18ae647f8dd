"""The host's V3 node API, with what differs between hosts smoothed out, and the pack's wire types."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import ComfyExtension, InputImpl, io, ui
from comfy_execution.graph_utils import ExecutionBlocker

__all__ = [
    "ComfyExtension",
    "ExecutionBlocker",
    "InputImpl",
    "io",
    "ui",
    "schema",
    "widget",
    "Absorption",
    "Anchor",
    "AudioTrack",
    "Prompts",
    "State",
    "Stream",
    "InterpModel",
]

Absorption = io.Custom("ADASTATE_ABSORPTION")
Anchor = io.Custom("ADASTATE_ANCHOR")
AudioTrack = io.Custom("ADASTATE_AUDIO")
Prompts = io.Custom("ADASTATE_PROMPTS")
State = io.Custom("ADASTATE_STATE")
Stream = io.Custom("ADASTATE_STREAM")
# the host's own type, on hosts that have frame interpolation; elsewhere nothing can be connected to it
InterpModel = io.Custom("INTERP_MODEL")

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """An io.Schema without the keywords that this host does not know (0.3.75 raises TypeError for each).

    A node that shows something and is no output sets `has_intermediate_output`: hosts that know it then show it again where the
    node is not run again, say after its page was reloaded. Outputs are shown again by all hosts; with the mark they would be
    listed by runs of other outputs, too.
    """
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def widget(kind: Any, name: str, **options: Any) -> Any:
    """An input such as io.Int.Input without the keywords that this host does not know."""
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(name, **{key: value for key, value in options.items() if key in known})
