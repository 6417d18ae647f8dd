"""Weights and activations in 8 bits (W8A8), emulated to the last bit in float: what an int8 matrix product gives.

A linear's weight has one scale an output channel, its input one a token; both are symmetric, -127 to 127. The host itself
multiplies in 8 bits in another format, and only on GPUs with float8 matrix products: e4m3, one scale a tensor (comfy/ops.py,
fp8_linear). Here a CPU is asked what 8 bits cost in quality, and not what they save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 127
# so many products of two 8-bit numbers add up without rounding in float32
EXACT = 2**24 // LEVELS**2
# of a block, what is multiplied in 8 bits: all its matrices
PARTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
         "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers of -127..127 as floats, scales [..., 1]) of the rows of x [..., n]."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / LEVELS
    return (x / scale).round().clamp(-LEVELS, LEVELS), scale


class EightBitLinear(nn.Module):
    """Stands for `linear`. The products are whole numbers and add up exactly, in float64 where float32 would round."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        whole, self.scale = eight_bits(linear.weight.detach().float())
        self.whole = whole.double() if whole.shape[1] > EXACT else whole
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole, scale = eight_bits(x.float())
        out = F.linear(whole.to(self.whole.dtype), self.whole).float() * scale * self.scale[:, 0]
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def in_eight_bits(model: nn.Module) -> nn.Module:
    """`model`, with the matrices of its blocks replaced; text, time, patch and head layers stay as they are."""
    for block in model.blocks:
        for part in PARTS:
            block.set_submodule(part, EightBitLinear(block.get_submodule(part)))
    return model
