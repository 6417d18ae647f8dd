"""What a MODEL, a CONDITIONING or a LATENT carries that the host would act on and a rollout cannot: refused by name.

A rollout calls the layers of the host's Wan itself, with attentions of its own (adastate_core/attention/wan.py), so what
the host does around a forward, in it besides the layers, or in an attention, would be skipped without a word. Keys that
nobody knows are told in a sentence and never refused: newer hosts and other packs put harmless ones there.
Read in ComfyUI 0.3.75, comfy/ldm/wan/model.py, model_base.py, samplers.py, model_patcher.py; newer keys in 0.33.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.utils
import torch

from ...adastate_core.families.family import Family
from ...adastate_core.families.known import FAMILIES, family_of
from ...adastate_core.families.wan21 import WAN21_TEXT

NOTES_KEY = "adastate_notes"  # of model_options: what of a MODEL's files it does without, a sentence each
_SKIPPED = "which a rollout would silently skip; remove the node that sets it"
_CONTROL_OPTIONS = {
    "model_function_wrapper": "a UNet wrapper",
    "sampler_cfg_function": "a CFG function",
    "sampler_pre_cfg_function": "a pre-CFG function",
    "sampler_post_cfg_function": "a post-CFG function",
    "sampler_calc_cond_batch_function": "a cond batch function",
    "denoise_mask_function": "a denoise mask function",
    "context_handler": "context windows",
}
# entries of transformer_options that the host reads beside a forward's layers: the words for them, and what to do
_REFUSED_OPTIONS = {
    "rope_options": (
        "RoPE options",
        "a rollout numbers time and place by its own positions; remove the Scale RoPE node",
    ),
    "ar_config": (
        "the first picture of the host's own autoregressive sampler",
        "a rollout takes given frames at start_latent; remove the node that sets it",
    ),
}
_PATCHES_FROM = "Kohya Deep Shrink, a model patch, a pack that replaces blocks, ..."
_WRAPPERS_FROM = "EasyCache, context windows, torch.compile, ..."
# what ComfyUI puts into model_options beside the functions above; a rollout needs none of it
_KNOWN_OPTIONS = {
    "transformer_options",
    "disable_cfg1_optimization",
    "torch_compile_kwargs",
    "registered_hooks",
    "to_load_options",
}
# transformer_options that are acted on, or that only say where in a sampling run or a forward the host is
_KNOWN_TRANSFORMER_OPTIONS = {
    "optimized_attention_override",
    "wrappers",
    "callbacks",
    "sample_sigmas",
    "sigmas",
    "cond_or_uncond",
    "uuids",
    "activations_shape",
    "block",
    "block_index",
    "block_type",
    "grid_sizes",
    "original_shape",
    "total_blocks",
    "transformer_index",
    "prefetch_dynamic_vbars",
}
_OWN = "adastate_"
# callbacks of a run of the host's sampler, which a rollout of ours is not: who relies on them gets nothing
_RUN_CALLBACKS = {"on_pre_run"}
_STEP_CALLBACKS = {"on_prepare_state"}
_KNOWN_CALLBACKS = {
    "on_clone",
    "on_load_after",
    "on_detach_after",
    "on_inject_model",
    "on_eject_model",
    "on_apply_hooks",
    "on_register_all_hook_patches",
}
# what the host calls on its way to the layers and a rollout does not
_NOT_CALLED = (
    "apply_model",
    "_apply_model",
    "extra_conds",
    "concat_cond",
    "process_timestep",
    "diffusion_model.forward",
    "diffusion_model._forward",
    "diffusion_model.rope_encode",
)
# object patches beside the layers that are acted on, or that the docs say are not used
_KNOWN_PATCHED = {"model_sampling", "manual_cast_dtype", "memory_required"}
_ROPE_MODULE = "diffusion_model.rope_embedder"
_KNOWN_CONDITIONING = {
    "cross_attn",
    "model_conds",
    "uuid",
    "strength",
    "pooled_output",
    "attention_mask",
    "prompt_type",
}
_KNOWN_MODEL_CONDS = {"c_crossattn"}
# "downscale_ratio_...": what newer hosts note of an empty latent
_KNOWN_LATENT = {"samples", "downscale_ratio_spacial", "downscale_ratio_temporal"}


def check_model(patcher: Any, options: Mapping[str, Any] | None = None, sampled: bool = False) -> None:
    """ValueError, saying what was given and what is accepted, unless a rollout can drive this MODEL.

    `options`: the model_options of a sampling run instead of the patcher's own. `sampled`: the host's sampler runs it, so
    that what it calls before a run has been called.
    """
    config = type(patcher.model.model_config).__name__
    if (family := family_of(config)) is None:
        driven = ", ".join(f"{one.name} ({one.model_class})" for one in FAMILIES)
        raise ValueError(
            f"the model is a {config}; a rollout drives models of {driven}: load a causal checkpoint such as Self-Forcing or "
            "LongLive 2.0 with Load Causal Video Model"
        )
    own = family.space.channels
    channels = patcher.model.model_config.unet_config.get("in_dim", own)
    if channels != own:
        raise ValueError(f"the model takes {channels} input channels; a rollout needs plain text-to-video with {own}")
    options = patcher.model_options if options is None else options
    for name, words in _CONTROL_OPTIONS.items():
        if options.get(name):
            raise ValueError(f"the model carries {words} ({name}), {_SKIPPED}")
    inner = options.get("transformer_options", {})
    _check_transformer_options(inner)
    _check_wrappers(patcher, inner)
    _check_callbacks(patcher, inner, sampled)
    _check_replaced(patcher)


def _check_transformer_options(inner: Mapping[str, Any]) -> None:
    for name, value in inner.items():
        if str(name).startswith("patches"):
            if entries := list(_entries(value)):
                what = f"patch {', '.join(entries)} ({name})" if isinstance(value, Mapping) else f"patches ({name})"
                raise ValueError(f"the model carries the {what}, {_SKIPPED} ({_PATCHES_FROM})")
        elif name in _REFUSED_OPTIONS and value:
            words, advice = _REFUSED_OPTIONS[name]
            raise ValueError(f"the model carries {words} ({name}), which a rollout would silently skip: {advice}")


def _entries(value: Any, above: str = "") -> Iterator[str]:
    """The names of what there is in a dict of dicts; what is empty asks for nothing."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = " ".join(str(part) for part in key) if isinstance(key, tuple) else str(key)
            yield from _entries(inner, f"{above} {name}".strip())
    elif value is not None and not (isinstance(value, Sequence) and not value):
        yield above


