"""The makes of Wan's VAE: how the decoder of each is called, and what it carries from one call to the next.

Read in Wan 2.1, modules/vae.py, and Wan 2.2, modules/vae2_2.py: the later one gives 12 channels that hold 2 by 2 pixels of 3, is
told which call is a video's first, and has other widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class WanMake:
    """What VaeStream asks of a make.

    The full cache holds `width_values` values a latent pixel for each channel of the decoder's width, and `pixel_values` beside
    them. `patch`: pixels a side that the channels of the decoder's output hold. `told_first`: the decoder is told which call is a
    video's first, by the argument `first_chunk`.
    """

    width_values: int
    pixel_values: int
    patch: int = 1
    told_first: bool = False

    def cache_bytes(self, width: int, rows: int, columns: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the carried cache once it is full. `width` is the decoder's, `rows` x `columns` the latent picture."""
        return (self.width_values * width + self.pixel_values) * rows * columns * batch * dtype.itemsize

    def decode(self, codec: nn.Module, latents: torch.Tensor, cache: list[Any], first: bool) -> list[torch.Tensor]:
        """One call: latents [B, C, n, h, w] to pieces [B, 3, t, H, W] about -1..1. `cache`, what the causal convolutions saw
        last, is brought up to date; `first`: it is a video's first call."""
        told = {"first_chunk": first} if self.told_first else {}
        out = codec.decoder(codec.conv2(latents), feat_cache=cache, feat_idx=[0], **told)
        pieces = list(out) if isinstance(out, list | tuple) else [out]
        return pieces if self.patch == 1 else [_in_pixels(piece, self.patch) for piece in pieces]


def _in_pixels(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, c * patch * patch, t, h, w], of each pixel first its column in the patch and then its row, to
    [B, c, t, patch h, patch w]."""
    patches = x.unflatten(1, (-1, patch, patch))  # [B, c, column, row, t, h, w]
    return patches.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


# the decoder's widths are 96 and 256 in the published files
VAE_2_1 = WanMake(1576, 32)
VAE_2_2 = WanMake(1784, 96, patch=2, told_first=True)
