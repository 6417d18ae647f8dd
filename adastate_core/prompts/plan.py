"""Which prompt a chunk is made under, and what has to happen to the cache where it changes.

Everything is a function of the chunk's first latent frame, so a rollout that goes on from a state changes where the
uninterrupted one would. A chunk has the prompt that holds at its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .values import TRANSITIONS, blended


@dataclass(frozen=True, eq=False)
class PromptChange:
    """From latent frame `frame` on the text embeddings are `context` [1 or B, n, c].

    `transition`: "cut" changes the text alone; "recache" makes the window's keys and values again under the new text
    (LongLive); "flush" forgets the window but for its newest two frames (Infinity-RoPE); "rope cut" puts the first chunk
    far ahead in time (Infinity-RoPE); "soft" moves the embeddings over in `chunks` chunks, by `blend`.
    """

    frame: int
    context: torch.Tensor
    transition: str = "recache"
    chunks: int = 3
    blend: str = "linear"

    def __post_init__(self) -> None:
        if self.transition not in TRANSITIONS:
            raise ValueError(f"transition is {self.transition!r}; it must be one of {', '.join(TRANSITIONS)}")


class PromptPlan:
    """The changes of one rollout, the first of them at frame 0."""

    def __init__(self, changes: Sequence[PromptChange], chunk_frames: int) -> None:
        if not changes or changes[0].frame != 0:
            raise ValueError("a prompt plan begins with the prompt of frame 0")
        if any(a.frame >= b.frame for a, b in zip(changes, changes[1:], strict=False)):
            raise ValueError("the changes of a prompt plan must come one after the other")
        self.changes, self.chunk_frames = tuple(changes), chunk_frames
        self._mixed: tuple[tuple[int, int], torch.Tensor] | None = None

    def index(self, first_frame: int) -> int:
        """Which prompt holds at the middle of the chunk from `first_frame` on."""
        middle = first_frame + self.chunk_frames / 2
        return max(i for i, change in enumerate(self.changes) if change.frame < middle or i == 0)

    def context(self, first_frame: int) -> torch.Tensor:
        """The embeddings of a chunk; the same tensor object as long as nothing changes."""
        index = self.index(first_frame)
        change = self.changes[index]
        since = int((first_frame + self.chunk_frames / 2 - change.frame) // self.chunk_frames)
        if index == 0 or change.transition != "soft" or since >= change.chunks:
            return change.context
        if self._mixed is None or self._mixed[0] != (index, since):
            share = (since + 1) / (change.chunks + 1)
            mixed = blended(self.changes[index - 1].context, change.context, share, change.blend)
            self._mixed = ((index, since), mixed)
        return self._mixed[1]

    def transition(self, first_frame: int, before: int) -> str:
        """What has to happen before the chunk from `first_frame` on, the last one having begun at `before`; or ""."""
        if first_frame <= 0 or self.index(first_frame) == self.index(before):
            return ""
        return self.changes[self.index(first_frame)].transition