def _both(patcher: Any, inner: Mapping[str, Any], name: str) -> Iterator[tuple[str, list[str]]]:
    """(kind, keys) of the wrappers or callbacks that the patcher or its options hold; what is empty is left out."""
    for held in (getattr(patcher, name, {}), inner.get(name) or {}):
        for kind, keyed in held.items():
            if names := [str(key) for key, functions in keyed.items() if functions]:
                yield str(kind), names


def _check_wrappers(patcher: Any, inner: Mapping[str, Any]) -> None:
    for kind, names in _both(patcher, inner, "wrappers"):
        raise ValueError(f"the model carries the {kind} wrapper {', '.join(names)}, {_SKIPPED} ({_WRAPPERS_FROM})")


def _check_callbacks(patcher: Any, inner: Mapping[str, Any], sampled: bool) -> None:
    skipped = _STEP_CALLBACKS if sampled else _STEP_CALLBACKS | _RUN_CALLBACKS
    for kind, names in _both(patcher, inner, "callbacks"):
        if kind in skipped:
            raise ValueError(f"the model carries the {kind} callback {', '.join(names)}, {_SKIPPED}")


def _check_replaced(patcher: Any) -> None:
    """Nothing but a rollout may have put another forward into the attentions, or around the layers."""
    wan = patcher.model.diffusion_model
    names = [f"diffusion_model.blocks.{i}.{a}" for i in range(len(wan.blocks)) for a in ("self_attn", "cross_attn")]
    above = {"diffusion_model", "diffusion_model.blocks", *(name.rpartition(".")[0] for name in names), *names}
    for name in patcher.object_patches:
        if name.startswith(_ROPE_MODULE) or name in above and not _compiled(patcher, name):
            raise ValueError(f"the model carries another {name} (an object patch), {_SKIPPED}")
    for path in (*_NOT_CALLED, *(f"{name}.forward" for name in names)):
        if is_replaced(patcher, path):
            raise ValueError(f"the model carries another {path}, {_SKIPPED} (NAG, an attention patch, ...)")


def _compiled(patcher: Any, name: str) -> bool:
    """Whether the object patch `name` is the model's own layer, compiled: that runs."""

    def plain(module: Any) -> Any:
        return getattr(module, "_orig_mod", module)

    own = patcher.object_patches_backup.get(name)
    own = comfy.utils.get_attr(patcher.model, name) if own is None else own
    return name.startswith("diffusion_model.blocks.") and plain(patcher.object_patches[name]) is plain(own)


