"""What a row takes of its device, asked of Plan Rollout Memory before the row is placed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .graph import ROLLOUT, Graph, before, canonical, nodes_of

# what Plan Rollout Memory takes, as AdaState Rollout calls it too
SHARED = (
    "model", "width", "height", "length", "batch_size", "chunk_frames", "window_frames", "positions", "anchor", "absorption",
    "cache_dtype", "cache_device", "start_latent", "stream",
)  # fmt: skip
PLAN, SHOWN = "fleet_plan", "fleet_shown"


@dataclass(frozen=True)
class Plan:
    """`fits` on the device that was asked, whose memory is `memory` bytes; `sentence` says what would fit where it does not.
    `known` is False where the plan could not be made: then the row is tried."""

    fits: bool
    sentence: str = ""
    memory: int = 0
    total_bytes: int = 0
    known: bool = True


def plan_prompt(graph: Graph) -> Graph | None:
    """The prompt that plans a row's rollout; None for a row without exactly one."""
    rollouts = nodes_of(graph, ROLLOUT)
    if len(rollouts) != 1:
        return None
    inputs = graph[rollouts[0]].get("inputs", {})
    asked = {name: inputs[name] for name in SHARED if name in inputs}
    prompt = {PLAN: {"class_type": "AdaStatePlan", "inputs": asked}}
    prompt[SHOWN] = {"class_type": "PreviewAny", "inputs": {"source": [PLAN, 1]}}
    needed = {name for value in asked.values() if isinstance(value, list) for name in before(graph, str(value[0]))}
    return prompt | {name: graph[name] for name in graph if name in needed}


def plan_key(graph: Graph) -> str:
    """Equal for rows whose caches take the same: names of files, lengths and words are no part of it."""
    rollouts = nodes_of(graph, ROLLOUT)
    if len(rollouts) != 1:
        return ""
    inputs = graph[rollouts[0]].get("inputs", {})
    told = {name: canonical(graph, inputs.get(name)) for name in SHARED if name != "length"}
    if isinstance(told["stream"], dict):
        told["stream"]["inputs"] = {n: v for n, v in told["stream"]["inputs"].items() if n != "filename_prefix"}
    return json.dumps(told, sort_keys=True)


def read_plan(entry: dict[str, Any], memory: int) -> Plan:
    """The plan that a finished prompt of `plan_prompt` shows."""
    outputs = entry.get("outputs", {})
    try:
        numbers = json.loads(outputs[SHOWN]["text"][0])
        fits, total = bool(numbers["fits"]), int(numbers["total_bytes"])
        words = "\n".join(outputs.get(PLAN, {}).get("text", []))
    except (KeyError, IndexError, TypeError, ValueError):
        return Plan(True, known=False)
    sentence = next(
        (line for line in words.splitlines() if " would fit" in line or "needs" in line or "need " in line), ""
    )
    return Plan(fits, "" if fits else sentence or "it does not fit on this device", memory, total)
