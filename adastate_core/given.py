"""Latents that a video begins with, and where they stand: before its first generated chunk, or inside it.

"before": clean passes of their own cache them, and the first chunk is what follows. "inside" (LongLive 2.0's pictures into video):
they are the first frames of the first chunk, which generates the rest of itself. Before every noisy pass and after every step of
the solver these frames are overwritten with the given ones, and the model is told timestep 0 for them. A solver is given what the
pass saw and the velocity of all frames, and what it remembers is left as it is: it works on each value alone, so no other frame has
any of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STARTS = BEFORE, INSIDE = ("before", "inside")


@dataclass(frozen=True)
class Held:
    """Frames of a chunk [state | content] that stay as they are: `latents` [B, C, n, h, w] float32, the first of its content behind
    `states` state frames. n may be 0."""

    latents: torch.Tensor
    states: int

    def put_into(self, x: torch.Tensor) -> torch.Tensor:
        """A chunk [B, C, S + F, h, w] with these frames in their place; `x` itself is never written to."""
        if not self.latents.shape[2]:
            return x
        out = x.clone()
        out[:, :, self.states : self.states + self.latents.shape[2]] = self.latents
        return out

    def timesteps(self, timestep: float, frames: int) -> float | tuple[float, ...]:
        """What the model is told of a pass over so many frames: `timestep`, and 0 for these."""
        held = self.latents.shape[2]
        if not held:
            return timestep
        return (*[timestep] * self.states, *[0.0] * held, *[timestep] * (frames - self.states - held))
