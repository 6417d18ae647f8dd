"""The host's guiders and samplers: what a SAMPLER is given, checked, and the guider's loaded model as a CausalModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy.samplers import CFGGuider, Sampler

from ...adastate_core.families.family import Family
from .model import HostModel, family_of_model
from .refusals import check_conditioning, check_model, unknown_conditioning, unknown_options

__all__ = ["Sampler", "GuidedModel", "check_guider", "check_latents", "unknown"]

_GUIDERS = "use Basic Guider, or CFG Guider with cfg 1"


def check_guider(guider: Any, extra_args: dict[str, Any]) -> torch.Tensor:
    """The context [1 or B, tokens, width] of the one prompt that `guider` follows; ValueError naming what else it wants.

    Any guider that predicts as the host's CFGGuider does will do. `extra_args`: those of the sampling run.
    """
    if getattr(type(guider), "predict_noise", None) is not CFGGuider.predict_noise:
        raise ValueError(
            f"the guider is a {type(guider).__name__}, which mixes predictions in its own way; the rollout's cache holds one "
            f"prompt: {_GUIDERS}"
        )
    if not math.isclose(guider.cfg, 1.0):
        raise ValueError(
            f"cfg is {guider.cfg:g}; the rollout's cache holds the keys and values of one prompt, so there is no second "
            f"prediction to weigh against: {_GUIDERS}"
        )
    check_model(guider.model_patcher, extra_args["model_options"], sampled=True)
    if (family := family_of_model(guider.model_patcher)).driven_by_sound:
        raise ValueError(
            f"a model of {family.name} is driven by sound, which this sampler has no input for: use AdaState Rollout"
        )
    context = check_conditioning(_positive(guider), family_of_model(guider.model_patcher))
    if context is None:
        raise ValueError("positive holds no text embeddings; connect a plain text prompt")
    return context


def unknown(guider: Any, model_options: dict[str, Any]) -> list[str]:
    """A sentence each about what the model and the prompt of a guider carry and nobody knows."""
    found = unknown_options(guider.model_patcher, model_options, sampled=True)
    return found + unknown_conditioning(_positive(guider), family_of_model(guider.model_patcher))


def _positive(guider: Any) -> list[list[Any]]:
    return [[cond.get("cross_attn"), cond] for cond in guider.conds.get("positive", [])]


def check_latents(family: Family, noise: torch.Tensor, latent: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """ValueError unless `noise` is that of an empty, unmasked video latent of `family`'s space."""
    space = family.space
    if noise.ndim != 5 or noise.shape[1] != space.channels:
        raise ValueError(
            f"the latent is {list(noise.shape)}; it must be an empty {space.name} video latent "
            f"[batch, {space.channels}, frames, h, w], such as {family.empty_latent} gives"
        )
    if mask is not None:
        raise ValueError("the latent carries a noise mask, which a rollout cannot honour; connect an empty latent")
    if latent is not None and bool(torch.count_nonzero(latent)):
        raise ValueError(
            "the latent holds a picture or video already; this sampler makes every frame of an empty latent: to go on from "
            "given frames, connect them to start_latent of AdaState Rollout"
        )


class GuidedModel(HostModel):
    """The model that a guider has loaded: no clone of it, so run it inside `attention_in_place(patcher)`.

    `load` gives and takes memory, so that the weights and the rollout's caches fit beside each other.
    """

    def __init__(self, patcher: Any, context: torch.Tensor, batch: int, model_options: dict[str, Any]) -> None:
        """`model_options`: those of the sampling run."""
        super().__init__(patcher, context, batch)
        self._options = self._seen = dict(model_options.get("transformer_options", {}))

    def _prepared(self, patcher: Any) -> Any:
        return patcher
