"""Flow-matching step lists and the noise of a rollout.

The model predicts v = noise - x0, so x0 = x - sigma v. What becomes of it between two steps is a sampler's (solvers.py). Noise
depends on (seed, chunk, step) alone (docs/semantics.md, Noise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .solvers import RENOISING, SAMPLERS, Solver, noises_of

TIMESTEPS = 1000.0
MOST_STEPS = 100  # of a list made from a number of steps
MOST_SIGMAS = 1000  # of a list as given


@dataclass(frozen=True)
class Schedule:
    """The sigmas of the noisy passes (descending, each in (0, 1]) and the timestep of the clean pass.

    `first_sigmas`, if there are any, are those of the first generated chunk (Causal-Forcing++'s 1- and 2-step weights).
    Noisy passes see the past as the clean ones left it. The steps in `kept` have a past at their own noise level: they see
    what they themselves made of the chunks before, and no other pass does. `sampler` is one of SAMPLERS. `told`, if there is any,
    are the timesteps of 1000 that the model is told at the steps in `sigmas`; without it these are 1000 sigma.
    """

    sigmas: tuple[float, ...]
    context_timestep: float = 0.0
    first_sigmas: tuple[float, ...] = ()
    kept: tuple[int, ...] = ()
    sampler: str = RENOISING
    told: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.told and (len(self.told) != len(self.sigmas) or not all(0.0 <= t <= TIMESTEPS for t in self.told)):
            raise ValueError(
                f"the model is told the timesteps {list(self.told)} at {len(self.sigmas)} noise levels; each level takes one, in "
                f"[0, {TIMESTEPS:g}]"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}")
        if self.kept and (self.first_sigmas or sorted({*self.kept} & {*range(len(self.sigmas))}) != list(self.kept)):
            raise ValueError(
                f"steps {list(self.kept)} are to have a past of their own; they must be steps of the {len(self.sigmas)} that every "
                "chunk takes, in order"
            )
        if self.first_sigmas:
            Schedule(self.first_sigmas)
        if not self.sigmas:
            raise ValueError("the sigma list is empty; it needs at least one value above 0")
        if len(self.sigmas) > MOST_SIGMAS:
            raise ValueError(f"there are {len(self.sigmas)} sigmas; a chunk takes at most {MOST_SIGMAS} steps")
        if not all(0.0 < s <= 1.0 for s in self.sigmas) or any(
            a <= b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)
        ):
            raise ValueError(
                f"sigmas are {_listed(self.sigmas)}; they must fall strictly and lie in (0, 1], "
                "with at most one 0 at the end: use a scheduler for flow matching (shift 5, 4 steps for Self-Forcing)"
            )

    @staticmethod
    def shifted(steps: int, shift: float) -> Schedule:
        """t_j = 1 - j/steps, sigma_j = shift t_j / (1 + (shift - 1) t_j).

        ValueError outside 1 <= steps <= MOST_STEPS, 0 < shift < infinity.
        """
        if not (1 <= steps <= MOST_STEPS and 0 < shift < math.inf):
            raise ValueError(
                f"steps is {steps} and shift {shift}; steps must be between 1 and {MOST_STEPS} and shift above 0"
            )
        times = [1 - j / steps for j in range(steps)]
        return Schedule(tuple(shift * t / (1 + (shift - 1) * t) for t in times))

    @staticmethod
    def warped(timesteps: Sequence[float], shift: float, first: Sequence[float] = ()) -> Schedule:
        """From unshifted timesteps of 1000 (1000, 750, ...), as the causal family's step lists are written."""
        lists = [tuple(shift * t / (1000 + (shift - 1) * t) for t in each) for each in (timesteps, first)]
        return Schedule(lists[0], first_sigmas=lists[1])

    def for_chunk(self, chunk: int) -> tuple[float, ...]:
        """The sigmas of generated chunk `chunk`."""
        return self.first_sigmas if chunk == 0 and self.first_sigmas else self.sigmas

    def timesteps_of(self, chunk: int) -> tuple[float, ...]:
        """What the model is told at each step of generated chunk `chunk`."""
        sigmas = self.for_chunk(chunk)
        return self.told if self.told and sigmas is self.sigmas else tuple(TIMESTEPS * sigma for sigma in sigmas)

    def own_past(self, step: int) -> int | None:
        """Which of the pasts beside the clean one noisy pass `step` sees and enters, from 1 on; None: it sees the clean one."""
        return self.kept.index(step) + 1 if step in self.kept else None

    def noises(self, steps: int) -> int:
        """How many noises a chunk of so many steps takes."""
        return noises_of(self.sampler, steps)

    def solver(self, chunk: int, noises: torch.Tensor) -> Solver:
        """A fresh solver for generated chunk `chunk`; `noises` [n, B, C, frames, h, w] float32, n as `noises` says."""
        return SAMPLERS[self.sampler](self.for_chunk(chunk), noises)

    @staticmethod
    def from_sigmas(sigmas: Sequence[float] | torch.Tensor) -> Schedule:
        """From a SIGMAS list or tensor [n]: descending, a last 0 is dropped, every other value is a step."""
        if isinstance(sigmas, torch.Tensor) and sigmas.ndim != 1:
            raise ValueError(f"sigmas have the shape {list(sigmas.shape)}; they must be one list")
        if len(sigmas) > MOST_SIGMAS + 1:
            raise ValueError(f"there are {len(sigmas)} sigmas; a chunk takes at most {MOST_SIGMAS} steps and a last 0")
        values = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas)]
        if values and values[-1] == 0.0:
            values = values[:-1]
        return Schedule(tuple(values))


def _listed(sigmas: Sequence[float]) -> str:
    """The first of them, for a sentence."""
    first = ", ".join(str(round(s, 4)) for s in sigmas[:8])
    return f"[{first}{', ...' if len(sigmas) > 8 else ''}]"


def timesteps(timestep: float | Sequence[float], x: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """What a Wan model takes for [B, C, T, h, w]: [B] float32 of one timestep, or [B, T] of one a frame; on `device` (None: that
    of `x`)."""
    device = x.device if device is None else device
    if isinstance(timestep, int | float):
        return torch.full((x.shape[0],), timestep, dtype=torch.float32, device=device)
    every = torch.tensor(timestep, dtype=torch.float32).to(device, non_blocking=True)
    return every.expand(x.shape[0], -1)