def is_replaced(patcher: Any, path: str) -> bool:
    """Whether the method at `path` is another than its class gives, by an object patch or written over in place.

    A forward that a rollout left there is put back by the host before the next one, which knows the original by then.
    """
    if path in patcher.object_patches:
        return True
    owner_path, _, name = path.rpartition(".")
    owner = comfy.utils.get_attr(patcher.model, owner_path) if owner_path else patcher.model
    owner = getattr(owner, "_orig_mod", owner)
    if name not in vars(owner):
        return False
    method = patcher.object_patches_backup.get(path, vars(owner)[name])
    return getattr(method, "__func__", None) is not getattr(type(owner), name, None)


def _unknown(what: str, names: Sequence[str]) -> str:
    return (
        f"{what} {', '.join(sorted(names))}, which AdaState does not know and does not act on: if a node of another pack put "
        "it there, what that node is for may be missing from the video"
    )


def unknown_options(patcher: Any, options: Mapping[str, Any] | None = None, sampled: bool = False) -> list[str]:
    """A sentence each about what a MODEL that passed `check_model` carries and nobody here knows, and what its files left out."""
    options = patcher.model_options if options is None else options
    inner = options.get("transformer_options", {})
    outer = [str(key) for key in options if key not in _KNOWN_OPTIONS | set(_CONTROL_OPTIONS)]
    found = [
        ("the model's options hold", outer),
        (
            "the model's transformer_options hold",
            [
                str(key)
                for key in inner
                if key not in _KNOWN_TRANSFORMER_OPTIONS | set(_REFUSED_OPTIONS) and not str(key).startswith("patches")
            ],
        ),
        (
            "the model carries the object patch",
            [
                name
                for name in patcher.object_patches
                if name not in _KNOWN_PATCHED and not name.startswith("diffusion_model")
            ],
        ),
        (
            "the model carries the callback",
            sorted(
                {kind for kind, _ in _both(patcher, inner, "callbacks")}
                - _KNOWN_CALLBACKS
                - (_RUN_CALLBACKS | {"on_cleanup"} if sampled else set())
            ),
        ),
    ]
    found = [(what, [name for name in names if not name.startswith(_OWN)]) for what, names in found]
    return [*options.get(NOTES_KEY, ()), *(_unknown(what, names) for what, names in found if names)]


def overrides_attention(patcher: Any) -> bool:
    """Whether a MODEL brings an attention of its own, which a rollout uses for what it sees as one softmax."""
    return patcher.model_options.get("transformer_options", {}).get("optimized_attention_override") is not None


def check_conditioning(positive: Any, family: Family = WAN21_TEXT) -> torch.Tensor:
    """The context [1 or B, tokens, width] of a plain conditioning; ValueError naming what it carries besides, of which a
    chunk of `family` is given nothing."""
    if not isinstance(positive, Sequence) or len(positive) != 1:
        count = len(positive) if isinstance(positive, Sequence) else 0
        raise ValueError(
            f"positive holds {count} conditioning entries; a rollout takes exactly one: use one prompt, not combined ones"
        )
    context, extra = positive[0]
    for name, words in family.refused_conditions.items():
        if extra.get(name) is not None:
            raise ValueError(
                f"positive carries {words} ({name}), which a rollout cannot honour; connect a plain text prompt"
            )
    if extra.get("strength", 1.0) != 1.0:
        raise ValueError(f"positive has strength {extra['strength']}; a rollout takes a plain prompt of strength 1")
    return context


def unknown_conditioning(positive: Any, family: Family = WAN21_TEXT) -> list[str]:
    """A sentence about what a conditioning that passed `check_conditioning` carries and nobody here knows, if anything."""
    extra = positive[0][1]
    names = [str(key) for key, value in extra.items() if key not in _KNOWN_CONDITIONING and value is not None]
    names += [f"model_conds {key}" for key in extra.get("model_conds") or {} if key not in _KNOWN_MODEL_CONDS]
    names = [name for name in names if name not in family.refused_conditions]
    return [_unknown("positive carries", names)] if names else []


def check_latent(name: str, latent: Mapping[str, Any]) -> None:
    """ValueError if the LATENT at input `name` carries a noise mask, or more than a video."""
    if latent.get("noise_mask") is not None:
        raise ValueError(
            f"{name} carries a noise mask (noise_mask), and a rollout takes given frames as they are; remove Set Latent "
            "Noise Mask, or the node that masks it"
        )
    if getattr(latent["samples"], "is_nested", False):
        raise ValueError(f"{name} holds several latents at once (video and sound); connect one of a video alone")


def unknown_latent(name: str, latent: Mapping[str, Any]) -> list[str]:
    """A sentence about what the LATENT at input `name` carries besides and a rollout does not use, if anything."""
    names = [
        str(key) for key, value in latent.items() if key not in _KNOWN_LATENT | {"noise_mask"} and value is not None
    ]
    return [f"{name} carries {', '.join(sorted(names))}, which a rollout does not use"] if names else []
