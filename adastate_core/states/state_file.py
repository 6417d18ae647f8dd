"""A rollout state on disk: one safetensors file, versioned, written in one piece, with checksums that reading verifies.

Version 2 has the checksums of files/tensor_file.py and is refused without them. Version 1, of packs before, is read with all
checks but that one. The number went up, although a pack before could have read the tensors, so that a file that has lost
its checksums can never be taken for an old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..cache.kv_cache import LayerSnapshot
from ..files.header_check import Damage, Fields, Tensors, refusal, shown
from ..files.tensor_file import TensorFile, file_bytes, parsed, write_tensors
from ..given import STARTS
from ..rollout import RolloutState
from .state_check import check_state

FORMAT = "adastate.rollout"
VERSION, BEFORE = 2, 1
OPTIONAL = ("hidden", "latents", "recent", "noisy", "given", "first", "reference")
LAYER = ("anchor_slots", "ring_slots", "frames", "positions", "pinned")
_UNREADABLE = (OSError, MemoryError)


def save_state(state: RolloutState, path: Path | str, new: bool = False, beside: Path | None = None) -> Path:
    """Write `state` to `path` (.safetensors). A crash leaves either the old file or the new one.

    `new`: FileExistsError if there is a file already. `beside`: where it grows (`whole_file`). ValueError for a state that holds
    numbers that are none.
    """
    return write_tensors(path, *_contents(state), new, beside)


def state_bytes(state: RolloutState) -> int:
    """Bytes of the file that `save_state` writes, to the byte. ValueError as there."""
    return file_bytes(*_contents(state))


def _contents(state: RolloutState) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A state's tensors and texts."""
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
        "cache": [{name: getattr(layer, name) for name in LAYER} for layer in state.cache],
        "stream": {k: v for k, v in state.stream.items() if k not in streamed},
        "absorption": {k: v for k, v in state.absorption.items() if k not in absorbed},
    }
    if state.again:
        header["again"] = state.again
    if state.after:
        header["after"] = state.after
    if state.compiled_layers:
        header["compiled_layers"] = state.compiled_layers
    if state.steered:
        header["steered"] = state.steered
    if state.shots:
        header["shots"] = state.shots
    if state.start != STARTS[0]:
        header["start"] = state.start
    return tensors, {"format": FORMAT, "version": str(VERSION), "state": json.dumps(header, allow_nan=False)}


def _header(path: Path, file: TensorFile) -> tuple[Fields, int]:
    """The state's own header and the format's version, of a file that is a state."""
    texts = Fields(file.texts, "metadata")
    if file.texts.get("format") != FORMAT:
        raise ValueError(f"{path.name} is a safetensors file but not a rollout state; choose one that this pack saved")
    version = str(file.texts.get("version"))
    if version not in (str(VERSION), str(BEFORE)):
        raise ValueError(
            f"{path.name} has state format {shown(version)}; this version of the pack reads {BEFORE} and {VERSION}"
        )
    for name in ("format", "version", *(("checksums",) if version == str(VERSION) else ())):
        texts.text(name)
    header = parsed(texts.text("state"))
    texts.done()
    return Fields(header), int(version)


def state_chunk(path: Path | str) -> int:
    """After how many generated chunks a state that `save_state` wrote was taken, without reading it all. ValueError as
    `load_state`."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            opened = TensorFile(file)
            header, version = _header(path, opened)
            if version == VERSION:
                opened.check_header()
            return header.whole("next_chunk")
    except (*_UNREADABLE, Damage) as error:
        raise refusal(path.name, error, "rollout state") from error


def load_state(path: Path | str) -> RolloutState:
    """Read a state that `save_state` wrote. ValueError, naming the file, the field and the reason, for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            opened = TensorFile(file)
            header, version = _header(path, opened)
            tensors = opened.read(checked=version == VERSION)
        check_state(header, Tensors(tensors), before=version == BEFORE)
    except (*_UNREADABLE, Damage) as error:
        raise refusal(path.name, error, "rollout state") from error
    values = header.values

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return RolloutState(
        spec=values["spec"],
        next_frame=values["next_frame"],
        next_chunk=values["next_chunk"],
        emitted=values["emitted"],
        cache=tuple(_layer(entry, under(f"cache.{i}.")) for i, entry in enumerate(values["cache"])),
        pending=tensors["pending"],
        **{name: tensors.get(name) for name in OPTIONAL},
        stream=values["stream"] | under("stream."),
        absorption=values.get("absorption", {}) | under("absorption."),
        again=values.get("again", 0),
        after=values.get("after", 0),
        compiled_layers=tuple(values.get("compiled_layers", ())),
        steered=values.get("steered", {}),
        shots=tuple(values.get("shots", ())),
        start=values.get("start", STARTS[0]),
    )


def _layer(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LayerSnapshot:
    slots = {name: tuple(entry[name]) for name in LAYER if name != "pinned"}
    return LayerSnapshot(**slots, pinned=entry.get("pinned", 0), tensors=tensors)
