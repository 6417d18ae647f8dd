"""The tiny model with what a Wan 2.2 S2V has besides: it hears a sound and is shown a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tiny_model import TinyModel
from torch import nn

from adastate_core.audio.driving import CHUNK, DrivingSound
from adastate_core.audio.track import AudioTrack

EARS, HEARD = 3, 5  # layers of the ear, channels of each


class TinyTalker(TinyModel):
    """Of a sound it takes the mean of the last nine video frames up to the one with which a latent frame begins."""

    def __init__(self, layers: int = 2, seed: int = 0) -> None:
        super().__init__(layers=layers, seed=seed)
        width = self.geometry.heads * self.geometry.head_dim
        self.ear = nn.Linear(HEARD, width)
        self.packed = nn.ModuleList(nn.Conv3d(4, width, (t, s, s), (t, s, s)) for t, s in ((1, 2), (2, 4), (4, 8)))
        for parameter in (*self.ear.parameters(), *self.packed.parameters()):
            parameter.requires_grad_(False).mul_(2.0)
        self.heard: torch.Tensor | None = None
        self.shown = 0

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        found = sound.of(torch.full((EARS,), 1 / EARS), first, frames, HEARD)
        padded = F.pad(found.features.T[None], (8, 0), mode="replicate")[0]
        of_each = padded.unfold(1, 9, 4).mean(-1).T[found.dropped :]
        self.heard = self.ear(torch.cat([of_each[:1].expand(states, -1), of_each]).to(self.device))

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: object) -> None:
        self.shown += 1
        parts = (motion[:, :, 18:], motion[:, :, 16:18], motion[:, :, :16])
        before = [pack(part).flatten(2).transpose(1, 2) for pack, part in zip(self.packed, parts, strict=True)]
        self.through(torch.cat([self.tokens(picture) + 0.5, *before], 1), 0.0, making)

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: object) -> torch.Tensor:
        """As TinyModel where it has heard nothing."""
        if self.heard is not None:
            self._told = self.heard.repeat_interleave((x.shape[-1] // 2) * (x.shape[-2] // 2), 0)
        try:
            return super().velocity(x, timestep, attention)
        finally:
            self._told = None

    _told: torch.Tensor | None = None

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        embedded = super().tokens(x)
        return embedded if self._told is None else embedded + self._told


def track_of(seconds: float = 1.3, seed: int = 5) -> AudioTrack:
    """Features that change from one to the next, and no sound."""
    drawn = torch.randn(EARS, 1, round(50 * seconds), HEARD, generator=torch.Generator().manual_seed(seed))
    return AudioTrack(None, tuple(drawn.unbind(0)))


def sound_of(seconds: float = 1.3, alignment: str = CHUNK) -> DrivingSound:
    return DrivingSound(track_of(seconds), 25.0, alignment)


def picture_of(batch: int = 1, seed: int = 6) -> torch.Tensor:
    """The latent of a reference, 8x8."""
    return torch.randn(batch, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
