"""The slow S2V model (slow_s2v.py) as a rollout of the core takes one: so the core is held to the slow loops without a host.

What a pass computes is the same code on both sides. What it is given, reads and keeps is the core's on one, the loop's on the
other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from slow_s2v import SlowS2V

from adastate_core.attention.cached import plain_attention
from adastate_core.geometry import ModelGeometry


class TalkingS2V:
    """A TalkingModel (adastate_core/passes.py); what goes through the core is float32."""

    def __init__(self, slow: SlowS2V, context: torch.Tensor) -> None:
        self.slow, self.context = slow, context
        self.geometry = ModelGeometry(16, slow.layers, slow.heads, 128)
        self.device, self.kernel = torch.device("cpu"), plain_attention
        self.sound = None
        weights = F.silu(slow.w["casual_audio_encoder.weights"].flatten())
        self.weights = weights / weights.sum()

    def set_context(self, context: torch.Tensor) -> None:
        self.context = context

    def hear(self, sound, first: int, frames: int, states: int) -> None:
        heard = sound.of(self.weights, first, frames, 1024)
        extra = -len(heard.features) % 4  # the encoder's outputs are of every fourth one, from the first on
        features = torch.cat([heard.features, heard.features[-1:].expand(extra, -1)])
        tokens, whole = (x[heard.dropped :][:frames] for x in self.slow.hears(features))
        places = [0] * states + list(range(frames))
        self.sound = tokens[places], whole[places]

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making) -> None:
        self.slow.prefill(picture, motion, self.context, _attending(making))

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention) -> torch.Tensor:
        return self.slow.velocity(x, timestep, self.context, _attending(attention), self.sound).float()


def _attending(attention):
    """The core's attention, in float32, as the slow model asks for it."""
    return lambda layer, *qkv: attention.attend(layer, *(t.float() for t in qkv)).double()
