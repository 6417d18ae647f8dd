"""A causal model in training: one forward of [state | content] over a cache that gradients pass through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adastate_core.anchors import anchor_from
from adastate_core.attention.wan import SESSION, TEXT_KEY
from adastate_core.rope import Rope
from adastate_core.schedules.schedule import TIMESTEPS

from .bare_model import patch_attention
from .graph_attention import Gradients, GraphAttention
from .teacher_forcing import flat_attention
from .texts import texts_of


def compute_blocks_again(model: nn.Module) -> None:
    """Keep only every block's input for the backward pass and compute the rest again (activation checkpointing)."""
    for block in model.blocks:
        block.forward = partial(_computed_again, block.forward)


def _computed_again(forward: Callable[..., torch.Tensor], *args: Any, **more: Any) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **more)
    return checkpoint(forward, *args, use_reentrant=False, **more)


class Student(nn.Module):
    """What the stages of the recurrence share. `config` gives `anchor`, `window_frames`, `positions`, and what the
    gradient may cross: `window_gradient`, `state_gradient` (chunks)."""

    def __init__(self, model: nn.Module, config: dict) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.anchor = anchor_from(config["anchor"])
        self.texts = texts_of(config)
        patch_attention(model)
        if config.get("checkpoint_blocks"):
            compute_blocks_again(model)

    def session(self, latents: torch.Tensor, offset: int = 0) -> GraphAttention:
        """A fresh cache for clips of this size [B, 16, T, h, w]; `offset` shifts where the gradient is cut."""
        rows, columns = (n // 2 for n in latents.shape[-2:])
        gradients = Gradients(self.config["window_gradient"], self.config["state_gradient"], offset)
        return GraphAttention(
            Rope(self.model.dim // self.model.num_heads, rows, columns, latents.device), len(self.model.blocks),
            self.model.num_heads, self.anchor, self.config["window_frames"], self.config["positions"], gradients, flat_attention,
        )  # fmt: skip

    def context(self, words: torch.Tensor, kept: tuple[int, ...] | None = None) -> torch.Tensor:
        """One chunk's conditions [B, slots] to [B, n, 4096] as the model is (`texts.Texts.context`)."""
        return self.texts.context(words, kept).to(next(self.model.parameters()))

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, session: GraphAttention
    ) -> torch.Tensor:
        """v of [state | content] x [B, 16, S + n, h, w] at `sigma` [B]."""
        options = {SESSION: session.begin(x.shape[2] - self.anchor.state_frames), TEXT_KEY: 0}
        return self.model.forward_orig(x, TIMESTEPS * sigma, context, freqs=None, transformer_options=options)
