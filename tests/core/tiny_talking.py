"""TinyModel, and what it takes to be driven by sound and to be shown a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_model import TinyModel
from torch import nn

from adastate_core.audio.driving import DrivingSound
from adastate_core.audio.track import AudioTrack

# what its ear gives: hidden states, and how wide they are
EAR_LAYERS, SOUND = 3, 6


class TinyTalking(TinyModel):
    """An output of its encoder reads nine pictures, as that of Wan 2.2 S2V: 4j - 8 .. 4j. Sound comes in behind the first block."""

    def __init__(self, **numbers) -> None:
        super().__init__(**numbers)
        width, channels = self.embed.out_channels, self.geometry.channels
        self.ear = nn.Parameter(torch.randn(EAR_LAYERS))
        self.listen = nn.Conv1d(SOUND, width, 9, stride=4)
        self.packed = nn.ModuleList(
            nn.Conv3d(channels, width, size, size) for size in ((1, 2, 2), (2, 4, 4), (4, 8, 8))
        )
        self.kinds = nn.Parameter(torch.randn(2, width))
        self.encoded = 0
        self._heard: tuple[object, torch.Tensor] | None = None
        for part in (self.listen, self.packed):
            for parameter in part.parameters():
                parameter.requires_grad_(False).mul_(2.0)
        self.ear.requires_grad_(False)
        self.kinds.requires_grad_(False)

    def forget(self) -> None:
        """Read no text, and hear anew what comes next."""
        self.context = self._heard = None

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        """Latent frames `first` .. `first + frames`, behind `states` ones that hear what the first of them hears."""
        key = (sound, first, frames, states)
        if self._heard is not None and self._heard[0] == key:
            return
        weights = F.silu(self.ear)
        heard = sound.of((weights / weights.sum()).cpu(), first, frames, SOUND)
        x = F.pad(heard.features.T[None].to(self.device), (8, 0), mode="replicate")
        out = self.listen(x)[0].T[heard.dropped :]
        assert len(out) == frames
        self.encoded += 1
        self._heard = key, torch.cat([out[:1].expand(states, -1), out])

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: object) -> None:
        far, near, last = motion.split([16, 2, 1], 2)
        parts = [self.embed(picture).flatten(2) + self.kinds[0][:, None]]
        parts += [
            conv(x).flatten(2) + self.kinds[1][:, None] for conv, x in zip(self.packed, (last, near, far), strict=True)
        ]
        heard, self._heard = self._heard, None
        try:
            self._through(torch.cat(parts, 2).transpose(1, 2), 0.0, making, 0)
        finally:
            self._heard = heard

    def _driven(self, i: int, y: torch.Tensor, frames: int) -> torch.Tensor:
        if i or self._heard is None:
            return y
        return y + self._heard[1].repeat_interleave(y.shape[1] // frames, 0)


def spoken(
    seconds: float = 4.0, seed: int = 0, fps: float = 16.0, alignment: str = "host", offset: float = 0.0
) -> DrivingSound:
    """A sound of no waveform, of which an ear has made something."""
    length = int(50 * seconds)
    layers = torch.randn(EAR_LAYERS, 1, length, SOUND, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return DrivingSound(AudioTrack(None, layers, offset=offset), fps, alignment)
