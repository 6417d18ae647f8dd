"""What happens between two noisy passes of a chunk: samplers, known by name.

A solver is made anew for every chunk, so nothing is carried from one to the next: a chunk depends on its noise and on the past
alone, and a rollout that is stopped and resumed, or one whose chunks are made again, has the same bits. All arithmetic is float32;
a solver treats every number of a latent alike, whatever frame it is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Solver(Protocol):
    """Takes one chunk from noise to clean; may remember what came before within it."""

    start: torch.Tensor

    def step(self, step: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0, x of the next step) from the model's velocity at `x`; after the last step both are the chunk."""
        ...


class Renoising:
    """Self-Forcing's: the clean estimate is taken back to the next noise level with fresh noise."""

    def __init__(self, sigmas: Sequence[float], noises: torch.Tensor) -> None:
        self.sigmas, self.noises, self.start = sigmas, noises, noises[0]

    def step(self, step: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0, following = denoised(x, v, self.sigmas[step]), step + 1
        if following == len(self.sigmas):
            return x0, x0
        return x0, renoised(x0, self.noises[following], self.sigmas[following])


class Euler:
    """The flow's ODE dx/dsigma = v by Euler's method: x moves along v from one noise level to the next. First order."""

    draws = 1

    def __init__(self, sigmas: Sequence[float], noises: torch.Tensor) -> None:
        self.sigmas, self.start = sigmas, noises[0]

    def step(self, step: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0, following = denoised(x, v, self.sigmas[step]), step + 1
        if following == len(self.sigmas):
            return x0, x0
        return x0, x + (self.sigmas[following] - self.sigmas[step]) * v


class UniPC:
    """UniPC of order 2 on the clean estimates, with B(h) = exp(-h) - 1 (arXiv 2302.04867; diffusers' "bh2"; LongLive 2.0).

    Each step first corrects the jump that led to it, now that the estimate at its end is known, and then jumps on from there with
    the estimates of this step and of the one before. The first and the last jump are of first order (`lower_order_final`).
    """

    draws = 1

    def __init__(self, sigmas: Sequence[float], noises: torch.Tensor) -> None:
        self.sigmas, self.start = sigmas, noises[0]
        self._begin = self.start  # where the last jump began
        self._estimates: tuple[torch.Tensor, ...] = ()  # x0 of the last two steps, the newest first

    def step(self, step: int, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0, following = denoised(x, v, self.sigmas[step]), step + 1
        if following == len(self.sigmas):
            return x0, x0
        if step:
            x = _jumped(*correction(self.sigmas[max(0, step - 2) : following]), self._begin, x0, *self._estimates)
        self._begin, self._estimates = x, (x0, *self._estimates[:1])
        return x0, _jumped(*prediction(self.sigmas[max(0, step - 1) : following + 1]), x, *self._estimates)


def _jumped(begin: float, estimates: Sequence[float], x: torch.Tensor, *clean: torch.Tensor) -> torch.Tensor:
    """begin * x + the sum of each estimate times its weight."""
    out = begin * x
    for weight, x0 in zip(estimates, clean, strict=True):
        out.add_(x0, alpha=weight)
    return out


def prediction(sigmas: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """(weight of x, weights of the estimates at the levels before the last one, newest first) of the jump to the last of `sigmas`.

    With m an estimate and s, t the levels of the jump's begin and end it is (t/s) x + (1 - t/s) m of first order; of second order m
    moves on by half of what it has moved since the level before.
    """
    *before, begin, end = sigmas
    keep = end / begin
    if not before:
        return keep, (1 - keep,)
    moved = 0.5 * _pace(before[-1], begin, end)
    return keep, ((1 - keep) * (1 - moved), (1 - keep) * moved)


def correction(sigmas: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """The same of the jump to the last of `sigmas` once the estimate there is known, whose weight comes first.

    Of second order it is exact for estimates that are quadratic in the logarithm of signal over noise.
    """
    *before, begin, end = sigmas
    keep = end / begin
    if not before:
        return keep, (0.5 * (1 - keep), 0.5 * (1 - keep))
    pace, (mean, square) = _pace(before[-1], begin, end), _moments(_log_snr(begin) - _log_snr(end))
    new = mean - (mean - square) * pace / (pace - 1)
    old = (mean - square) * pace * pace / (pace - 1)
    return keep, tuple((1 - keep) * weight for weight in (new, 1 - new - old, old))


def _log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma); minus infinity where all is noise."""
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1.0 else -math.inf


# a jump so many times longer than the one before it learns nothing from that one but the rounding of its estimates
_LONGEST_PACE = 1000.0


def _pace(before: float, begin: float, end: float) -> float:
    """How long the jump to `end` is, beside the one before it, in _log_snr; negative. 0, so that what came before does not count,
    where that one began in noise alone or has next to no length."""
    last, length = _log_snr(before) - _log_snr(begin), _log_snr(end) - _log_snr(begin)
    return length / last if length < -_LONGEST_PACE * last else 0.0


def _moments(z: float) -> tuple[float, float]:
    """Of a jump of length -z: (e^z - 1 - z) / (z (e^z - 1)) and 2 (e^z - 1 - z - z^2 / 2) / (z^2 (e^z - 1)).

    By their series where z is small, since little but rounding is left of these differences; 1/2 and 1/3 at 0.
    """
    if z < -1.0:
        whole = math.expm1(z)
        return (whole - z) / (z * whole), 2 * (whole - z - z * z / 2) / (z * z * whole)
    zero, first, second = (sum(z**k / math.factorial(k + more) for k in range(20)) for more in (1, 2, 3))
    return first / zero, 2 * second / zero


# makes a solver of a chunk's sigmas and noises [n, B, C, frames, h, w] float32: one for each step, or as many as its `draws` says
Sampler = Callable[[tuple[float, ...], torch.Tensor], Solver]
RENOISING = "renoising"
SAMPLERS: dict[str, Sampler] = {RENOISING: Renoising, "euler": Euler, "unipc": UniPC}


def register_sampler(name: str, make: Sampler) -> None:
    """Make a sampler known by its name, for presets to use. ValueError for a name that is no plain one or is taken."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"the sampler's name is {name!r}; a name is one plain word, such as heun")
    taken = SAMPLERS.get(name)
    if taken is not None and _place(taken) != _place(make):
        raise ValueError(f"the sampler {name} is known already; give yours another name")
    SAMPLERS[name] = make


def noises_of(name: str, steps: int) -> int:
    """How many noises a sampler takes for a chunk of so many steps; at least the one that the chunk begins with."""
    draws = getattr(SAMPLERS[name], "draws", None)
    return steps if draws is None else min(max(1, draws), steps)


def _place(thing: object) -> tuple[object, object]:
    """Where a function or class was written."""
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", thing)


def denoised(x: torch.Tensor, v: torch.Tensor, sigma: float) -> torch.Tensor:
    """x0 from the model's velocity, float32."""
    return x - sigma * v


def renoised(x0: torch.Tensor, fresh: torch.Tensor, sigma: float) -> torch.Tensor:
    """x0 taken back to noise level `sigma` with fresh noise, float32."""
    return (1 - sigma) * x0 + sigma * fresh
