"""How the chunks of a talking clip see their past and the condition: in one forward over the whole clip, and chunk by chunk.

The condition is the reference picture and the motion before the clip. Its tokens see each other alone; all chunks see them, at
positions of their own: those of Wan 2.2 S2V (LiveAvatar), with the reference at time 30.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adastate_core.rope import Rope, Turn

from .talking_model import Sound, condition_tokens, projected, through_blocks, tokens_of, velocity_of
from .teacher_forcing import ClipAttention, ClipText, attended
from .world import CHUNK_LATENTS

REFERENCE_TIME = 30.0
# of the tokens of one still frame, of the two before it at half size, and of the sixteen before at a quarter
_NEAR, _FARTHER, _FAR = -1.0, -3.0, (-19.0, -14.0, -9.0, -4.0)

Pair = tuple[torch.Tensor, torch.Tensor]


def condition_turn(rope: Rope, shift: float) -> Turn:
    """The rotation of the condition's tokens, with everything `shift` frames later."""
    frame = torch.arange(rope.rows * rope.columns)
    times = [REFERENCE_TIME, _NEAR, _FARTHER, *_FAR]
    which, tokens = [torch.full_like(frame, 0), torch.full_like(frame, 1)], [frame, frame]
    for number, factor in enumerate((2, 4, 4, 4, 4), start=2):
        # the places of a coarser grid's tokens: from the first to the last of the fine one, cut to whole numbers
        rows, columns = (torch.linspace(0, n - 1, n // factor).long() for n in (rope.rows, rope.columns))
        place = (rows[:, None] * rope.columns + columns).flatten()
        which.append(torch.full_like(place, number))
        tokens.append(place)
    return rope.turn_tokens([time + shift for time in times], torch.cat(which), torch.cat(tokens))


@dataclass
class TalkingClip(ClipAttention):
    """ClipAttention over [condition | clean | noisy], the condition being `condition` tokens (0: none is given)."""

    condition: int = 0

    def chunks_of(self, tokens: int) -> torch.Tensor:
        """The condition is told the first chunk's words."""
        return torch.cat([torch.zeros(self.condition, dtype=torch.long), super().chunks_of(tokens - self.condition)])

    def shift(self, chunk: int) -> int:
        """How much later chunk `chunk` stands here than in a rollout with `packed` positions."""
        first = chunk * self.chunk_frames
        return first - min(first, self.window_frames)

    def self_attention(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, raw, v = projected(module, x, x)
        n = self.condition
        if not n:
            return module.o(self.attend(q, raw, v))
        turn = condition_turn(self.rope, 0)
        own = attended(self.rope.rotate(q[:, :n], turn), self.rope.rotate(raw[:, :n], turn), v[:, :n])

        def beside(chunk: int) -> Pair:
            return self.rope.rotate(raw[:, :n], condition_turn(self.rope, self.shift(chunk))), v[:, :n]

        return module.o(torch.cat([own, self.attend(q[:, n:], raw[:, n:], v[:, n:], beside)], 1))


def clip_velocity(
    model: nn.Module,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    context: torch.Tensor,
    clip: TalkingClip,
    sound: Sound,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    """v of the noisy clip [B, 16, T, h, w] at `sigma` [B, T] against the clean one; `condition` [B, 2.5 P, D] or none."""
    n, half = clip.condition, clip.tokens // 2
    x = torch.cat([tokens_of(model, clean), tokens_of(model, noisy)], 1)
    times = torch.cat([torch.zeros_like(sigma), 1000 * sigma], 1).repeat_interleave(2, 1)
    if condition is not None:
        x, times = torch.cat([condition, x], 1), F.pad(times, (n // half, 0))
    x, e = through_blocks(model, x, times, context, clip, sound.twice(), n)
    count = clean.shape[2]
    return velocity_of(model, x[:, -count * clip.tokens :], e[:, -2 * count :], noisy.shape)


@dataclass
class TalkingRollout(ClipText):
    """The cache of a rollout: the condition's keys and values, those of at most `window_frames` past frames, and a pass's own.

    `condition` and `past` hold keys that are not rotated, by attention module.
    """

    window_frames: int
    copies: ClassVar[int] = 1
    condition: dict[nn.Module, Pair] = field(default_factory=dict)
    past: dict[nn.Module, Pair] = field(default_factory=dict)
    staged: dict[nn.Module, Pair] = field(default_factory=dict)
    _conditions: bool = False

    @staticmethod
    def begin(
        model: nn.Module, rope: Rope, window_frames: int, context: torch.Tensor, condition: torch.Tensor | None
    ) -> TalkingRollout:
        """An empty cache; `condition` [B, 2.5 P, D] is run through the model with the first chunk's words."""
        made = TalkingRollout(rope, rope.rows * rope.columns, CHUNK_LATENTS, CHUNK_LATENTS, None, window_frames)
        if condition is not None:
            made._conditions = True
            through_blocks(model, condition, condition.new_zeros(len(condition), 5), context, made)
            made._conditions, made.condition = False, made.staged
            made.staged = {}
        return made

    def self_attention(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, raw, v = projected(module, x, x)
        self.staged[module] = raw, v
        if self._conditions:
            turn = condition_turn(self.rope, 0)
            return module.o(attended(self.rope.rotate(q, turn), self.rope.rotate(raw, turn), v))
        frames = x.shape[1] // self.tokens
        keys, values, first = [], [], 0
        if module in self.past:
            keys, values = ([t] for t in self.past[module])
            first = keys[0].shape[1] // self.tokens
        keys = [self.rope.rotate(torch.cat([*keys, raw], 1), self.rope.turn(None, range(first + frames)))]
        values.append(v)
        if module in self.condition:
            key, value = self.condition[module]
            keys.append(self.rope.rotate(key, condition_turn(self.rope, 0)))
            values.append(value)
        q = self.rope.rotate(q, self.rope.turn(None, range(first, first + frames)))
        return module.o(attended(q, torch.cat(keys, 1), torch.cat(values, 1)))

    def commit(self) -> None:
        """The last pass was a clean one: its frames are the newest of the past."""
        kept = self.window_frames * self.tokens
        for module, pair in self.staged.items():
            if module in self.past:
                pair = [torch.cat(both, 1) for both in zip(self.past[module], pair, strict=True)]
            self.past[module] = tuple(t[:, -kept:] for t in pair)
        self.staged = {}

    def velocity(
        self, model: nn.Module, x: torch.Tensor, sigma: float, context: torch.Tensor, sound: Sound
    ) -> torch.Tensor:
        """v of a chunk [B, 16, n, h, w] at `sigma`; `sound` is that of its frames, `context` [B, n, 4096] its words."""
        times = x.new_full((len(x), x.shape[2]), 1000 * sigma)
        tokens, e = through_blocks(model, tokens_of(model, x), times, context, self, sound)
        return velocity_of(model, tokens, e, x.shape)


def conditioned(model: nn.Module, stills: torch.Tensor) -> torch.Tensor:
    """A picture's two latents [B, 2, 16, h, w] (talking_latents.still_latents) as the condition's tokens: the one of a first
    frame is the reference, the other the motion."""
    return condition_tokens(model, *(stills[:, i, :, None].float() for i in range(2)))
