"""What the pictures of a stream look like from a chunk on, as a whole and chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adastate_core.decode.wan_vae import pictures_of
from adastate_core.geometry import WAN21
from adastate_core.measure.metrics import mean_difference, sharpness, temporal_flickering

from . import measures
from .absorption_quality import chunk_flicker
from .evaluate import LEAD
from .sheets import decoded
from .world import CHUNK_LATENTS, Scene

# what is told chunk by chunk, with its axis
OVER_TIME = {
    "balloon by chunk": "balloon off its colour, dE",
    "sky by chunk": "sky off its colours, dE",
    "sharpness by chunk": "sharpness",
}


def videos_of(codec: nn.Module, latents: Sequence[torch.Tensor], first: int) -> torch.Tensor:
    """Pictures [B, t, H, W, 3] from latent frame `first` on, of streams [16, T, h, w], decoded side by side."""
    return decoded(codec, torch.stack([one[:, first - LEAD :] for one in latents]))[:, pictures_of(LEAD) :]


def picture_figures(video: torch.Tensor, first: int, scene: Scene) -> dict[str, Any]:
    """Of a video [t, H, W, 3] that begins with latent frame `first`, JSON-able; NaN where it cannot be told."""
    levels = (video * 255).round().byte().numpy()
    steps = [mean_difference(now, before) for before, now in zip(levels, levels[1:], strict=False)]
    series = {
        "balloon by chunk": measures.balloon_colour_error(video, scene),
        "sky by chunk": measures.sky_reading(video)[1],
        "sharpness by chunk": sharpness(video),
    }
    whole = {
        "balloon": torch.nanmean(series["balloon by chunk"]).item(),
        "sky": series["sky by chunk"].mean().item(),
        "seam": measures.seam(video, WAN21.pictures(first)),
        "chunk flicker": chunk_flicker(video),
        "temporal flickering": temporal_flickering(steps),
    }
    size = WAN21.temporal_stride * CHUNK_LATENTS
    return whole | {name: values.unflatten(0, (-1, size)).nanmean(1).tolist() for name, values in series.items()}
