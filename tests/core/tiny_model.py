"""A random causal transformer with the interface that a rollout needs; small enough for exhaustive tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from adastate_core.attention.cached import plain_attention
from adastate_core.rollout import ModelGeometry


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Linear(width, 2 * width)


class TinyModel(nn.Module):
    """2 layers, 2 heads of 12 channels; all frames at one timestep or each at its own; text once `set_context` gave it."""

    TEXT_WIDTH = 8

    def __init__(self, layers: int = 2, heads: int = 2, head_dim: int = 12, channels: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = heads * head_dim
        self.geometry = ModelGeometry(channels, layers, heads, head_dim)
        self.device, self.kernel = torch.device("cpu"), plain_attention
        self.embed = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, channels * 4)
        self.text = nn.ModuleList(nn.Linear(self.TEXT_WIDTH, 2 * width) for _ in range(layers))
        self.context: torch.Tensor | None = None
        self.calls = 0
        for parameter in self.parameters():
            parameter.requires_grad_(False).mul_(2.0)

    def set_context(self, context: torch.Tensor) -> None:
        """Text embeddings [1 or B, n, TEXT_WIDTH] that every layer attends to from then on."""
        self.context = context

    def _read_text(self, i: int, y: torch.Tensor) -> torch.Tensor:
        keys, values = self.text[i](self.context.to(y.device)).expand(y.shape[0], -1, -1).chunk(2, -1)
        return (F.layer_norm(y, y.shape[-1:]) @ keys.transpose(1, 2) / y.shape[-1] ** 0.5).softmax(-1) @ values

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: object) -> torch.Tensor:
        self.calls += 1
        b, c, t, h, w = x.shape
        y = self.embed(x).flatten(2).transpose(1, 2)
        if not isinstance(timestep, int | float):
            timestep = torch.tensor(timestep, device=x.device).repeat_interleave(y.shape[1] // t)[:, None]
        y = self._through(y, timestep, attention, t)
        y = self.head(F.layer_norm(y, y.shape[-1:])).view(b, t, h // 2, w // 2, 2, 2, c)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, t, h, w)

    def _through(self, y: torch.Tensor, timestep: float | torch.Tensor, attention: object, frames: int) -> torch.Tensor:
        """Tokens [B, N, width] through the blocks."""
        width = y.shape[-1]
        phase = timestep / 1000 * torch.arange(1, width + 1, device=y.device) / width * math.pi
        for i, block in enumerate(self.blocks):
            scale, shift = block.scale(torch.sin(phase)).chunk(2, -1)
            z = F.layer_norm(y, (width,)) * (1 + scale) + shift
            out = attention.attend(i, F.rms_norm(block.q(z), (width,)), F.rms_norm(block.k(z), (width,)), block.v(z))
            y = y + block.o(out)
            if self.context is not None:
                y = y + self._read_text(i, y)
            y = y + block.down(F.gelu(block.up(F.layer_norm(y, (width,)))))
            y = self._driven(i, y, frames)
        return y

    def _driven(self, i: int, y: torch.Tensor, frames: int) -> torch.Tensor:
        """What drives the frames behind block i; here nothing."""
        return y
