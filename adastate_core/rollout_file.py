"""A rollout state on disk: one safetensors file, versioned, written to a temporary name and then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .kv_cache import LayerSnapshot
from .rollout import RolloutState

FORMAT = "adastate.rollout"
VERSION = 1
OPTIONAL = ("hidden", "latents", "recent", "noisy", "given")
_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, AttributeError, OverflowError, ValueError)


def save_state(state: RolloutState, path: Path | str) -> Path:
    """Write `state` to `path` (.safetensors). A crash leaves either the old file or the new one."""
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {"pending": state.pending}
    for name in OPTIONAL:
        if getattr(state, name) is not None:
            tensors[name] = getattr(state, name)
    for i, layer in enumerate(state.cache):
        tensors |= {f"cache.{i}.{name}": tensor for name, tensor in layer.tensors.items()}
    streamed = {k: v for k, v in state.stream.items() if isinstance(v, torch.Tensor)}
    tensors |= {f"stream.{name}": tensor for name, tensor in streamed.items()}
    absorbed = {k: v for k, v in state.absorption.items() if isinstance(v, torch.Tensor)}
    tensors |= {f"absorption.{name}": tensor for name, tensor in absorbed.items()}
    header = {
        "spec": state.spec,
        "next_frame": state.next_frame,
        "next_chunk": state.next_chunk,
        "emitted": state.emitted,
        "cache": [
            {name: getattr(layer, name) for name in ("anchor_slots", "ring_slots", "frames", "positions", "pinned")}
            for layer in state.cache
        ],
        "stream": {k: v for k, v in state.stream.items() if k not in streamed},
        "absorption": {k: v for k, v in state.absorption.items() if k not in absorbed},
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(header)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path.name} is a safetensors file but not a rollout state; choose one that this pack saved")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path.name} has state format {metadata.get('version')}; this version of the pack reads {VERSION}"
        )
    return json.loads(metadata["state"])


def _explained(path: Path, error: Exception) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith(path.name):
        return error
    return ValueError(f"{path.name} cannot be read as a rollout state: {error}")


def state_chunk(path: Path | str) -> int:
    """After how many generated chunks a state that `save_state` wrote was taken, without reading it all. ValueError as
    `load_state`."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return int(_read_header(path, file.metadata())["next_chunk"])
    except _UNREADABLE as error:
        raise _explained(path, error) from error


def load_state(path: Path | str) -> RolloutState:
    """Read a state that `save_state` wrote. ValueError, naming the file and the reason, for anything else."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        layers = tuple(_layer(i, entry, tensors) for i, entry in enumerate(header["cache"]))
        streamed = {n.removeprefix("stream."): t for n, t in tensors.items() if n.startswith("stream.")}
        absorbed = {n.removeprefix("absorption."): t for n, t in tensors.items() if n.startswith("absorption.")}
        state = RolloutState(
            spec=header["spec"],
            next_frame=int(header["next_frame"]),
            next_chunk=int(header["next_chunk"]),
            emitted=int(header["emitted"]),
            cache=layers,
            pending=tensors["pending"],
            **{name: tensors.get(name) for name in OPTIONAL},
            stream=header["stream"] | streamed,
            absorption=header.get("absorption", {}) | absorbed,
        )
    except _UNREADABLE as error:
        raise _explained(path, error) from error
    if reason := _damage(state):
        raise ValueError(f"{path.name} is damaged ({reason}); use another state, or make it again")
    return state


def _damage(state: RolloutState) -> str | None:
    """What contradicts itself in a state read from a file, or None."""
    tensors = [state.pending, *(getattr(state, name) for name in OPTIONAL)]
    if not isinstance(state.spec, dict):
        return "its settings are missing"
    if any(t is not None and (t.ndim != 5 or t.dtype != torch.float32) for t in tensors):
        return "its latents are not video latents"
    if state.emitted < 0 or state.next_chunk < 0 or state.next_frame != state.emitted + state.pending.shape[2]:
        return "its counters contradict each other"
    if state.latents is not None and state.latents.shape[2] != state.emitted:
        return "it does not hold the latents it counts"
    for layer in state.cache:
        numbers = [*layer.anchor_slots, *layer.ring_slots, *layer.frames, layer.pinned]
        positions = [p for p in layer.positions if p is not None]
        if not all(type(n) is int for n in numbers) or not all(
            isinstance(p, int | float) and math.isfinite(p) for p in positions
        ):
            return "its cache's frame numbers are not numbers"
    return None


def _layer(index: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LayerSnapshot:
    prefix = f"cache.{index}."
    return LayerSnapshot(
        anchor_slots=tuple(entry["anchor_slots"]),
        ring_slots=tuple(entry["ring_slots"]),
        frames=tuple(entry["frames"]),
        positions=tuple(entry["positions"]),
        pinned=entry.get("pinned", 0),
        tensors={name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)},
    )
