"""A bare host transformer as a rollout's CausalModel: the product's own rollout, without a server around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adastate_core.attention.cached import CachedAttention, plain_attention
from adastate_core.attention.wan import SESSION, TEXT_KEY, cross_attention_forward, self_attention_forward
from adastate_core.geometry import WAN21
from adastate_core.rollout import ModelGeometry
from adastate_core.schedules.schedule import timesteps
from adastate_core.weights.checkpoints import geometry_of, open_checkpoint

from .host_models import build_codec, build_denoiser


def patch_attention(model: nn.Module) -> None:
    """Route a bare Wan model's attention through the session in `transformer_options`, as the adapter does."""
    for i, block in enumerate(model.blocks):
        own, cross = type(block.self_attn).forward, type(block.cross_attn).forward
        block.self_attn.forward = self_attention_forward(block.self_attn, i, own.__get__(block.self_attn))
        block.cross_attn.forward = cross_attention_forward(block.cross_attn, i, cross.__get__(block.cross_attn))


class BareModel:
    """Drives `model` (as `build_denoiser` gives it) for a `context` [B, n, 4096], which `set_context` replaces."""

    kernel = staticmethod(plain_attention)

    def __init__(self, model: nn.Module, context: torch.Tensor) -> None:
        self.device = next(model.parameters()).device
        self.model, self.context = model, context.to(self.device)
        self.geometry = ModelGeometry(WAN21.channels, len(model.blocks), model.num_heads, model.dim // model.num_heads)
        patch_attention(model)

    def set_context(self, context: torch.Tensor) -> None:
        self.context = context.to(self.device)

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        times = timesteps(timestep, x)
        options = {SESSION: attention, TEXT_KEY: id(self.context)}
        return self.model.forward_orig(x, times, self.context, transformer_options=options)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """A stage's `model.pt`, an exported file or a public checkpoint, in float32 by plain names."""
    return {name: value.float() for name, value in open_checkpoint(path).tensors()}


def load_denoiser(path: str) -> nn.Module:
    """The transformer of a stage or of an exported file, in float32, of whatever size it is."""
    weights = read_weights(path)
    sizes = geometry_of({name: tuple(value.shape) for name, value in weights.items()}, path)
    model = build_denoiser(sizes.width, sizes.feed_forward, sizes.layers)
    model.load_state_dict(weights)
    return model


def load_codec(path: str) -> nn.Module:
    """The codec of an exported file, in float32."""
    weights = read_weights(path)
    codec = build_codec(weights["decoder.head.0.gamma"].shape[0])
    codec.load_state_dict(weights)
    return codec
