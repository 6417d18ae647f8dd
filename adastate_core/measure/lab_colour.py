"""CIE Lab of sRGB colours, by kornia: the one place where the pack makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch


def lab(colours: torch.Tensor) -> torch.Tensor:
    """[..., 3] sRGB in 0..1 to CIE Lab (D65), where a distance of 1 is about what an eye can just tell apart."""
    from kornia.color import rgb_to_lab

    flat = colours.reshape(-1, 3).clamp(0, 1)
    return rgb_to_lab(flat.T[None, :, :, None])[0, :, :, 0].T.reshape(colours.shape)


def mean_lab(pictures: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """The mean L*, a*, b* of all pixels of pictures [h, w, 3] uint8 sRGB, as float64 [3]."""
    pixels = numpy.concatenate([picture.reshape(-1, 3) for picture in pictures])
    return lab(torch.from_numpy(pixels).float() / 255).mean(0, dtype=torch.float64).numpy()
