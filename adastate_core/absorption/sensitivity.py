"""Which layers the picture can do without: one noisy pass a layer, in which that layer alone has no history but its correction.

What a layer's history adds to its attention says little about what the picture owes to it, so the picture itself is asked: by how
much does the clean estimate x0 change? The pass is the first noisy one of a chunk, where the estimate owes most to the past. It
makes the newest frames of the video once more: at their places, under their words, from other noise, with all that was cached
before them, and nothing of themselves. So a subject that has just come back is asked of the history as it was when it came back.
The next chunk would be the wrong one to ask: what it shows stands in the local window already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from .corrections import Corrections, Trial
from .solve import Correction, Fit

# makes pass `number` of `count`, and returns the x0 [B, C, F, h, w] of its content
Pass = Callable[[int, int], torch.Tensor]
# gives such passes over the newest `frames` frames of the window (0: over the frames that follow it). They change nothing.
Again = Callable[[int], AbstractContextManager[Pass]]


def changes_without(
    corrections: Corrections,
    again: Again,
    fits: Mapping[int, Fit],
    on_device: Callable[[Correction], Correction | None],
) -> dict[int, float]:
    """By layer, the mean square change of x0 without that layer's history, over all items of the batch. `on_device` gives a
    correction as attention applies it, or None for one that does nothing."""
    cache = corrections.cache
    frames = cache.plan.chunk_frames
    if not corrections.parts(cache.layers[0], 0, frames)[1]:
        frames = 0  # what was there before the newest frames is all local, so those that follow are asked
    count, changes = len(fits) + 1, {}
    try:
        with again(frames) as made:
            corrections.trial = Trial()
            whole = made(0, count)
            for number, (layer, one) in enumerate(fits.items(), 1):
                corrections.trial = Trial(layer, on_device(one.correction))
                changes[layer] = float((made(number, count) - whole).square().mean())
    finally:
        corrections.trial = None
    return changes
