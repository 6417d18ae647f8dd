"""Causal Wan checkpoints as people have them: what a file is, before anything of it is loaded, and its plain weights.

safetensors files are read by their header; torch files with `weights_only=True`, mapped and not copied. Names lose the
prefixes and infixes that trainers leave in them; of several models in one file the averaged generator is taken (Self-Forcing
and its kin write `generator`, `generator_ema` and `critic`).
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .file_kind import TORCH_SUFFIXES, CheckpointError, check_kind, shown_name, unreadable
from .wan_weights import IS_A_LORA, WanGeometry, check_scales, counted, geometry_of, unused_weights

PARTS = ("generator_ema", "ema", "generator", "model_ema", "model", "state_dict")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "model.", "module.")
INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
MOST_NESTED = 8
LORA_PART = "generator_lora"
FORMAT_KEY = "checkpoint_format"  # where LongLive 2.0 says what it wrote
_WANTED = f"a checkpoint has {', '.join(PARTS[:3])} or plain weights"
_OF_BLOCKS = ("blocks.", "lora_unet_")
_MOST_AXES = 64  # as torch itself has it
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
MOST_WEIGHTS = 50_000  # names; the largest models have some 1,500, and with a LoRA of many parts twice as many


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
class Checkpoint:
    """A file that has been looked into: shapes and dtypes by plain name, its metadata, and how to read one tensor.

    `beside` names what the file holds besides the model that was taken; `twice` a weight that it has under two names. Of a torch
    file `metadata` is no more than the name that its writer gave to its format, if it did.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    part: str
    _read: Callable[[str], torch.Tensor] = field(repr=False)
    beside: tuple[str, ...] = ()
    twice: str = ""

    @cached_property
    def geometry(self) -> WanGeometry:
        """Its sizes; ValueError, naming the file, if it is not a whole Wan text-to-video transformer."""
        geometry = geometry_of(self.shapes, self.path.name)
        check_scales(self.shapes, self.metadata, self.path.name)
        if self.twice:
            raise CheckpointError(f"{self.path.name} holds {self.twice}, and nothing says which of them is meant")
        return geometry

    def unused(self) -> str:
        """A sentence that counts the weights which have no place in the model, or nothing. ValueError as of `geometry`."""
        rest = unused_weights(self.shapes, self.geometry)
        if not rest:
            return ""
        are = "weight that" if len(rest) == 1 else "weights that"
        return (
            f"{self.path.name} holds {len(rest)} {are} a {self.geometry.space.name} text-to-video model has no place for and that "
            f"a rollout does without: {counted(rest)}"
        )

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def tensor(self, name: str) -> torch.Tensor:
        """One weight by its plain name. CheckpointError where the file cannot be read any more."""
        return self._read(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One weight after the other: a second copy of the whole never exists."""
        for name in self.shapes:
            yield name, self._read(name)


def open_checkpoint(path: Path | str, parts: Sequence[str] = PARTS) -> Checkpoint:
    """Look into a file; of the models in it the first of `parts`. CheckpointError for what cannot be read safely."""
    path = Path(path)
    try:
        check_kind(path)
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
        raise unreadable(path, _plain_reason(error)) from error


def _plain_reason(error: Exception) -> str:
    """Why a file could not be read, without the words and paths of the library that tried."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    if isinstance(error, MemoryError):
        return "there is no room in memory for what it says it holds; free some, or download it again"
    return "it is damaged; download it again"


def _open_safetensors(path: Path, parts: Sequence[str]) -> Checkpoint:
    metadata, entries = _header(path)
    part, chosen, beside, twice = _choose({name: name for name in entries}, parts)
    shapes = {plain: entries[name][1] for plain, name in chosen.items()}
    dtypes = {plain: entries[name][0] for plain, name in chosen.items()}
    opened: list[Any] = []

    def read(name: str) -> torch.Tensor:
        try:
            if not opened:  # only now: the mapping counts as memory on some systems
                opened.append(safe_open(path, framework="pt", device="cpu"))
            return opened[0].get_tensor(chosen[name])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise unreadable(path, _plain_reason(error)) from error

    return Checkpoint(path, shapes, dtypes, metadata, part, read, beside, twice)


def _header(path: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """(metadata, dtype and shape by name) of a safetensors file; its weights are neither read nor mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise unreadable(path, "it is cut short or no safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise unreadable(path, "its header is not JSON; download it again") from error
    if not isinstance(header, dict):
        raise unreadable(path, "its header names no weights; download it again")
    _check_count(path, len(header))
    metadata = header.pop("__metadata__", None)
    metadata = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    entries, end = {}, 0
    for name, entry in header.items():
        dtype, shape, begin, last = _entry(path, name, entry)
        entries[name], end = (dtype, shape), end + last - begin
    if end != size - 8 - length:
        raise unreadable(path, f"it has {size - 8 - length} bytes of weights and should have {end}; download it again")
    return metadata, entries


def _check_count(path: Path, names: int) -> None:
    """CheckpointError for more names than a model has, each of which would cost its time."""
    if names > MOST_WEIGHTS:
        raise unreadable(
            path, f"it names {names} weights, and no model has more than {MOST_WEIGHTS}; download it again"
        )


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one weight in a header; CheckpointError where they contradict."""
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, format_name = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise unreadable(path, f"its header does not say where {shown_name(name)} lies; download it again")
    if not isinstance(format_name, str) or format_name not in _DTYPES:
        raise CheckpointError(
            f"{path.name} holds {shown_name(name)} in a number format that is not known here ({shown_name(format_name)}); take the "
            "file in bf16, fp16, fp32 or fp8"
        )
    dtype, (begin, last) = _DTYPES[format_name], offsets
    numbers = (*shape[:_MOST_AXES], begin, last)
    sound = len(shape) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not sound or math.prod(shape) * dtype.itemsize != last - begin:
        raise unreadable(path, f"{shown_name(name)} has another size than its shape; download it again")
    return dtype, tuple(shape), begin, last


def _open_torch(path: Path, parts: Sequence[str]) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    written_as = content.get(FORMAT_KEY) if isinstance(content, Mapping) else None
    metadata = {FORMAT_KEY: written_as} if isinstance(written_as, str) else {}
    part, content, beside = _inside(content, parts, path.name)
    _check_count(path, len(content))
    flat = {name: _as_tensor(name, value) for name, value in content.items() if isinstance(name, str)}
    beside += [shown_name(name) for name, value in content.items() if _is_container(value)]
    flat = {name: value.detach() for name, value in flat.items() if value is not None}
    if odd := next((name for name, value in flat.items() if not _is_whole(value)), None):
        raise CheckpointError(
            f"{path.name} holds {shown_name(odd)} as something else than a plain tensor with all its numbers; save it as "
            "safetensors"
        )
    inner, chosen, more, twice = _choose(flat, parts)
    shapes = {name: tuple(t.shape) for name, t in chosen.items()}
    dtypes = {name: t.dtype for name, t in chosen.items()}
    return Checkpoint(path, shapes, dtypes, metadata, part or inner, lambda name: chosen[name], (*beside, *more), twice)


def _as_tensor(name: str, value: Any) -> torch.Tensor | None:
    """A weight of a torch file; a LoRA's alpha, which some trainers save as a plain number, too. None for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    if name.endswith(".alpha") and isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value))
    return None


def _is_told(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or _is_container(value)


def _beside(name: Any, value: Any) -> str:
    return f"{shown_name(name)} {value}" if isinstance(value, (int, float)) else shown_name(name)


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and len(value) > 0


def _inside(content: Any, parts: Sequence[str], file: str) -> tuple[str, Mapping[Any, Any], list[str]]:
    """(the part taken, its named weights, the names of what lies beside) of a torch file's models inside models.

    Of `parts` the first one that holds a model's weights; one that is empty, or holds an optimizer's numbers, hides none.
    """
    part, beside = "", []
    for _ in range(MOST_NESTED):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{file} holds {_in_words(content)} and not named weights; {_WANTED}")
        inner = [name for name in parts if isinstance(content.get(name), Mapping) and content[name]]
        here = _best(content, (), 1)
        ranks = {name: _best(content[name], parts, MOST_NESTED) for name in inner}
        if here and here >= max(ranks.values(), default=0):
            return part, content, beside
        if not inner and LORA_PART in content:
            raise CheckpointError(f"{file} {IS_A_LORA}")
        if not inner:
            raise CheckpointError(f"{file} holds no weights; {_WANTED}")
        part = max(inner, key=ranks.__getitem__)  # of equals the first
        beside += [_beside(n, v) for n, v in content.items() if n != part and (_is_told(v) or "alpha" in str(n))]
        content = content[part]
    raise CheckpointError(f"{file} holds no weights, only models inside models; {_WANTED}")


def _in_words(content: Any) -> str:
    """What a torch file holds that are no named weights."""
    known = {
        torch.Tensor: "one tensor",
        str: "a text",
        list: "a list",
        tuple: "a list",
        bool: "a switch",
        int: "a number",
        float: "a number",
    }
    return next((words for kind, words in known.items() if isinstance(content, kind)), "nothing that is read")


def _best(content: Mapping[Any, Any], parts: Sequence[str], depth: int, seen: frozenset[int] = frozenset()) -> int:
    """2 where there are weights of blocks, 1 where there are any tensors, else 0; the best of `parts` counts too."""
    names = [str(name) for name, value in content.items() if isinstance(value, torch.Tensor)]
    here = 2 if any("blocks." in name or "_blocks_" in name for name in names) else min(1, len(names))
    if here == 2 or depth <= 1:
        return here
    inner = [
        content[name] for name in parts if isinstance(content.get(name), Mapping) and id(content[name]) not in seen
    ]
    seen = seen | {id(content), *map(id, inner)}
    return max([here, *(_best(each, parts, depth - 1, seen) for each in inner)])


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory number for number; one of few bytes can otherwise stand for any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _choose(entries: Mapping[str, Any], parts: Sequence[str]) -> tuple[str, dict[str, Any], tuple[str, ...], str]:
    """(the model taken, its entries by plain name, what lies beside, a weight that is there twice) from flat names.

    The names may hold several models.
    """
    for part in parts:
        mine = {n.removeprefix(f"{part}."): v for n, v in entries.items() if n.startswith(f"{part}.")}
        if mine and any(plain_name(n).startswith(_OF_BLOCKS) for n in mine):
            others = dict.fromkeys(shown_name(n.partition(".")[0]) for n in entries if not n.startswith(f"{part}."))
            plain, twice = _by_plain_name(mine)
            again = next((n for n in entries if n.startswith(_OF_BLOCKS) and n in plain), "")
            if again and not twice:
                twice = f"{shown_name(again)} twice, as it is and under {part}."
            return part, plain, tuple(others), twice
    plain, twice = _by_plain_name(entries)
    return "", plain, (), twice


def _by_plain_name(entries: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Entries by plain name, and the first of them that two names stand for."""
    plain: dict[str, Any] = {}
    names: dict[str, str] = {}
    twice = ""
    for name, value in entries.items():
        own = plain_name(name)
        if own in plain and not twice:
            twice = f"{shown_name(own)} twice, as {shown_name(names[own])} and as {shown_name(name)}"
        plain[own], names[own] = value, name
    return plain, twice


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
