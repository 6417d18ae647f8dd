"""Rolling Forcing's schedule (arXiv 2509.25161): a window of chunks denoised together, each cleaner than the one behind it.

At every pass a chunk of pure noise enters behind the others, all take one step of their own, and the oldest, which has
taken its last, is finished. With N steps the window grows to N chunks, so a chunk costs one pass over N chunks and the clean
pass. Noise is that of the chunk-wise schedule: a chunk's number and step alone decide it.

In the published loop the chunks under way take their room from the past (`shared`), and at the end of the video no chunk
enters any more, so the window shrinks (`shrinks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..rope import Layout
from .noise import noise
from .schedule import TIMESTEPS
from .solvers import renoised


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
    blocks: Sequence[Block], x0: torch.Tensor, sigmas: Sequence[float], seed_of: Callable[[int], int]
) -> tuple[torch.Tensor | None, tuple[Block, ...]]:
    """(the oldest chunk if it is finished, the others at the noise of their next step) after a pass that gave `x0`; `seed_of` tells
    each chunk's seed by its number."""
    parts = x0.split(blocks[0].x.shape[2], dim=2)
    going, finished = [], None
    for block, clean in zip(blocks, parts, strict=True):
        step = block.step + 1
        if step == len(sigmas):
            finished = clean
            continue
        fresh = noise(seed_of(block.chunk), block.chunk, step, clean.shape).to(clean.device)
        going.append(replace(block, step=step, x=renoised(clean, fresh, sigmas[step])))
    return finished, tuple(going)


def shared(layout: Layout, chunk_frames: int, frames: int, clean: bool) -> Layout:
    """What a pass over `frames` frames reads, and where, if current frames and past have room for W + F frames together.

    `layout` is the pass's with everything in the window read. A noisy pass reads the anchor, put just in front of the newest
    window frames that still have room. A clean pass reads the newest cached frames: the anchor while it is among them.
    Window and content stand at their own times throughout, so only the anchor ever moves.
    """
    room = layout.window_capacity + chunk_frames - frames
    anchor, window = layout.anchor_present, layout.window_present
    if clean:
        reads_anchor = anchor + window <= room
        newest = min(window, room)
    else:
        reads_anchor = True
        newest = max(0, min(window, room - anchor))
    past = {"packed": anchor + newest, "fixed": layout.anchor_capacity + layout.window_capacity}
    at = None if layout.mode == "absolute" else layout.first_frame - past[layout.mode]
    return replace(layout, mode="absolute", reads_window=newest, reads_anchor=reads_anchor, anchor_at=at)


def shrinks(next_frame: int, under_way: int, blocks: int, chunk_frames: int, length: int) -> bool:
    """Whether the next chunk, from `next_frame` on, is finished in a window of fewer than `blocks` chunks, because none
    enters that begins at `length` latent frames or later. Not where one of those `under_way` begins there already."""
    entered, newest = next_frame + (under_way - 1) * chunk_frames, next_frame + (blocks - 1) * chunk_frames
    return (not under_way or entered < length) and newest >= length


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
