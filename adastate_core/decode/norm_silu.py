"""The VAE's norm, and SiLU behind it, as one function of pixels in rows: each is one kernel where it is compiled (fused.py)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

# the host's norm divides by no less than 1e-12
_LEAST_SQUARE = 1e-24


def norm(rows: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Each row of [n, C] over its length, times `gain` [C] float32; worked out in float32 and rounded to the rows' dtype once.

    With gain = sqrt(C) gamma it is the host's RMS_norm (comfy/ldm/wan/vae.py), which rounds after each of its five steps.
    """
    return _lengths_taken(rows).mul_(gain).to(rows.dtype)


def norm_silu(rows: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) of `norm`, rounded once."""
    return silu(_lengths_taken(rows).mul_(gain), inplace=True).to(rows.dtype)


def _lengths_taken(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.float()
    return wide * (wide * wide).sum(1, keepdim=True).clamp_min_(_LEAST_SQUARE).rsqrt_()


FUNCTIONS = {"norm": norm, "norm_silu": norm_silu}
