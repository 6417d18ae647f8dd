"""Start latents inside the first chunk, by hand: a loop in float64 over plain lists, dense attention, rotation as complex numbers.

Shares nothing with adastate_core but the weights of the model under test. Written from NVlabs/LongLive's
pipeline/causal_diffusion_inference.py (7860ad9): what is overwritten when, and that its scheduler is given what the pass saw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from slow_rollout import gaussian

# (x, v, sigma, sigma of the next step or 0, noise of the next step or None, what it returned before) -> (x of the next step, ...)
Sampler = Callable[..., tuple[torch.Tensor, object]]


class InDouble:
    """A model under test in float64, its own constants included."""

    def __init__(self, net) -> None:
        self.net, self.geometry = copy.deepcopy(net).double(), net.geometry

    def velocity(self, x: torch.Tensor, timestep, attention) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return self.net.velocity(x, timestep, attention)
        finally:
            torch.set_default_dtype(torch.float32)


def renoise(x, v, sigma, following, fresh, memory):
    x0 = x - sigma * v
    return (x0 if fresh is None else (1 - following) * x0 + following * fresh), None


def two_steps(x, v, sigma, following, fresh, memory):
    """A multistep one, which follows the velocity and the one before it as it was given it."""
    slope = v if memory is None else 1.5 * v - 0.5 * memory
    return x + (following - sigma) * slope, v


class Dense:
    """`past` [(time, {layer: (k, v)})], oldest first; `now` are the times of the pass's own frames."""

    def __init__(self, heads: int, rows: int, columns: int) -> None:
        self.heads, self.rows, self.columns = heads, rows, columns
        self.past: list[tuple[float, dict[int, tuple[torch.Tensor, torch.Tensor]]]] = []
        self.now: list[float] = []
        self.made: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []

    def turned(self, x: torch.Tensor, time: float) -> torch.Tensor:
        """[B, P, heads, d] of one frame."""
        d = x.shape[-1]
        side = 2 * (d // 6)
        row = torch.arange(self.rows).repeat_interleave(self.columns).double()
        column = torch.arange(self.columns).repeat(self.rows).double()
        angles = [
            place[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
            for width, place in ((d - 2 * side, torch.full_like(row, time)), (side, row), (side, column))
        ]
        turn = torch.polar(torch.ones(self.rows * self.columns, d // 2).double(), torch.cat(angles, 1))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        frames, (q, k, v) = len(self.now), (one.double() for one in (q, k, v))

        def split(x: torch.Tensor) -> list[torch.Tensor]:
            return [one.unflatten(-1, (self.heads, -1)) for one in x.chunk(frames, 1)]

        if layer == 0:
            self.made = [{} for _ in self.now]
        for made, key, value in zip(self.made, split(k), split(v), strict=True):
            made[layer] = key, value
        seen = [*self.past, *zip(self.now, self.made, strict=True)]
        keys = torch.cat([self.turned(held[layer][0], time) for time, held in seen], 1)
        values = torch.cat([held[layer][1] for _, held in seen], 1)
        queries = torch.cat([self.turned(one, time) for one, time in zip(split(q), self.now, strict=True)], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)


def by_hand(
    net, given, *, F, W, length, sigmas, first=(), sink=0, S=0, fixed=False, seed=7, sampler: Sampler = renoise
) -> torch.Tensor:
    """Latents [B, C, >= length, h, w] float64 of a model whose `velocity` takes and gives that. `sink` frames of a static anchor or
    `S` of an adaptive one; positions are packed, or fixed."""
    given = given.double()
    batch, channels, _, h, w = given.shape
    attention = Dense(net.geometry.heads, h // 2, w // 2)
    anchor, window, outputs = [], [], []  # of frames: {layer: (k, v)}
    for k in range(-(-length // F)):
        A = sink or S
        start = A + W if fixed else max(len(anchor), S) + len(window)
        attention.past = [(i, held) for i, held in enumerate(anchor)]
        attention.past += [(start - len(window) + i, held) for i, held in enumerate(window)]
        attention.now = [*range(S), *(start + i for i in range(F))]

        def drawn(step: int, k: int = k) -> torch.Tensor:
            state = gaussian(seed, k, step, (batch, channels, S, h, w), "/state")
            return torch.cat([state, gaussian(seed, k, step, (batch, channels, F, h, w))], 2).double()

        inside, levels = (given if k == 0 else given[:, :, :0]), (first if k == 0 and first else sigmas)
        held = inside.shape[2]
        x, memory = drawn(0), None
        for step, sigma in enumerate(levels):
            x = torch.cat([x[:, :, :S], inside, x[:, :, S + held :]], 2)
            times = [1000 * sigma] * S + [0.0] * held + [1000 * sigma] * (F - held)
            v = net.velocity(x, times, attention)
            last = step + 1 == len(levels)
            x, memory = sampler(
                x, v, sigma, 0.0 if last else levels[step + 1], None if last else drawn(step + 1), memory
            )
            x = torch.cat([x[:, :, :S], inside, x[:, :, S + held :]], 2)
        net.velocity(x, 0.0, attention)
        outputs.append(x[:, :, S:])
        content = attention.made[S:]
        while content and sink and len(anchor) < sink:
            anchor.append(content.pop(0))
        anchor = attention.made[:S] if S else anchor
        window = (window + content)[max(0, len(window) + len(content) - W) :]
    return torch.cat(outputs, 2)
