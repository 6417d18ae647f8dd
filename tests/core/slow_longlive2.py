"""How LongLive 2.0 generates, in its own terms, by whole histories in float64; for published_loops.py.

A shot's first chunk is pinned and all that follows stands later in time; a picture stands inside the first chunk; UniPC takes a
chunk from its only noise to its latents. Shares nothing with adastate_core but the model under test and the pack's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from published_loops import Frame, Published, drawn, in_float64


def sigmas_of(steps: int, shift: float = 5.0) -> list[float]:
    """The noise levels of so many steps, and 0 behind them: evenly from 0.999 down, shifted, as float32 holds them."""
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

    `cuts` are the frames at which a shot begins. From there on everything stands `offset` later for each of them; from the chunk
    after it on its first chunk is pinned, until that of the next one is. `packed`: a frame's time is its place among those that are
    read, and no cut moves it. `picture` [B, C, n, h, w] are the first frames of the first chunk, `given` [B, C, n, h, w] those of
    the video before the first chunk.

    From frame `switch` on a layer in `corrected` {layer: (matrix, constant)} reads `local` frames beside the sink, whatever is
    pinned, and what it makes of them is corrected.
    """

    F, sink, window, steps, offset = 8, 8, 16, 4, 8
    packed, cuts, picture, given = False, (), None, None
    switch, local, corrected = 0, 0, {}
    hold = staticmethod(lambda x: x)  # what becomes of a frame's raw keys or values [B, P, width] once they are cached
    # mistakes: nothing is pinned; a pin ends when the chunk of the next cut begins; the highest order of the solver; fresh noise
    # in the place of a solver; the model is told 1000 sigma; or of the picture what it is of the rest; or is not shown the picture
    pins, pins_early, order, renoised, exact_times, picture_told, picture_shown = (
        True,
        False,
        2,
        False,
        False,
        False,
        True,
    )

    # ---- what is read

    def time(self, frame: int) -> float:
        return frame + self.offset * sum(cut <= frame for cut in self.cuts)

    def pinned(self) -> range:
        past = [cut for cut in self.cuts if cut < self.f + self.pins_early]
        return range(past[-1], min(past[-1] + self.F, self.f)) if past and self.pins else range(0)

    def switched(self, layer: int) -> bool:
        return layer in self.corrected and self.f >= self.switch

    def read(self, layer: int) -> list[int]:
        """The frames that a pass of this chunk reads, in the order of time."""
        room, pinned = (self.local, ()) if self.switched(layer) else (self.window, self.pinned())
        beside = [frame for frame in pinned if frame >= self.sink]
        newest = [frame for frame in range(self.sink, self.f) if frame not in beside]
        beside += newest[max(0, len(newest) + len(beside) - room) :]
        return [*range(min(self.sink, self.f)), *sorted(beside)]

    def seen(self, layer, q, k, v):
        frames = self.read(layer)
        own = range(self.f, self.f + q.shape[1] // self.P)
        times = [self.time(i) for i in (*frames, *own)]
        if self.packed:
            times = list(range(len(times)))
        return self.whole(self.kv(layer, frames), times[: len(frames)], times[len(frames) :])

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if not self.switched(layer):
            return out
        matrix, constant = self.corrected[layer]
        return out + out @ matrix + constant

    def keep(self, x):
        made = len(self.history[0])
        super().keep(x)
        for frames in self.history:
            frames[made:] = [Frame(one.q, self.hold(one.k), self.hold(one.v)) for one in frames[made:]]

    # ---- a chunk

    def with_picture(self, x: torch.Tensor) -> torch.Tensor:
        """A chunk with the picture in its place, if that is one of its frames."""
        if self.picture is None or self.out:
            return x
        return torch.cat([self.picture.double(), x[:, :, self.picture.shape[2] :]], 2)

    def told(self, sigma: float) -> float | list[float]:
        told = 1000 * sigma if self.exact_times else float(int(1000 * sigma))
        if self.picture is None or self.out or self.picture_told:
            return told
        n = self.picture.shape[2]
        return [0.0] * n + [told] * (self.F - n)

    def chunk(self, number):
        sigmas = sigmas_of(self.steps)

        def predict(i: int, x: torch.Tensor) -> torch.Tensor:
            x = self.with_picture(x) if self.picture_shown else x
            return x - sigmas[i] * self.one_pass(x, self.told(sigmas[i]))

        x = drawn(self.seed, number, 0, self.shape)
        if self.renoised:
            for i, lower in enumerate(sigmas[1:]):
                x = (1 - lower) * predict(i, x) + lower * drawn(self.seed, number, i + 1, self.shape)
        else:
            x = unipc(x, sigmas, predict, self.order)
        x = self.with_picture(x)
        self.keep(x)
        return x

    def roll(self, chunks):
        """[B, C, given frames + chunks * F, h, w] float32."""
        if self.given is not None and not self.out:
            with in_float64(self.model):
                if self.before_chunk is not None:
                    self.before_chunk(self)
                for part in self.given.double().split(self.F, 2):
                    self.keep(part)
                    self.out.append(part)
                    self.f += part.shape[2]
        return super().roll(chunks)


LONGLIVE2 = {"longlive2_5b": LongLive2, "longlive2_5b_2step": type("TwoSteps", (LongLive2,), {"steps": 2})}
