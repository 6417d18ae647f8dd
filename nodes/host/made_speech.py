"""A random Wan 2.2 S2V, to try a card with, what it is driven by, and its plain twin on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model
import comfy.ops
import torch

from ...adastate_core.attention.cached import CachedAttention
from ...adastate_core.attention.wan import SESSION, TEXT_KEY
from ...adastate_core.audio.driving import DrivingSound
from ...adastate_core.audio.track import AudioTrack
from ...adastate_core.cache.reference_tokens import MakingReference
from ...adastate_core.schedules.schedule import timesteps
from .made_models import PlainWan, Shape
from .speech_model import Pair, encoded_sound, pass_over_reference, speech_forward

SIDE = 64  # pixels: the tokens of the frames before a video need as many
EAR_LAYERS, EAR_WIDTH, A_SECOND = 25, 1024, 50


@dataclass(frozen=True)
class TalkingShape(Shape):
    """A Wan S2V transformer. It has an injector of sound for every place that the host looks for one."""

    def module(self, device: str, dtype: torch.dtype) -> Any:
        return comfy.ldm.wan.model.WanModel_S2V(
            dim=self.width, ffn_dim=self.feed_forward, num_heads=self.width // 128, num_layers=self.layers,
            in_dim=self.space.channels, out_dim=self.space.channels,
            operations=comfy.ops.disable_weight_init, device=device, dtype=dtype,
        )  # fmt: skip


TALKING = TalkingShape(128, 64, 2)


def made_track(seconds: float, seed: int = 0) -> AudioTrack:
    """What an ear would give of so many seconds of a voice: features that change from one to the next, and slowly, too."""
    length, generator = int(A_SECOND * seconds), torch.Generator().manual_seed(seed)
    quick = torch.randn(EAR_LAYERS, length, EAR_WIDTH, generator=generator)
    slow = torch.randn(EAR_LAYERS, length // 10 + 1, EAR_WIDTH, generator=generator).repeat_interleave(10, 1)[
        :, :length
    ]
    return AudioTrack(None, tuple((0.7 * (quick + slow)).unsqueeze(1).unbind(0)))


def made_reference(seed: int = 0) -> dict[str, torch.Tensor]:
    """Somebody's picture as a LATENT."""
    return {"samples": torch.randn(1, 16, 1, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(seed))}


class PlainTalker(PlainWan):
    """PlainWan of a TalkingShape: it hears and is shown a reference, too."""

    def __init__(self, shape: TalkingShape, weights: dict[str, torch.Tensor], context: torch.Tensor) -> None:
        super().__init__(shape, weights, context)
        self._encoded: Pair | None = None
        self.module.casual_audio_encoder.forward = lambda _: self._encoded

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        """The sound of the latent frames `first` .. `first + frames` for the passes that follow."""
        self._encoded = encoded_sound(self.module, sound, first, frames, states, self.device, torch.float32)

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: MakingReference) -> None:
        """One pass over a picture [1, C, 1, h, w] and the frames before the video [1, C, 19, h, w]."""
        mask = self.module.trainable_cond_mask.weight.detach()
        pass_over_reference(self.module, picture, motion, mask, self._context, self._own(making))

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        times = timesteps(timestep, x)
        return speech_forward(self.module, x, times, self._context, self._encoded is not None, self._own(attention))

    def _own(self, session: Any) -> dict[str, Any]:
        return {SESSION: session, TEXT_KEY: id(self._context)}
