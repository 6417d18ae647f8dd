"""What a checkpoint is and what its rollout takes, in words; nothing is loaded for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import torch

from ..adastate_core.absorption.absorbed_phases import Absorbed
from ..adastate_core.anchors import Anchor
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.cache.byte_plan import CachePlan
from ..adastate_core.families.wan22_s2v import WAN22_S2V
from ..adastate_core.geometry import LatentSpace, ModelGeometry
from ..adastate_core.given import INSIDE
from ..adastate_core.spec import RolloutSpec
from ..adastate_core.weights.checkpoints import TORCH_SUFFIXES, open_checkpoint
from ..adastate_core.weights.presets import PRESETS
from ..adastate_core.weights.wan_weights import listed
from .absorption_budget import with_budget
from .builder import START_MODES, Asked, Built, Subject, build, size_of_start
from .driven import check_reference, check_track, driving_sound, length_of, rate_of, sound_told
from .enlarged_stream import FileForm, stream_bytes
from .host import model as host_model
from .host import refusals as checks
from .host.checkpoint_wishes import checkpoint_path, wished
from .host.codec import HostDecoder
from .host.vae_family import check_spaces, family_of_space
from .inputs import check_size, require_multiples
from .memory_plan import Beside, memory_plan
from .other_windows import other_windows
from .renewal import Renewal
from .stream_settings import StreamSettings

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
    space = geometry.space
    require_multiples(space, width, height)
    defaults = wished(file, checkpoint, "auto")
    dtypes = sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})
    family = WAN22_S2V if geometry.driven_by_sound else family_of_space(space)
    shape = ModelGeometry(
        space.channels, geometry.layers, geometry.heads, geometry.width // geometry.heads, space=space
    )
    subject = Subject(geometry=shape, dtype=torch.bfloat16, wishes=defaults or None, family=family)
    built = build(subject, Asked(height=height // space.stride, width=width // space.stride))
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
        lines.append("taken for " + resolved.preset.describe(sampler=resolved.sampler, space=space))
    elif defaults:
        used = resolved.numbers | {"sampler": resolved.sampler, "start": resolved.start, "fps": built.fps}
        own = {name: value for name, value in used.items() if name in defaults}
        lines.append(f"its own settings: {json.dumps(own)}; anchor {json.dumps(resolved.anchor.describe())}")
    else:
        lines.append("nothing says how it is rolled out; choose one of the presets " + ", ".join(PRESETS))
    lines.append(f"it makes {built.fps:g} frames a second")
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
    start_latent: dict[str, Any] | None = None,
    stream: StreamSettings | None = None,
    audio: AudioTrack | None = None,
    reference: Any = None,
) -> tuple[str, str]:
    """(words, JSON) of what a rollout of a MODEL would take; `cache` holds a spec's cache_dtype, cache_device, absorption. A side
    of 0 is that of `start_latent`, a `length` of 0 has no end and one of -1 is that of `audio`. With a `stream` also what its files
    will be. A `reference` is only looked at.

    ValueError for a model or size that cannot be rolled out.
    """
    checks.check_model(model)
    family = host_model.family_of_model(model)
    space = family.space
    check_track(model, family, audio)
    if start_latent is not None:
        checks.check_latent("start_latent", start_latent)
    check_spaces(family, start_latent, vae=vae or stream and stream.vae)
    width, height = size_of_start(width, height, space, start_latent)
    _require_size(width, height)
    require_multiples(space, width, height)
    size = {"batch": batch, "height": height // space.stride, "width": width // space.stride}
    rate = rate_of(audio, stream.fps if stream else 0.0)
    asked_for = Asked(**size, **asked, anchor=anchor, fps=rate, ends_open=not length, **cache)
    built = build(Subject.of(model, identified=False), asked_for)
    sound = driving_sound(family, audio, built.resolved.audio, built.fps)
    length = length_of(length, audio, sound, space)
    stream = stream and replace(stream, fps=built.fps)
    if stream is not None and audio is not None and audio.sound is not None:
        stream = stream.carrying(audio.sound, audio.offset + sound.ahead)
    vae = stream.vae if stream is not None and vae is None else vae
    check_reference(model, family, reference, tuple(size.values()), vae)
    decoder = HostDecoder(vae, fast=True) if vae is not None else None  # as a stream decodes
    vae_bytes = decoder.cache_bytes(*size.values()) if decoder else 0
    latents = space.latents(length) if length else None
    built = with_budget(built, model, TEXT_TOKENS, vae_bytes, latents)
    resolved, plan = built.resolved, built.plan(TEXT_TOKENS, vae_bytes, latents)
    others = other_windows(built, TEXT_TOKENS, vae_bytes, latents)
    free = host_model.available_bytes(model)
    try:
        host_model.check_memory(plan, free)
        host_model.check_host_memory(plan, model.load_device)
        verdict, fits = f"fits: {_size(free)} could be free on the device", True
    except ValueError as error:
        verdict, fits = str(error), False
    warnings = [*resolved.warnings(latents), *built.told, *checks.unknown_options(model)]
    warnings += sound_told(sound, space.pictures(latents) if latents else None, bool(stream and stream.sound))
    start = {} if start_latent is None else {"start_mode": START_MODES[resolved.start]}
    warnings += [] if start_latent is None else _not_inside(built, start_latent["samples"])
    kept = space.channels * (latents or 0) * math.prod(size.values()) * torch.float32.itemsize
    encodes = Renewal(model, built.spec, decoder).encodes
    decoding = decoder.working_bytes(*size.values(), encodes=encodes) if decoder else 0
    files, streamed = _streamed(stream, (width, height), batch, resolved.numbers["chunk_frames"], space, decoding)
    warnings += stream.sound_notes(space.pictures(latents) if latents else None) if stream is not None else []
    rest = Beside(
        host_model.forward_bytes(model, plan), latents or 0, states=True, **{"decoder_bytes": decoding} | streamed
    )
    beside = memory_plan(built.spec, plan, rest, model.load_device.type == "cuda")
    span = f"{length} frames" if length else "any length"
    lines = [f"planned for {width}x{height} and {span}" + (f", {batch} videos" if batch > 1 else "")]
    lines += [f"{name}: {_size(count)}" for name, count in plan.bytes().items() if count]
    lines += [
        f"keys and values in all: {_size(plan.kv_bytes)} on the device, "
        + _at_any_length(built.plan(TEXT_TOKENS, vae_bytes).kv_bytes, plan.kv_bytes),
        *_freed(plan),
        *(f"{name} instead: {_taken(one)}" for name, one in others.items()),
        *_chosen(built),
        *_switches(built.spec, plan),
        f"in host memory, with keep_latents: {_size(kept)} for {latents} latent frames"
        if latents
        else "length 0: it is rolled until it is stopped, and keeps no latents",
        f"{len(built.schedule.sigmas)} noisy passes a chunk, by the sampler {built.schedule.sampler}",
        f"beside that, by the host's estimate: {_size(beside['device']['host_forward'])} for a forward of the model",
        *(
            [f"and {_size(decoding)} to decode a chunk: the host's estimate, and older caches of the decoder"]
            if decoder
            else []
        ),
        *_recached(model, built, plan, vae_bytes, latents),
        *(
            [f"start_latent stands {START_MODES[INSIDE]}, unless start_mode says something else"]
            if start and resolved.start == INSIDE
            else []
        ),
        f"a state of it: {_size(beside['host']['state'])} in host memory while it is taken, {_size(beside['disk']['state'])} on "
        f"disk{' with keep_latents' if latents else ''}",
        *_of_files(files, space.pictures(latents) if latents else None, beside),
        verdict,
        *warnings,
    ]
    numbers = {
        "width": width, "height": height,
        "plan_bytes": plan.bytes(), "kv_bytes": plan.kv_bytes, "host_bytes": plan.host_bytes, "total_bytes": plan.total_bytes,
        **({"kv_bytes_without_absorption": plan.plain.kv_bytes} if plan.phases else {}), "free_bytes": free,
        **({"instead": {n: {"kv_bytes": p.kv_bytes, "host_bytes": p.host_bytes} for n, p in others.items()}} if others else {}),
        "memory": beside,
        "fits": fits, "kept_latents_bytes": kept, "settings": resolved.numbers | {"sampler": built.schedule.sampler} | start,
        "anchor": resolved.anchor.describe(),
        "warnings": warnings, **({"files": files.said(space.pictures(latents) if latents else None)} if files else {}),
    }  # fmt: skip
    return "\n".join(lines), json.dumps(numbers, indent=1)


def _taken(plan: CachePlan) -> str:
    """Keys and values of a plan, in words."""
    on_host = f" and {_size(plan.host_bytes)} in host memory" if plan.host_bytes else ""
    later = f", {_size(plan.held(plan.phases[-1]).kv_bytes)} once layers are switched" if plan.phases else ""
    return f"keys and values {_size(plan.kv_bytes)} on the device{on_host}{later}"


def _not_inside(built: Built, samples: torch.Tensor) -> list[str]:
    """Why start latents [B, C, n, h, w] cannot stand where the model's preset has them, a sentence."""
    try:
        if built.resolved.start == INSIDE and samples.ndim == 5:
            built.spec.check_inside(samples.shape[2])
    except ValueError as error:
        return [str(error)]
    return []


