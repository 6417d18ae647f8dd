"""Rolling Forcing's schedule (arXiv 2509.25161): a window of chunks denoised together, each cleaner than the one behind it.

At every pass a chunk of pure noise enters behind the others, all take one step of their own, and the oldest, which has
taken its last, is finished. With N steps the window grows to N chunks, so a chunk costs one pass over N chunks and the clean
pass. Noise is that of the chunk-wise schedule: a chunk's number and step alone decide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .noise import noise
from .schedule import TIMESTEPS, renoised


@dataclass(frozen=True)
class Block:
    """A chunk under way: its number, the step it takes next, and itself [B, C, F, h, w] float32 at that step's noise, on the
    CPU between two chunks of the rollout and when it enters, on the model's device from its first pass on."""

    chunk: int
    step: int
    x: torch.Tensor


def joined(
    blocks: Sequence[Block], sigmas: Sequence[float], device: torch.device
) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    """(x [B, C, n * F, h, w], the timestep of every frame, sigmas [n * F, 1, 1]) of one pass, oldest first; on `device`."""
    levels = [sigmas[block.step] for block in blocks for _ in range(block.x.shape[2])]
    x = torch.cat([block.x.to(device) for block in blocks], dim=2)
    return x, [TIMESTEPS * level for level in levels], torch.tensor(levels).to(device)[:, None, None]


def advanced(
    blocks: Sequence[Block], x0: torch.Tensor, sigmas: Sequence[float], seed: int
) -> tuple[torch.Tensor | None, tuple[Block, ...]]:
    """(the oldest chunk if it is finished, the others at the noise of their next step) after a pass that gave `x0`."""
    parts = x0.split(blocks[0].x.shape[2], dim=2)
    going, finished = [], None
    for block, clean in zip(blocks, parts, strict=True):
        step = block.step + 1
        if step == len(sigmas):
            finished = clean
            continue
        fresh = noise(seed, block.chunk, step, clean.shape).to(clean.device)
        going.append(replace(block, step=step, x=renoised(clean, fresh, sigmas[step])))
    return finished, tuple(going)


def under_way(noisy: torch.Tensor | None, next_chunk: int, chunk_frames: int, steps: int) -> tuple[Block, ...]:
    """The blocks that a state kept [B, C, n * F, h, w]: the oldest is one step from its end, each other one behind it.

    ValueError if they are not whole chunks, each with a step of its own behind it.
    """
    if noisy is None or not noisy.shape[2]:
        return ()
    if noisy.shape[2] % chunk_frames or noisy.shape[2] >= steps * chunk_frames:
        raise ValueError(
            f"the state holds {noisy.shape[2]} latent frames under way, not whole chunks of {chunk_frames} and at most "
            f"{steps - 1} of them: it is damaged"
        )
    parts = noisy.split(chunk_frames, dim=2)
    return tuple(Block(next_chunk + i, steps - 1 - i, part) for i, part in enumerate(parts))
