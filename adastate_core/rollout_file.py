"""A rollout state on disk: one safetensors file, versioned, written to a temporary name and then renamed."""

from __future__ import annotations

import json
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


def save_state(state: RolloutState, path: Path | str) -> Path:
    """Write `state` to `path` (.safetensors). A crash leaves either the old file or the new one."""
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {"pending": state.pending}
    for name in ("hidden", "latents"):
        if getattr(state, name) is not None:
            tensors[name] = getattr(state, name)
    for i, layer in enumerate(state.cache):
        tensors |= {f"cache.{i}.{name}": tensor for name, tensor in layer.tensors.items()}
    streamed = {k: v for k, v in state.stream.items() if isinstance(v, torch.Tensor)}
    tensors |= {f"stream.{name}": tensor for name, tensor in streamed.items()}
    header = {
        "spec": state.spec,
        "next_frame": state.next_frame,
        "next_chunk": state.next_chunk,
        "emitted": state.emitted,
        "cache": [
            {name: getattr(layer, name) for name in ("anchor_slots", "ring_slots", "frames", "positions")}
            for layer in state.cache
        ],
        "stream": {k: v for k, v in state.stream.items() if k not in streamed},
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


def load_state(path: Path | str) -> RolloutState:
    """Read a state that `save_state` wrote. ValueError, naming the file and the reason, for anything else."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        layers = tuple(_layer(i, entry, tensors) for i, entry in enumerate(header["cache"]))
        streamed = {n.removeprefix("stream."): t for n, t in tensors.items() if n.startswith("stream.")}
        return RolloutState(
            spec=header["spec"],
            next_frame=int(header["next_frame"]),
            next_chunk=int(header["next_chunk"]),
            emitted=int(header["emitted"]),
            cache=layers,
            pending=tensors["pending"],
            hidden=tensors.get("hidden"),
            latents=tensors.get("latents"),
            stream=header["stream"] | streamed,
        )
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read as a rollout state: {error}") from error


def _layer(index: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LayerSnapshot:
    prefix = f"cache.{index}."
    return LayerSnapshot(
        anchor_slots=tuple(entry["anchor_slots"]),
        ring_slots=tuple(entry["ring_slots"]),
        frames=tuple(entry["frames"]),
        positions=tuple(entry["positions"]),
        tensors={name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)},
    )
