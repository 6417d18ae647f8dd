"""How LongLive 2.0 generates, in its own terms, by whole histories in float64; for published_loops.py.

A shot's first chunk is pinned and all that follows stands later in time; a picture stands inside the first chunk; UniPC takes a
chunk from its only noise to its latents. Shares nothing with adastate_core but the model under test and the pack's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from published_loops import Published, drawn


def sigmas_of(steps: int, shift: float = 5.0) -> list[float]:
    """The noise levels of so many steps, and 0 behind them: evenly from the last of 1000 (0.999) down, shifted, in float32."""
    exact = [0.999 * (1 - i / steps) for i in range(steps + 1)]
    return torch.tensor([shift * u / (1 + (shift - 1) * u) for u in exact], dtype=torch.float32).tolist()


def log_ratio(sigma: float) -> float:
    """Half the log of the signal-to-noise ratio; it has no end at 0."""
    return math.log((1 - sigma) / sigma) if sigma else math.inf


def unipc(
    x: torch.Tensor, sigmas: list[float], predict: Callable[[int, torch.Tensor], torch.Tensor], highest: int = 2
) -> torch.Tensor:
    """UniPC-bh2 in data prediction (Zhao et al. 2023), of order 1 at both ends and `highest` in between.

    `predict(i, x)` is x0 at step i. A step corrects the jump that led to it, from that jump's own start and with what was
    predicted at its end, then jumps on from there. The last jump, to 0, takes the prediction itself.
    """
    lam = [log_ratio(s) for s in sigmas]
    x0s: list[torch.Tensor] = []
    start, order = x, 0

    def jump(i: int, x: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
        """From step i to the next, along x0 of step i and what `slope` adds to it."""
        grown = math.expm1(lam[i] - lam[i + 1])
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * grown * (x0s[i] + slope)

    def older(i: int) -> tuple[float, torch.Tensor]:
        """How far the step before i is from it, in jumps from i; x0's change over one."""
        r = (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])
        return r, (x0s[i - 1] - x0s[i]) / r

    def corrected(i: int, start: torch.Tensor, order: int, newest: torch.Tensor) -> torch.Tensor:
        change = newest - x0s[i]
        if order == 1:
            return jump(i, start, change / 2)
        down = lam[i] - lam[i + 1]
        grown = math.expm1(down)
        first = grown / down - 1
        second = first / down - 0.5
        r, before = older(i)
        weight = (2 * second / grown - first / grown) / (r - 1)
        return jump(i, start, weight * before + (first / grown - weight) * change)

    last = len(sigmas) - 2
    for i in range(last + 1):
        newest = predict(i, x)
        if i == last:
            return newest
        start = corrected(i - 1, start, order, newest) if i else x
        x0s.append(newest)
        order = min(highest, i + 1, last + 1 - i)
        x = jump(i, start, older(i)[1] / 2 if order == 2 else 0.0)
    raise AssertionError("no step")


class LongLive2(Published):
    """Chunks of F frames that read the sink and, beside it, `window` frames: those of the pinned chunk and the newest.

    `cuts` are the frames at which a shot begins. From there on everything stands `offset` later for each of them, and with the
    chunk after it its first chunk is pinned, until the next one is. `packed`: a frame's time is its place among those that are
    read, and no cut moves it. `picture` [B, C, 1, h, w] is the video's first frame, `given` [B, C, n, h, w] are the ones before
    the first chunk.
    """

    F, sink, window, steps, offset = 8, 8, 16, 4, 8
    packed, cuts, picture, given = False, (), None, None
    hold = staticmethod(lambda x: x)  # what becomes of a frame's raw keys or values [B, P, width] while they are held
    # mistakes: nothing is pinned; the old pin goes when the cut's chunk begins; the pin goes by age; the highest order; fresh
    # noise instead of a solver; the model is told 1000 sigma; the picture has the chunk's timestep; it is noised like the others
    pins, pins_early, order, renoised, exact_times, picture_told, picture_stays = True, False, 2, False, False, False, True

    def __init__(self, *args, **numbers):
        super().__init__(*args, **numbers)
        self.sigmas = sigmas_of(self.steps)

    # ---- what is read

    def time(self, frame: int) -> float:
        return frame + self.offset * sum(cut <= frame for cut in self.cuts)

    def pinned(self) -> range:
        past = [cut for cut in self.cuts if cut < self.f + self.pins_early]
        return range(past[-1], min(past[-1] + self.F, self.f)) if past and self.pins else range(0)

    def read(self) -> list[int]:
        """The frames that a pass of this chunk reads, in their order."""
        beside = [frame for frame in self.pinned() if frame >= self.sink]
        newest = (frame for frame in reversed(range(self.sink, self.f)) if frame not in beside)
        beside += [frame for frame, _ in zip(newest, range(self.window - len(beside)), strict=False)]
        return [*range(min(self.sink, self.f)), *sorted(beside)]

    def seen(self, layer, q, k, v):
        frames, n = self.read(), q.shape[1] // self.P
        own = range(self.f, self.f + n)
        held = [tuple(self.hold(t) for t in pair) for pair in self.kv(layer, frames)]
        if self.packed:
            return self.whole(held, list(range(len(frames))), list(range(len(frames), len(frames) + n)))
        return self.whole(held, [self.time(i) for i in frames], [self.time(i) for i in own])

    # ---- a chunk

    def with_picture(self, x: torch.Tensor) -> torch.Tensor:
        """The picture in its place, if it is one of this chunk's frames."""
        if self.picture is None or self.f:
            return x
        return torch.cat([self.picture.double(), x[:, :, 1:]], 2)

    def chunk(self, number):
        shape = self.shape

        def predict(i: int, x: torch.Tensor) -> torch.Tensor:
            sigma = self.sigmas[i]
            told = 1000 * sigma if self.exact_times else float(int(1000 * sigma))
            x = self.with_picture(x) if self.picture_stays else x
            inside = self.picture is not None and self.f == 0 and not self.picture_told
            times = [0.0] + [told] * (self.F - 1) if inside else told
            return x - sigma * self.one_pass(x, times)

        x = drawn(self.seed, number, 0, shape)
        if self.renoised:
            for i, lower in enumerate(self.sigmas[1:]):
                x = (1 - lower) * predict(i, x) + lower * drawn(self.seed, number, i + 1, shape)
        else:
            x = unipc(x, self.sigmas, predict, self.order)
        x = self.with_picture(x)
        self.keep(x)
        return x

    def roll(self, chunks):
        """[B, C, given frames + chunks * F, h, w] float32."""
        if self.given is not None and not self.out:
            with torch.no_grad():
                self.start_with(self.given)
        return super().roll(chunks)

    def start_with(self, given: torch.Tensor) -> None:
        """Clean passes over frames that exist, chunk by chunk."""
        from published_loops import in_float64

        with in_float64(self.model):
            for part in given.double().split(self.F, 2):
                self.keep(part)
                self.out.append(part)
                self.f += part.shape[2]
