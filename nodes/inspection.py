"""What a checkpoint is and what its rollout takes, in words; nothing is loaded for it."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.families.wan21 import WAN21_TEXT
from ..adastate_core.geometry import ModelGeometry
from ..adastate_core.weights.checkpoints import TORCH_SUFFIXES, open_checkpoint
from ..adastate_core.weights.presets import PRESETS
from ..adastate_core.weights.wan_weights import listed
from .builder import Asked, Subject, build
from .host import model as host_model
from .host import refusals as checks
from .host.checkpoint_wishes import checkpoint_path, wished
from .host.codec import HostDecoder
from .inputs import check_size

TEXT_TOKENS = 512
GIB = 2**30


def _require_size(width: int, height: int) -> None:
    if reason := check_size(width, height):  # linked numbers are not known any earlier
        raise ValueError(reason)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def inspect_file(file: str, width: int, height: int, length: int) -> str:
    """Family, layout, size, number format, what it wants, and its cache at a size and length. ValueError if unreadable."""
    _require_size(width, height)
    checkpoint = open_checkpoint(checkpoint_path(file))
    geometry = checkpoint.geometry
    defaults = wished(file, checkpoint, "auto")
    dtypes = sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})
    family = WAN21_TEXT  # the only one whose files open_checkpoint takes
    space = family.space
    shape = ModelGeometry(
        space.channels, geometry.layers, geometry.heads, geometry.width // geometry.heads, space=space
    )
    subject = Subject(geometry=shape, dtype=torch.bfloat16, wishes=defaults or None)
    built = build(subject, Asked(height=height // space.stride, width=width // space.stride, fps=space.fps))
    resolved, plan = built.resolved, built.plan(TEXT_TOKENS)
    layout = "a torch file" if checkpoint.path.suffix.lower() in TORCH_SUFFIXES else "safetensors"
    lines = [
        f"{file}: {family.name}, {geometry.parameters}: {geometry.layers} layers of width {geometry.width}, "
        f"{geometry.heads} heads, feed-forward {geometry.feed_forward}",
        f"layout: {layout}{f', its {checkpoint.part}' if checkpoint.part else ''}; {len(checkpoint.shapes)} weights, "
        f"{_size(checkpoint.nbytes)} in {', '.join(dtypes)}",
    ]
    if checkpoint.beside:
        lines.append(f"not taken, beside its {checkpoint.part or 'weights'}: {listed(checkpoint.beside)}")
    if unused := checkpoint.unused():
        lines.append(unused)
    if geometry.in_channels != space.channels:
        lines.append(
            f"it takes {geometry.in_channels} input channels; a rollout needs plain text to video with {space.channels}"
        )
    if resolved.preset:
        lines.append("taken for " + resolved.preset.describe())
    elif defaults:
        own = {name: value for name, value in resolved.numbers.items() if name in defaults}
        lines.append(f"its own settings: {json.dumps(own)}; anchor {json.dumps(resolved.anchor.describe())}")
    else:
        lines.append("nothing says how it is rolled out; choose one of the presets " + ", ".join(PRESETS))
    per_frame = 2 * plan.frame_bytes * geometry.layers
    latents = space.latents(length)
    lines.append(
        f"KV cache at {width}x{height} in bf16: {_size(per_frame)} a latent frame, {_size(plan.kv_bytes)} for a window of "
        f"{resolved.numbers['window_frames']} at any length (all {latents} latent frames of {length} pictures would be "
        f"{_size(per_frame * latents)})"
    )
    return "\n".join([*lines, *resolved.warnings(latents)])


def plan_text(
    model: Any,
    width: int,
    height: int,
    length: int,
    batch: int,
    asked: dict[str, Any],
    anchor: Anchor | None,
    vae: Any,
    cache: dict[str, Any],
) -> tuple[str, str]:
    """(words, JSON) of what a rollout of a MODEL would take; `cache` holds a spec's cache_dtype, cache_device, absorption.

    ValueError for a model or size that cannot be rolled out.
    """
    _require_size(width, height)
    checks.check_model(model)
    space = host_model.space_of(model)
    size = {"batch": batch, "height": height // space.stride, "width": width // space.stride}
    built = build(Subject.of(model, identified=False), Asked(**size, **asked, anchor=anchor, fps=space.fps, **cache))
    vae_bytes = HostDecoder(vae).cache_bytes(*size.values()) if vae is not None else 0
    resolved, plan, free = built.resolved, built.plan(TEXT_TOKENS, vae_bytes), host_model.available_bytes(model)
    try:
        host_model.check_memory(plan, free)
        host_model.check_host_memory(plan)
        verdict, fits = f"fits: {_size(free)} could be free on the device", True
    except ValueError as error:
        verdict, fits = str(error), False
    latents = space.latents(length)
    warnings = [*resolved.warnings(latents), *built.told, *checks.unknown_options(model)]
    kept = space.channels * latents * math.prod(size.values()) * torch.float32.itemsize
    lines = [f"{name}: {_size(count)}" for name, count in plan.bytes().items() if count]
    lines += [
        f"keys and values in all: {_size(plan.kv_bytes)} on the device, the same at any length",
        f"in host memory, with keep_latents: {_size(kept)} for {latents} latent frames",
        verdict,
        *warnings,
    ]
    numbers = {
        "plan_bytes": plan.bytes(), "kv_bytes": plan.kv_bytes, "host_bytes": plan.host_bytes, "total_bytes": plan.total_bytes,
        "free_bytes": free,
        "fits": fits, "kept_latents_bytes": kept, "settings": resolved.numbers, "anchor": resolved.anchor.describe(),
        "warnings": warnings,
    }  # fmt: skip
    return "\n".join(lines), json.dumps(numbers, indent=1)
