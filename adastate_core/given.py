"""Latents that a video begins with, and where they stand: before its first generated chunk, or inside it.

"before": clean passes of their own cache them, and the first chunk is what follows. "inside" (LongLive 2.0's pictures into video):
they are the first frames of the first chunk, which generates the rest of itself. Before every noisy pass and after every step of
the solver these frames are overwritten with the given ones, and the model is told timestep 0 for them. A solver is given what the
pass saw and the velocity of all frames, and what it remembers is left as it is: it works on each value alone, so no other frame has
any of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .geometry import ModelGeometry

STARTS = BEFORE, INSIDE = ("before", "inside")


class RolloutNumbers(Protocol):
    """What of a rollout says whether latents can stand inside its first chunk (RolloutSpec)."""

    geometry: ModelGeometry
    chunk_frames: int
    blocks: int
    remade: str


def check_inside(spec: RolloutNumbers, frames: int) -> None:
    """ValueError, in a sentence, if so many given latent frames cannot stand inside the first chunk."""
    instead = "choose the start mode before the first chunk"
    if spec.blocks > 1:
        raise ValueError(
            f"start latents inside the first chunk do not go with {spec.blocks} chunks denoised together; {instead}"
        )
    if spec.remade:
        raise ValueError(
            "start latents inside the first chunk do not go with a past that is made anew before every chunk; "
            + instead
        )
    if 0 < frames < spec.chunk_frames:
        return
    pictures, most = spec.geometry.space.pictures, spec.chunk_frames - 1
    fit = (
        f"at most {pictures(most)} pictures ({most} latent frames) fit inside: give fewer, or {instead}"
        if most
        else f"none fits inside: {instead}"
    )
    raise ValueError(
        f"the start latents are {pictures(frames)} pictures ({frames} latent frames) and the first chunk has {spec.chunk_frames} "
        f"latent frames, so {fit}"
    )


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
