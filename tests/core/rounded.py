"""What 8 bits keep of keys and values, written out: the nearest number of the format's own list. Has no code of adastate_core."""

from __future__ import annotations

from collections.abc import Callable

import torch


def e4m3_values() -> torch.Tensor:
    """Every finite number of the format, from its bits: sign, 4 of exponent with bias 7, 3 of mantissa."""
    magnitudes = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)]
    magnitudes = torch.tensor(magnitudes[:-1])  # the last one is NaN
    return torch.cat([-magnitudes, magnitudes]).unique()


GRIDS = {"fp8": e4m3_values(), "int8": torch.arange(-127.0, 128.0)}


def held_as(cache_dtype: str, heads: int = 2) -> Callable[[torch.Tensor], torch.Tensor]:
    """Head by head: the nearest numbers of the grid whose end is the head's largest magnitude. [B, P, width]."""
    grid = GRIDS[cache_dtype]

    def hold(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for item, kept in zip(x, out, strict=True):
            for part, rounded in zip(item.chunk(heads, -1), kept.chunk(heads, -1), strict=True):
                step = part.abs().max() / grid[-1]
                rounded.copy_(grid[(part[..., None] / step - grid).abs().argmin(-1)] * step)
        return out

    return hold


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