def _streamed(
    stream: StreamSettings | None,
    size: tuple[int, int],
    batch: int,
    chunk_frames: int,
    space: LatentSpace,
    decoding: int,
) -> tuple[FileForm | None, dict[str, Any]]:
    """What the files of a stream of pictures (width, height) will be, and what a memory plan has of it. ValueError where no encoder
    takes them."""
    if stream is None:
        return None, {}
    form, enlarging = stream.form(*size), stream.enlarging
    stream.check_files(form)
    enlarger = enlarging.enlarger(*size) if enlarging else None
    pictures = space.temporal_stride * chunk_frames
    return form, stream_bytes(form, stream.takes, pictures, (batch, *size), decoding, enlarger)


def _of_files(files: FileForm | None, pictures: int | None, beside: dict[str, dict[str, int]]) -> list[str]:
    """What the files of a stream of so many decoded pictures (None: without an end) will be, and what enlarging takes."""
    if files is None:
        return []
    told = [f"each file of the stream: {files.in_words(pictures)}"]
    if "enlarging" in beside["device"]:
        device, host = _size(beside["device"]["enlarging"]), beside["host"]["enlarging"] + beside["host"]["pictures"]
        told.append(
            f"enlarging takes, by the host's estimate: {device} on the device with its weights, beyond a decode, and "
            f"{_size(host)} of pictures in host memory"
        )
    return told


