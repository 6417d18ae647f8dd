"""What the pack's own operations take on the device beside the cache, the tables and the host's forward: one at a time, so the
largest of them counts. Each figure follows the operation of that name; tests count the live bytes of all of them
(tests/core/test_planned_bytes.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Planned(Protocol):
    """What the figures are made of: a plan of one phase (byte_plan.CachePlan)."""

    batch: int
    tokens: int
    width: int
    dtype: torch.dtype
    cache_dtype: str
    latent_frame_bytes: int
    steps: int
    layers: Sequence[Any]
    one_pass_frames: int
    reference_tokens: int

    @property
    def current_frames(self) -> int: ...

    @property
    def pass_frames(self) -> int: ...

    @property
    def block_frames(self) -> int: ...

    @property
    def most_slots(self) -> int: ...

    @property
    def expands(self) -> bool: ...

    def snapshot_bytes(self, layer: Any) -> int: ...


# the most that one of the two page-locked buffers of a snapshot takes: a layer of the 1.3B at 832x480 with 18 frames
MOST_BLOCK = 1 << 28
# bytes: whatever the dtype, its numbers begin where they may
ALIGNED = 16
# latents [B, C, frames, h, w] float32 of a chunk that live at once beside the noise of its steps: x and x0 of this step and of
# the one before, the velocity, and what makes one of the other
LATENTS = 7
# the same of such a pass: what goes in, the velocity, and which of its numbers are finite
ONE_PASS_LATENTS = 3


def block_of(size: int, most: int = MOST_BLOCK) -> int:
    """Bytes of a staging buffer that takes `size` bytes of frames, each of them aligned: a power of two, `most` at most."""
    return min(most, 1 << (size + 64 * ALIGNED - 1).bit_length()) if size else 0


def locked(size: int) -> int:
    """What torch takes for a page-locked block of `size` bytes: its allocator rounds every one up to a power of two and keeps
    it for whoever asks next (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size else 0


def latent_bytes(plan: Planned) -> int:
    """Noise of all steps of a chunk, and the latents that it becomes; or the latents of a pass that makes a window again."""
    frames = max((plan.steps + LATENTS) * plan.current_frames, ONE_PASS_LATENTS * plan.one_pass_frames)
    return frames * plan.latent_frame_bytes


def operation_bytes(plan: Planned, collects: bool, corrects: bool) -> int:
    """The most that one operation takes. `collects`: an absorption takes statistics; `corrects`: it corrects some layers."""
    each, size = plan.batch * plan.tokens * plan.width, plan.dtype.itemsize
    rounded = 0 if size == 4 else size
    turned = size + 4 + rounded  # neighbours changed about, the product in float32, rounded
    frames = plan.current_frames
    taken = [
        plan.pass_frames * turned,  # queries, or keys, of a pass
        plan.block_frames * (size + 4 + 4),  # cached keys in float32, while the block before goes to its place
    ]
    taken.append(2 * FLUSHED * 3 * size)
    taken.append(
        plan.most_slots * 2 * size
    )  # keys and values of a pass over less than a chunk, which are copied together
    if plan.reference_tokens:
        # keys and values of a pass with the reference's behind them, and those keys as they were turned; or, where the reference is
        # made, one after another its queries or keys as they are turned
        share = plan.reference_tokens / plan.tokens
        taken.append((plan.most_slots + share) * 2 * size + share * turned)
    # the queries of a pass that makes a window again, and its keys and values, which are copied together while there are few
    taken.append(plan.one_pass_frames * 3 * size)
    if plan.expands:
        taken.append(plan.block_frames * 12)
    if collects:
        taken.append(frames * _collected(size))
    if corrects:
        taken.append(frames * 5 * size)
    if plan.cache_dtype != "model":
        taken.append(QUANTISED)
    if any(layer.blend_frames for layer in plan.layers):
        # the draft's scratch with a frame's key and value; blended keys turned in float32, while the block before goes to its place
        taken += [4 * 4 + 2 * 4 + 2 * size, plan.block_frames * 12]
    return math.ceil(each * max(taken))


# frames that a flush leaves, each of which changes places with another: key, value and raw key
FLUSHED = 2
# a frame's key in float32, divided, clamped and rounded
QUANTISED = 4 * 4


def _collected(size: int) -> int:
    """Of each number of a query: the query, two parts' outputs, their merge in float32, and the rows that are added up."""
    return 4 * size + 5 * 4


def working_bytes(plan: Planned, collects: bool, corrects: bool) -> int:
    """All of it, of a plan of one phase."""
    snapshot = min(MOST_BLOCK, max((plan.snapshot_bytes(layer) for layer in plan.layers), default=0))
    return latent_bytes(plan) + max(operation_bytes(plan, collects, corrects), snapshot)
