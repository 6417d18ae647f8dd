"""Causal Wan checkpoints as people have them: what a file is, before anything of it is loaded, and its plain weights.

safetensors files are read by their header; torch files with `weights_only=True`, mapped and not copied. Names lose the
prefixes and infixes that trainers leave in them; of several models in one file the averaged generator is taken (Self-Forcing
and its kin write `generator`, `generator_ema` and `critic`).
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PARTS = ("generator_ema", "ema", "generator", "model_ema", "model", "state_dict")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "model.", "module.")
INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
HEAD_CHANNELS = 128
TIME_CHANNELS = 256
PATCH = 2
OUT_CHANNELS = 16
MOST_NESTED = 8
LORA_PART = "generator_lora"
IS_A_LORA = "is a LoRA and no model: load the model that it belongs to, and put Load Causal LoRA behind it"
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


class CheckpointError(ValueError):
    """A file that is no checkpoint, in one sentence that names it."""


def plain_name(name: str) -> str:
    """A weight's name as Wan itself has it, whatever wrappers it was saved through."""
    for infix in INFIXES:
        name = name.replace(infix, "")
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


@dataclass(frozen=True)
class WanGeometry:
    """The sizes of a Wan transformer: `width`, `feed_forward`, `layers`, `heads`, latent channels in, text channels."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    in_channels: int
    text_channels: int

    @property
    def parameters(self) -> str:
        """What people call it."""
        return {1536: "1.3B", 5120: "14B"}.get(self.width, f"width {self.width}")


@dataclass(frozen=True)
class Checkpoint:
    """A file that has been looked into: shapes and dtypes by plain name, its metadata, and how to read one tensor."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    part: str
    _read: Callable[[str], torch.Tensor] = field(repr=False)

    @property
    def geometry(self) -> WanGeometry:
        """Its sizes; ValueError, naming the file, if it is not a whole Wan 2.1 text-to-video transformer."""
        return geometry_of(self.shapes, self.path.name)

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One weight after the other: a second copy of the whole never exists."""
        for name in self.shapes:
            yield name, self._read(name)


def open_checkpoint(path: Path | str, parts: Sequence[str] = PARTS) -> Checkpoint:
    """Look into a file; of the models in it the first of `parts`. CheckpointError for what cannot be read safely."""
    path = Path(path)
    try:
        if path.suffix.lower() in TORCH_SUFFIXES:
            return _open_torch(path, parts)
        return _open_safetensors(path, parts)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is a pickle with more than tensors in it and was not read; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # what a damaged pickle raises has no bounds
        raise CheckpointError(f"{path.name} cannot be read as a checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _open_safetensors(path: Path, parts: Sequence[str]) -> Checkpoint:
    metadata, entries = _header(path)
    part, chosen = _choose({name: name for name in entries}, parts)
    shapes = {plain: entries[name][1] for plain, name in chosen.items()}
    dtypes = {plain: entries[name][0] for plain, name in chosen.items()}
    opened: list[Any] = []

    def read(name: str) -> torch.Tensor:
        try:
            if not opened:  # only now: the mapping counts as memory on some systems
                opened.append(safe_open(path, framework="pt", device="cpu"))
            return opened[0].get_tensor(chosen[name])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path.name} cannot be read as a checkpoint: {_first_line(error)}") from error

    return Checkpoint(path, shapes, dtypes, metadata, part, read)


def _header(path: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """(metadata, dtype and shape by name) of a safetensors file; its weights are neither read nor mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{path.name} cannot be read as a checkpoint: it is cut short or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path.name} cannot be read as a checkpoint: its header is not JSON") from error
    metadata = header.pop("__metadata__", None)
    metadata = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    entries, end = {}, 0
    for name, entry in header.items():
        shape, (begin, last) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path.name} holds {name} in a number format that is not known here")
        dtype = _DTYPES[entry["dtype"]]
        if (
            any(type(n) is not int or n < 0 for n in (*shape, begin, last))
            or math.prod(shape) * dtype.itemsize != last - begin
        ):
            raise CheckpointError(f"{path.name} cannot be read as a checkpoint: {name} has another size than its shape")
        entries[name], end = (dtype, shape), end + last - begin
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path.name} cannot be read as a checkpoint: it has {size - 8 - length} bytes of weights and should have {end}"
        )
    return metadata, entries


