"""A rollout with shots, frame by frame: lists of what is held, each with the time that it was given when it was made.

Shares nothing with adastate_core but the model under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from slow_rollout import SlowAttention, gaussian

OFFSET, CUT, FLUSHED = 8, 45, 2


@dataclass
class Held:
    """A frame: its time, and raw keys and values [B, P, width] of each layer."""

    frame: int
    time: int
    kv: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class SlowShots:
    """`changes` {first frame of a chunk: what happens before it}: "shot", "recache", "one pass", "flush", "rope cut"."""

    model: object
    F: int
    W: int
    seed: int
    sigmas: tuple[float, ...]
    mode: str
    changes: dict[int, str]
    anchor: str = "none"
    A: int = 0
    S: int = 0
    decay: float = 0.9
    rates: tuple[float, float] = (0.01, 0.1)
    replayed: int = 0
    hold: Callable = lambda x: x
    size: tuple[int, int, int] = (1, 4, 6)
    slots: list[Held] = field(default_factory=list)
    window: list[Held] = field(default_factory=list)
    first: list[Held] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    time: dict[int, int] = field(default_factory=dict)
    moved: int = 0

    def __post_init__(self) -> None:
        _, h, w = self.size
        self.attention = SlowAttention(self.model.geometry.heads, h // 2, w // 2)
        self.tokens, self.hidden, self.out, self.begun = h * w // 4, None, [], []

    def places(self, f: int, n: int, jump: bool = False) -> None:
        """Where all that is read stands before a pass over frames f .. f + n - 1."""
        behind = {"fixed": self.A + self.W, "packed": max(len(self.slots), self.S) + len(self.window)}
        end = self.time[f] if self.mode == "absolute" else behind[self.mode]
        new = [self.time[f + i] if self.mode == "absolute" else end + i for i in range(n)]
        if jump:
            ahead = max(CUT - new[0], CUT - self.F)
            new = [one + ahead for one in new]
        if self.mode == "absolute":
            old = [one.time for one in self.slots + self.window]
        else:
            old = [*range(len(self.slots)), *range(end - len(self.window), end)]
        self.attention.past_positions = [float(p) for p in old]
        self.attention.positions = [float(p) for p in [*range(self.S), *new]]
        for layer in range(self.model.geometry.layers):
            self.attention.past[layer] = [one.kv[layer] for one in self.slots + self.window]

    def made(self, i: int, frame: int, hold: Callable) -> Held:
        part = slice(i * self.tokens, (i + 1) * self.tokens)
        seen = (self.attention.seen[layer] for layer in range(self.model.geometry.layers))
        return Held(frame, self.time.get(frame, 0), [tuple(hold(x[:, part].clone()) for x in kv) for kv in seen])

    def cache(self, f: int, n: int, again: bool = False) -> None:
        """What the last pass made of frames f .. f + n - 1 enters; the oldest that are not pinned leave."""
        left, sink = [], self.A if self.anchor in ("static", "ema", "memory") else 0
        begun = [shot for shot in self.begun if shot < f + n]
        self.pinned = [*range(begun[-1], begun[-1] + self.F)] if begun else []
        for i in range(n):
            if f + i < sink and not again:
                self.slots.append(self.made(self.S + i, f + i, self.hold if self.anchor == "static" else lambda x: x))
                continue
            self.window.append(self.made(self.S + i, f + i, self.hold))
            if f + i < self.replayed and not again:
                self.first.append(self.window[-1])
            while len(self.window) > self.W:
                left.append(next(one for one in self.window if one.frame not in self.pinned))
                self.window.remove(left[-1])
        if left and not again and self.anchor in ("ema", "memory"):
            self.blend(left)
        if self.S:
            self.slots = [self.made(i, i, self.hold) for i in range(self.S)]
        if self.replayed and f >= max(self.replayed, self.W) and not again:
            self.replay(f)

    def blend(self, left: list[Held]) -> None:
        def mixed(a, b, share):
            return [
                tuple((1 - share) * x + share * y for x, y in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True)
            ]

        if self.anchor == "ema":
            for one in left:
                slot = self.slots[one.frame % self.A]
                slot.kv = mixed(slot.kv, one.kv, 1 - self.decay)
            return
        mean = [
            tuple(torch.stack([one.kv[layer][i] for one in left]).mean((0, 2))[:, None].expand(-1, self.tokens, -1) for i in (0, 1))
            for layer in range(self.model.geometry.layers)
        ]  # fmt: skip
        for slot, rate in zip(self.slots[-2:], self.rates, strict=True):
            slot.kv = mixed(slot.kv, mean, rate) if self.moved else list(mean)
        self.moved += 1

    def replay(self, f: int) -> None:
        """Backwards through the kept blocks but the last, then forwards, over the chunk before the newest one."""
        blocks = max(1, self.replayed // self.F - 1)
        sweep, place = divmod((f - max(self.replayed, self.W)) // self.F, blocks)
        number = place if sweep % 2 else blocks - 1 - place
        order = [*range(number * self.F, (number + 1) * self.F)]
        for frame, source in zip(range(f - self.F, f), order if sweep % 2 else order[::-1], strict=True):
            for one in self.window:
                if one.frame == frame and frame not in self.pinned:
                    one.kv = self.first[source].kv

    def latents(self) -> torch.Tensor:
        return torch.cat(self.out, 2)

    def remake(self, f: int, at_once: bool) -> None:
        """Cache the newest latents again: in one pass, or in passes of F beside an anchor that stays."""
        if at_once:
            start = 0 if f <= self.A + self.W + self.F else f - self.W - self.F
            self.window, self.slots = [], self.slots if start else []
            self.places(start, f - start)
            self.model.velocity(self.latents()[:, :, start:f], 0.0, self.attention)
            self.cache(start, f - start, again=bool(start))
            return
        start = max(0, f - self.A - self.W - self.F)
        start = max(start, self.A if self.anchor != "none" and start < self.A else 0)
        self.window, again = [], self.anchor != "adaptive"
        for low in range(start, f, self.F):
            part = self.latents()[:, :, low : min(low + self.F, f)]
            self.places(low, part.shape[2])
            x = torch.cat([self.hidden, part], 2) if self.S else part
            self.model.velocity(x, 0.0, self.attention)
            self.cache(low, part.shape[2], again)

    def roll(self, length: int, given: torch.Tensor | None = None) -> torch.Tensor:
        batch, h, w = self.size
        f = 0
        for part in () if given is None else given.split(self.F, 2):
            self.time |= {f + i: f + i for i in range(part.shape[2])}
            self.places(f, part.shape[2])
            self.model.velocity(torch.cat([part[:, :, -1:]] * self.S + [part], 2), 0.0, self.attention)
            self.cache(f, part.shape[2])
            self.out.append(part)
            f += part.shape[2]
        chunk = 0
        while f < length:
            change = self.changes.get(f, "")
            if change in ("recache", "one pass"):
                self.remake(f, change == "one pass")
            elif change == "flush":
                self.window = self.window[-FLUSHED:]
            elif change == "shot":
                self.begun.append(f)
            self.time |= {f + i: f + i + OFFSET * len(self.begun) for i in range(self.F)}
            self.places(f, self.F, jump=change == "rope cut")

            def draw(step: int, chunk: int = chunk) -> torch.Tensor:
                shape = (batch, self.model.geometry.channels)
                content = gaussian(self.seed, chunk, step, (*shape, self.F, h, w))
                if not self.S:
                    return content
                return torch.cat([gaussian(self.seed, chunk, step, (*shape, self.S, h, w), "/state"), content], 2)

            x = draw(0)
            for j, sigma in enumerate(self.sigmas):
                x0 = x - sigma * self.model.velocity(x, 1000 * sigma, self.attention)
                if j + 1 < len(self.sigmas):
                    x = (1 - self.sigmas[j + 1]) * x0 + self.sigmas[j + 1] * draw(j + 1)
            if change == "rope cut":  # the clean pass stands where the noisy ones did
                self.places(f, self.F, jump=True)
            self.model.velocity(x0, 0.0, self.attention)
            self.cache(f, self.F)
            self.hidden = x0[:, :, : self.S]
            self.out.append(x0[:, :, self.S :])
            f, chunk = f + self.F, chunk + 1
        return self.latents()[:, :, :length]
