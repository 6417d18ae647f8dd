"""What a checkpoint is and what its rollout takes, in words; nothing is loaded for it."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.checkpoints import TORCH_SUFFIXES, open_checkpoint
from ..adastate_core.presets import PRESETS
from ..adastate_core.rollout_spec import ModelGeometry, RolloutSpec
from ..adastate_core.wan_weights import listed
from .defaults import Resolved, resolve
from .host import checks
from .host import model as host_model
from .host.checkpoints import checkpoint_path, rollout_defaults, wished
from .host.codec import HostDecoder
from .job import check_size

TEXT_TOKENS = 512
GIB = 2**30


def _spec(
    resolved: Resolved,
    geometry: ModelGeometry,
    width: int,
    height: int,
    dtype: torch.dtype,
    batch: int = 1,
    **cache: Any,
) -> RolloutSpec:
    return RolloutSpec(
        geometry, batch, height // 8, width // 8, resolved.numbers["chunk_frames"], resolved.numbers["window_frames"],
        resolved.anchor, resolved.numbers["positions"], dtype, **resolved.spec_options(len(resolved.schedule.sigmas)),
        **cache,
    )  # fmt: skip


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
    resolved = resolve(defaults or None, {}, None)
    dtypes = sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})
    shape = ModelGeometry(16, geometry.layers, geometry.heads, geometry.width // geometry.heads)
    plan = _spec(resolved, shape, width, height, torch.bfloat16).plan(TEXT_TOKENS)
    layout = "a torch file" if checkpoint.path.suffix.lower() in TORCH_SUFFIXES else "safetensors"
    lines = [
        f"{file}: Wan 2.1 text to video, {geometry.parameters}: {geometry.layers} layers of width {geometry.width}, "
        f"{geometry.heads} heads, feed-forward {geometry.feed_forward}",
        f"layout: {layout}{f', its {checkpoint.part}' if checkpoint.part else ''}; {len(checkpoint.shapes)} weights, "
        f"{_size(checkpoint.nbytes)} in {', '.join(dtypes)}",
    ]
    if checkpoint.beside:
        lines.append(f"not taken, beside its {checkpoint.part or 'weights'}: {listed(checkpoint.beside)}")
    if unused := checkpoint.unused():
        lines.append(unused)
    if geometry.in_channels != 16:
        lines.append(f"it takes {geometry.in_channels} input channels; a rollout needs plain text to video with 16")
    if resolved.preset:
        lines.append("taken for " + resolved.preset.describe())
    elif defaults:
        own = {name: value for name, value in resolved.numbers.items() if name in defaults}
        lines.append(f"its own settings: {json.dumps(own)}; anchor {json.dumps(resolved.anchor.describe())}")
    else:
        lines.append("nothing says how it is rolled out; choose one of the presets " + ", ".join(PRESETS))
    per_frame = 2 * plan.frame_bytes * geometry.layers
    latents = (length - 1) // 4 + 1
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
    resolved = resolve(rollout_defaults(model), asked, anchor)
    spec = _spec(
        resolved, host_model.geometry_of(model), width, height, host_model.compute_dtype(model), batch, **cache
    )
    vae_bytes = HostDecoder(vae).cache_bytes(batch, height // 8, width // 8) if vae is not None else 0
    plan, free = spec.plan(TEXT_TOKENS, vae_bytes), host_model.available_bytes(model)
    try:
        host_model.check_memory(plan, free)
        host_model.check_host_memory(plan)
        verdict, fits = f"fits: {_size(free)} could be free on the device", True
    except ValueError as error:
        verdict, fits = str(error), False
    latents = (length - 1) // 4 + 1
    warnings = [*resolved.warnings(latents), *checks.unknown_options(model)]
    kept = batch * 16 * latents * (height // 8) * (width // 8) * 4
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
