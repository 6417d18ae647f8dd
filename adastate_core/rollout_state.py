"""The state of a rollout on wires: an immutable value, between two chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .cache.slots import LayerSnapshot
from .geometry import space_of
from .given import BEFORE


@dataclass(frozen=True, repr=False)
class RolloutState:
    """A rollout between two chunks: an immutable value. Tensors are on the CPU and must not be written to.

    `next_frame` is the index of the next chunk's first frame, `next_chunk` counts generated chunks, `emitted` the latents that
    have left; `pending` [B, C, n, h, w] are made but not yet emitted. `hidden` are the anchor's state latents [B, C, S, h, w].
    `latents` are all emitted ones, if kept. `recent` are the newest committed ones, `noisy` the chunks that are still being
    denoised (Rolling Forcing), oldest first, `given` the start latents that are still to be committed, `start` where these stand,
    one of given.STARTS, and `again` how many of the newest latents have to be committed again before the next chunk, because a
    recache or restart was cut and the window is empty, or because it is made anew before every chunk. `first` is the video's first
    latent [B, C, 1, h, w], where the past may begin with it (RolloutSpec.remade) or it comes to stand for the reference;
    `reference` the latent [B, C, 1, h, w] of the picture that the video shows (reference.py). `cache` holds the layers of the
    cache, or of one cache after the other where noise levels have their own. `after` latents more left in a window that shrank at
    the end of the video (Rolling Forcing), and are made again by whoever goes on. `stream` belongs to whoever decodes: JSON-able
    values and tensors; so is `absorption`, where the absorption stands. `compiled_layers` are the layers that went through
    compiled functions when it was taken (attention/block.py): their last bits are others than those of plain ones. `steered`
    remembers, as JSON-able values, what was changed by hand while it was made (states/steered_check.py). `shots` are the first
    frames of all shots that began (shots.py).
    """

    spec: dict[str, Any]
    next_frame: int
    next_chunk: int
    emitted: int
    cache: tuple[LayerSnapshot, ...]
    pending: torch.Tensor
    hidden: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    recent: torch.Tensor | None = None
    noisy: torch.Tensor | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    absorption: dict[str, Any] = field(default_factory=dict)
    given: torch.Tensor | None = None
    again: int = 0
    first: torch.Tensor | None = None
    after: int = 0
    compiled_layers: tuple[int, ...] = ()
    steered: dict[str, Any] = field(default_factory=dict)
    shots: tuple[int, ...] = ()
    start: str = BEFORE
    reference: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = [
            self.pending,
            self.hidden,
            self.latents,
            self.recent,
            self.noisy,
            self.given,
            self.first,
            self.reference,
        ]
        tensors += [*self.stream.values(), *self.absorption.values()]
        return sum(layer.nbytes for layer in self.cache) + sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))

    def __repr__(self) -> str:
        frames = space_of(self.spec).pictures(self.emitted)
        ended = f"; {self.after} latents more, in a window that shrank, are made again" if self.after else ""
        return f"RolloutState({self.emitted} latents = {frames} frames, {self.nbytes / 2**20:.1f} MiB{ended})"