def _open_torch(path: Path, parts: Sequence[str]) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    part = ""
    for _ in range(MOST_NESTED):
        if not isinstance(content, dict):
            raise CheckpointError(f"{path.name} holds a {type(content).__name__} and not named weights")
        if any(isinstance(value, torch.Tensor) for value in content.values()):
            break
        inner = next((name for name in parts if isinstance(content.get(name), dict)), None)
        if inner is None and LORA_PART in content:
            raise CheckpointError(f"{path.name} {IS_A_LORA}")
        if inner is None:
            raise CheckpointError(
                f"{path.name} holds no weights; a checkpoint has {', '.join(parts[:3])} or plain weights"
            )
        part, content = inner, content[inner]
    else:
        raise CheckpointError(f"{path.name} holds no weights, only models inside models")
    flat = {
        name: value.detach()
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and isinstance(name, str)
    }
    if odd := next((name for name, value in flat.items() if not _is_whole(value)), None):
        raise CheckpointError(f"{path.name} holds {odd} as something else than a plain tensor with all its numbers")
    inner, chosen = _choose(flat, parts)
    shapes = {name: tuple(t.shape) for name, t in chosen.items()}
    dtypes = {name: t.dtype for name, t in chosen.items()}
    return Checkpoint(path, shapes, dtypes, {}, part or inner, lambda name: chosen[name])


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory number for number; one of few bytes can otherwise stand for any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _choose(entries: Mapping[str, Any], parts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(the model taken, its entries by plain name) from flat names, which may hold several models."""
    for part in parts:
        mine = {n.removeprefix(f"{part}."): v for n, v in entries.items() if n.startswith(f"{part}.")}
        if mine and any(plain_name(n).startswith("blocks.") for n in mine):
            return part, {plain_name(n): v for n, v in mine.items()}
    return "", {plain_name(n): v for n, v in entries.items()}


def geometry_of(shapes: Mapping[str, tuple[int, ...]], file: str = "the file") -> WanGeometry:
    """Sizes from the weights' shapes; CheckpointError for what is missing or does not fit together."""
    if any(".lora_" in name for name in shapes):
        raise CheckpointError(f"{file} {IS_A_LORA}")
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "head.head.weight", "blocks.0.ffn.0.weight")
    if absent := [name for name in needed if name not in shapes]:
        raise CheckpointError(f"{file} is not a Wan transformer: it has no {absent[0]}")
    ranks = {"patch_embedding.weight": 5} | dict.fromkeys(needed[1:], 2)
    if odd := next((name for name, rank in ranks.items() if len(shapes[name]) != rank or 0 in shapes[name]), None):
        raise CheckpointError(f"{file} is not a Wan transformer: its {odd} is {list(shapes[odd])}")
    numbers = sorted({int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))})
    if numbers != list(range(len(numbers))):
        gap = next(i for i, number in enumerate([*numbers, -1]) if number != i)
        raise CheckpointError(
            f"{file} is incomplete: it has {len(numbers)} layers up to {numbers[-1]}, and layer {gap} is missing"
        )
    width, in_channels = shapes["patch_embedding.weight"][:2]
    if width % HEAD_CHANNELS:
        raise CheckpointError(
            f"{file} has a width of {width}, which is not a whole number of Wan's heads of {HEAD_CHANNELS}"
        )
    feed_forward, text = shapes["blocks.0.ffn.0.weight"][0], shapes["text_embedding.0.weight"][1]
    geometry = WanGeometry(width, feed_forward, len(numbers), width // HEAD_CHANNELS, in_channels, text)
    for name, shape in _expected(geometry):
        if name not in shapes:
            raise CheckpointError(f"{file} does not fit together: {name} is missing")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{file} does not fit together: {name} is {list(shapes[name])} and should be {list(shape)}"
            )
    return geometry


def _expected(geometry: WanGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of a Wan 2.1 text-to-video transformer of these sizes, with its shape."""
    width, feed_forward = geometry.width, geometry.feed_forward
    linear = {
        "text_embedding.0": (width, geometry.text_channels),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, TIME_CHANNELS),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (PATCH * PATCH * OUT_CHANNELS, width),
        "patch_embedding": (width, geometry.in_channels, 1, PATCH, PATCH),
    }
    yield "head.modulation", (1, 2, width)
    for i in range(geometry.layers):
        yield f"blocks.{i}.modulation", (1, 6, width)
        yield f"blocks.{i}.norm3.weight", (width,)
        yield f"blocks.{i}.norm3.bias", (width,)
        for kind in ("self_attn", "cross_attn"):
            linear |= {f"blocks.{i}.{kind}.{name}": (width, width) for name in "qkvo"}
            yield f"blocks.{i}.{kind}.norm_q.weight", (width,)
            yield f"blocks.{i}.{kind}.norm_k.weight", (width,)
        linear |= {f"blocks.{i}.ffn.0": (feed_forward, width), f"blocks.{i}.ffn.2": (width, feed_forward)}
    for name, shape in linear.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def own_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What this pack's exporter wrote into a file about how it wants to be rolled out; empty for others' files."""
    try:
        found = json.loads(checkpoint.metadata.get("adastate", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
