"""How far a rollout is: what moves at once when a chunk becomes past."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .given import BEFORE
from .schedules import rolling


@dataclass(frozen=True, eq=False)
class Standing:
    """How far a rollout is. It is replaced as a whole. `before` is the frame with which the last generated chunk began; the other
    fields mean what they mean in RolloutState; `first` and `reference` hold no frame where there is none."""

    next_frame: int
    next_chunk: int
    before: int
    emitted: int
    pending: torch.Tensor
    recent: torch.Tensor
    given: torch.Tensor
    first: torch.Tensor
    reference: torch.Tensor
    hidden: torch.Tensor | None = None
    blocks: tuple[rolling.Block, ...] = ()
    again: int = 0
    shots: tuple[int, ...] = ()
    start: str = BEFORE

    @property
    def to_take(self) -> int:
        """Given frames that clean passes of their own are to cache before the next chunk is made."""
        return self.given.shape[2] if self.start == BEFORE else 0
