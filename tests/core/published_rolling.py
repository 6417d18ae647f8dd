"""Rolling Forcing's own inference (arXiv 2509.25161), written from its rules by whole histories, in float64.

Every frame's raw keys and values are kept for good, and every pass names the past frames that it reads, each with the time
at which its key stands. Nothing is ever dropped, shifted or rotated in place, and nothing is shared with adastate_core but
the model under test; the noise is the pack's.

`MISTAKES` are loops that are wrong in one rule, to show that the tests would see it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from slow_rollout import gaussian

Read = list[tuple[int, float]]  # past frames, each with the time at which its key stands


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """What a model makes of plain numbers (timesteps) is float64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class PublishedRolling:
    """N blocks of 3 frames in N + 4 windows. A pass has room for 21 frames."""

    block, room = 3, 21
    levels = tuple(5 * t / (1 + 4 * t) for t in (1.0, 0.8, 0.6, 0.4, 0.2))

    def __init__(self, model, *, seed=7, batch=1, h=4, w=6, hold=None):
        """`hold`: what becomes of a finished frame's key or value [B, P, width] when it is cached."""
        self.hold = hold or (lambda x: x)
        # a model that is no module computes in a dtype of its own
        self.exact = isinstance(model, torch.nn.Module)
        self.model, self.geometry, self.seed = model.double() if self.exact else model, model.geometry, seed
        self.rows, self.columns = h // model.geometry.patch, w // model.geometry.patch
        self.shape = (batch, model.geometry.channels, self.block, h, w)
        # layer -> frame -> raw key and value [B, P, width]
        self.history = [[] for _ in range(model.geometry.layers)]
        self.read, self.first, self.keep = [], 0, False

    # --- the rules

    def noisy_reads(self, f: int, n: int) -> Read:
        """A window of n frames whose oldest begins at f: the first block, put in front of the newest frames that have room."""
        if f == 0:
            return []
        count = min(f - self.block, self.room - self.block - n)
        return self.moved(f - count) + self.own(f - count, f)

    def clean_reads(self, f: int) -> Read:
        """The newest past frames at their own times, the first block among them like any other."""
        return self.own(max(0, f - (self.room - self.block)), f)

    def own(self, first: int, end: int) -> Read:
        return [(frame, frame) for frame in range(first, end)]

    def moved(self, end: int) -> Read:
        """The first block, as if it ended just before `end`."""
        return [(i, end - self.block + i) for i in range(self.block)]

    # --- attention

    def attend(self, layer, q, k, v):
        n, tokens = q.shape[1] // (self.rows * self.columns), self.rows * self.columns
        times = [time for _, time in self.read] + [self.first + i for i in range(n)]
        past = [self.history[layer][frame] for frame, _ in self.read]
        keys = self.heads(torch.cat([key for key, _ in past] + [k], 1))
        values = self.heads(torch.cat([value for _, value in past] + [v], 1))
        turned = self.turned(keys, times)
        queries = self.turned(self.heads(q), times[-n:])
        if self.keep:
            held = ([self.hold(x) for x in whole.split(tokens, 1)] for whole in (k, v))
            self.history[layer] += zip(*held, strict=True)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, turned) / math.sqrt(self.geometry.head_dim)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2).to(q.dtype)

    def heads(self, x):
        return x.double().unflatten(-1, (self.geometry.heads, -1))

    def turned(self, x, times):
        """x [B, frames * P, heads, d]: pairs of channels turned by time, row and column (Wan's three axes)."""
        d = self.geometry.head_dim
        side = 2 * (d // 6)
        frame, row, column = torch.meshgrid(
            torch.tensor(times).double(),
            torch.arange(self.rows).double(),
            torch.arange(self.columns).double(),
            indexing="ij",
        )
        angles = []
        for place, width in ((frame, d - 2 * side), (row, side), (column, side)):
            rate = 10000.0 ** -(torch.arange(0, width, 2).double() / width)
            angles.append(place.flatten()[:, None] * rate)
        angle = torch.cat(angles, 1)[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    # --- the loop

    def noise(self, block, step):
        return gaussian(self.seed, block, step, self.shape).double()

    def forward(self, x, levels, first, read, keep=False):
        self.first, self.read, self.keep = first, read, keep
        with float64() if self.exact else contextlib.nullcontext():
            x = x if self.exact else x.float()
            return self.model.velocity(x, [1000.0 * level for level in levels], self).double()

    def roll(self, blocks: int) -> torch.Tensor:
        """[B, C, 3 * blocks, h, w] float64."""
        steps, n = len(self.levels), self.block
        noisy, out = {}, []
        for window in range(blocks + steps - 1):
            under_way = range(max(0, window - steps + 1), min(window, blocks - 1) + 1)
            if window < blocks:
                noisy[window] = self.noise(window, 0)
            levels = {b: self.levels[window - b] for b in under_way}
            x = torch.cat([noisy[b] for b in under_way], 2)
            first = under_way[0] * n
            every = [levels[b] for b in under_way for _ in range(n)]
            v = self.forward(x, every, first, self.noisy_reads(first, n * len(under_way)))
            for b, part in zip(under_way, v.split(n, 2), strict=True):
                x0, step = noisy[b] - levels[b] * part, window - b + 1
                if step < steps:
                    noisy[b] = (1 - self.levels[step]) * x0 + self.levels[step] * self.noise(b, step)
                else:
                    out.append(x0)
                    self.forward(x0, [0.0] * n, first, self.clean_reads(first), keep=True)
        return torch.cat(out, 2)


class ThreePastFramesAtTheEnd(PublishedRolling):
    """The shrinking window reads no more past frames than the full one."""

    def noisy_reads(self, f, n):
        return super().noisy_reads(f, self.block * len(self.levels))


class FirstBlockStaysInTheCleanPass(PublishedRolling):
    """The clean pass sees the first block, in its own place, after it has left the 18 newest frames."""

    def clean_reads(self, f):
        newest = super().clean_reads(f)
        return newest if f <= self.room - self.block else self.own(0, self.block) + newest


class CleanAsNoisy(PublishedRolling):
    """The clean pass reads what the noisy passes read."""

    def clean_reads(self, f):
        return self.noisy_reads(f, self.block * len(self.levels))


class FirstBlockInItsOwnPlace(PublishedRolling):
    """The noisy passes read the first block at time 0, not just in front of the past."""

    def moved(self, end):
        return self.own(0, self.block)


MISTAKES = (ThreePastFramesAtTheEnd, FirstBlockStaysInTheCleanPass, CleanAsNoisy, FirstBlockInItsOwnPlace)
