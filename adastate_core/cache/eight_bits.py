"""Frames of keys and values in 8 bits: one scale a head and frame, and the one rounding that they get."""

from __future__ import annotations

import torch

from ..rope import Rope, Turn

# dtype and largest code
CODES = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
TINY = torch.finfo(torch.float32).tiny


def check_cache_dtype(cache_dtype: str, device: torch.device) -> None:
    """ValueError if `device` cannot cast to and from the 8-bit floats that `cache_dtype` asks for."""
    if cache_dtype != "fp8":
        return
    try:
        torch.ones(1, device=device).to(CODES["fp8"][0]).float()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"cache_dtype is fp8, which the device {device} cannot cast; choose int8 or model") from error


def quantised(x: torch.Tensor, heads: int, cache_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, P, heads * d] of one frame as 8-bit codes of the same shape and float32 scales [B, heads].

    Symmetric: a head's largest magnitude becomes the largest code. What is stored stands for code * scale.
    """
    dtype, most = CODES[cache_dtype]
    rows = x.float().unflatten(-1, (heads, -1))
    scale = (rows.abs().amax((1, 3)) / most).clamp_min(TINY)
    codes = (rows / scale[:, None, :, None]).clamp(-most, most)
    return (codes.round() if cache_dtype == "int8" else codes).to(dtype).flatten(2), scale


def unpack(packed: torch.Tensor, scale: torch.Tensor | None, heads: int, out: torch.Tensor) -> None:
    """Write frames [n, B, P, width], times their scales [n, B, heads], to `out` [B, n, P, width]: one rounding."""
    out.copy_(packed.transpose(0, 1))
    if scale is not None:  # codes are exact in every compute dtype; the product is made in float32
        out.unflatten(-1, (heads, -1)).mul_(scale.transpose(0, 1)[:, :, None, :, None])


def unpack_rotated(packed: torch.Tensor, scale: torch.Tensor | None, heads: int, turn: Turn, out: torch.Tensor) -> None:
    """The same for keys, turned by the `turn` of their n frames."""
    frames, batch, tokens = packed.shape[:3]
    rows = packed.transpose(0, 1).float().reshape(batch, frames * tokens, heads, -1)
    turned = Rope.rotate(rows, turn).unflatten(1, (frames, tokens))
    if scale is not None:
        turned.mul_(scale.transpose(0, 1)[:, :, None, :, None])
    out.copy_(turned.flatten(-2))
