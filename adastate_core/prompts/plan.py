"""Which prompt, seed and strength a chunk is made under, and what has to happen to the cache where the prompt changes.

Everything is a function of the chunk's first latent frame, so a rollout that goes on from a state changes where the
uninterrupted one would. A chunk has the prompt and the numbers that hold at its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .values import TRANSITIONS, blended


@dataclass(frozen=True, eq=False)
class PromptChange:
    """From latent frame `frame` on the text embeddings are `context` [1 or B, n, c].

    `transition`: "cut" changes the text alone; "recache" makes the window's keys and values again under the new text (LongLive;
    RolloutSpec says whether in one pass); "flush" forgets the window but for its newest two frames (Infinity-RoPE); "rope cut"
    puts the first chunk far ahead in time (Infinity-RoPE); "soft" moves the embeddings over in `chunks` chunks, by `blend`; "shot"
    begins a new scene (LongLive 2.0): all that follows stands further on in time, and its first chunk, which has the embeddings
    `opening` [1 or B, n, c] where there are any, stays in the cache until the next one.
    """

    frame: int
    context: torch.Tensor
    transition: str = "recache"
    chunks: int = 3
    blend: str = "linear"
    opening: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.transition not in TRANSITIONS:
            raise ValueError(f"transition is {self.transition!r}; it must be one of {', '.join(TRANSITIONS)}")


@dataclass(frozen=True)
class NumberChange:
    """From latent frame `frame` on noise has `seed`, and the adaptive anchor `strength`; None leaves one as it was."""

    frame: int
    seed: int | None = None
    strength: float | None = None


class PromptPlan:
    """The changes of one rollout, the first of the prompt's at frame 0, and those of its numbers."""

    def __init__(
        self, changes: Sequence[PromptChange], chunk_frames: int, numbers: Sequence[NumberChange] = ()
    ) -> None:
        """ValueError unless both begin one after the other."""
        if not changes or changes[0].frame != 0:
            raise ValueError("a prompt plan begins with the prompt of frame 0")
        for one in (changes, numbers):
            if any(a.frame >= b.frame for a, b in zip(one, one[1:], strict=False)):
                raise ValueError("the changes of a prompt plan must come one after the other")
        self.changes, self.chunk_frames, self.numbers = tuple(changes), chunk_frames, tuple(numbers)
        self._mixed: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def recaches(self) -> bool:
        """Whether any change is a recache."""
        return any(change.transition == "recache" for change in self.changes[1:])

    @property
    def shots(self) -> bool:
        """Whether any change begins a shot."""
        return any(change.transition == "shot" for change in self.changes[1:])

    def index(self, first_frame: int) -> int:
        """Which prompt holds at the middle of the chunk from `first_frame` on."""
        middle = first_frame + self.chunk_frames / 2
        return max(i for i, change in enumerate(self.changes) if change.frame < middle or i == 0)

    def seed(self, first_frame: int, otherwise: int) -> int:
        """The seed of the chunk from `first_frame` on, `otherwise` where none was set until then."""
        return self._number("seed", first_frame, otherwise)

    def strength(self, first_frame: int, otherwise: float) -> float:
        """The adaptive anchor's strength when that chunk is cached."""
        return self._number("strength", first_frame, otherwise)

    def _number(self, name: str, first_frame: int, otherwise: Any) -> Any:
        middle = first_frame + self.chunk_frames / 2
        held = [getattr(change, name) for change in self.numbers if change.frame < middle or change.frame == 0]
        return next((value for value in reversed(held) if value is not None), otherwise)

    def context(self, first_frame: int) -> torch.Tensor:
        """The embeddings of a chunk; the same tensor object as long as nothing changes."""
        index = self.index(first_frame)
        change = self.changes[index]
        since = int((first_frame + self.chunk_frames / 2 - change.frame) // self.chunk_frames)
        if change.opening is not None and self.index(first_frame - self.chunk_frames) != index:
            return change.opening
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
