"""Rollouts of the talking demo in training's own loop: few steps a chunk by re-noising, then a clean pass.

The pack's rollout of the exported file makes the same (tests/training/test_talking.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from adastate_core.rope import Rope
from adastate_core.schedules.schedule import Schedule

from .talking_attention import TalkingRollout, conditioned
from .talking_model import Sound, sound_of
from .world import CHUNK_LATENTS

# (chunk, step) -> standard normal [B, 16, n, h, w]
Noise = Callable[[int, int], torch.Tensor]


def seeded_noise(seed: int, shape: tuple[int, ...]) -> Noise:
    """Noise of `shape` for every (chunk, step) by seed."""

    def noise(chunk: int, step: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + chunk * 101 + step))

    return noise


@torch.no_grad()
def rolled_out(
    model: nn.Module,
    contexts: list[torch.Tensor],
    codes: torch.Tensor,
    stills: torch.Tensor | None,
    noise: Noise,
    schedule: Schedule,
    window_frames: int,
) -> torch.Tensor:
    """Latents [B, 16, T, h, w]: one chunk for each of `contexts` [B, n, 4096], with the sound that the ear heard as `codes`
    [B, T50, 12] and pictures to refer to as `stills` [B, 2, 16, h, w] or none."""
    start = noise(0, 0)
    rope = Rope(model.dim // model.num_heads, start.shape[-2] // 2, start.shape[-1] // 2)
    condition = None if stills is None else conditioned(model, stills)
    cache = TalkingRollout.begin(model, rope, window_frames, contexts[0], condition)
    sound, out = sound_of(model, codes, len(contexts) * CHUNK_LATENTS), []
    for number, context in enumerate(contexts):
        heard = sound.frames(number * CHUNK_LATENTS, CHUNK_LATENTS)
        out.append(_chunk(model, cache, context, heard, number, noise, schedule))
        cache.velocity(model, out[-1], 0.0, context, heard)
        cache.commit()
    return torch.cat(out, 2)


def _chunk(
    model: nn.Module,
    cache: TalkingRollout,
    context: torch.Tensor,
    heard: Sound,
    number: int,
    noise: Noise,
    schedule: Schedule,
) -> torch.Tensor:
    x = noise(number, 0)
    for step, sigma in enumerate(schedule.sigmas):
        x0 = x - sigma * cache.velocity(model, x, sigma, context, heard)
        if step + 1 < len(schedule.sigmas):
            following = schedule.sigmas[step + 1]
            x = (1 - following) * x0 + following * noise(number, step + 1)
    return x0