def _at_any_length(endless: int, here: int) -> str:
    return "the same at any length" if endless == here else f"and at most {_size(endless)} however long the video is"


def _recached(model: Any, built: Built, plan: CachePlan, vae_bytes: int, latents: int | None) -> list[str]:
    """What is taken in addition where a prompt changes by a recache of one pass."""
    recaching = built.plan(TEXT_TOKENS, vae_bytes, latents, recaches=True)
    if recaching.pass_frames == plan.pass_frames:
        return []
    forward = host_model.forward_bytes(model, recaching) - host_model.forward_bytes(model, plan)
    return [
        f"a prompt that changes by a recache takes {_size(recaching.total_bytes - plan.total_bytes)} more, and by the host's "
        f"estimate {_size(forward)} more for the forward, which then is one over {recaching.pass_frames} latent frames"
    ]


def _freed(plan: CachePlan) -> list[str]:
    """What an absorption makes of the cache, by its bytes: layers are another share of it."""
    if not plan.phases:
        return []
    (before, after), last = (_cache_bytes(one) for one in (plan.plain, plan)), plan.held(plan.phases[-1])
    return [
        f"without absorption: {_size(before)}; absorption takes {max(0.0, 1 - after / max(before, 1)):.0%} of it off the peak, and "
        f"{max(0.0, 1 - _cache_bytes(last) / max(before, 1)):.0%} once layers are switched"
    ]


def _chosen(built: Built) -> list[str]:
    """What it takes to choose the layers of an absorption."""
    absorption = built.spec.absorption
    passes = absorption.selection_passes(built.spec.geometry.layers) if absorption else 0
    if not passes:
        return []
    chunks = passes / (len(built.schedule.sigmas) + 1)
    return [f"the layers that forget are chosen by {passes} passes, once: as long as {chunks:.0f} chunks take"]


def _switches(spec: RolloutSpec, plan: CachePlan) -> list[str]:
    """When an absorption switches whose warm-up has no fixed length."""
    settings = spec.absorption
    if settings is None or settings.switch == "fixed":
        return []
    ends = Absorbed(settings, spec.anchor, spec.chunk_frames).ends(plan)
    if ends.never:
        return [f"nothing is absorbed: whole windows fit the budget of {settings.budget_gib:.4g} GiB"]
    if settings.switch == "memory":
        return [f"layers are switched after {ends.latest} latent frames, for a budget of {settings.budget_gib:.4g} GiB"]
    return [
        f"layers are switched after {ends.earliest} to {ends.latest} latent frames, when the warm-up has stopped learning"
    ]


def _cache_bytes(plan: CachePlan) -> int:
    """Keys and values, wherever they lie."""
    return plan.kv_bytes + plan.host_bytes
