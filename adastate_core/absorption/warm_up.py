"""How long a warm-up lasts: as long as it was given, until memory asks, or until it stops learning.

What can be known is known before anything is allocated. "memory" is a number of frames that follows from the plan of the whole
windows, whatever the length of the video, so that a longer video begins like a shorter one. "learned" has a latest end, for which
room is planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..cache.byte_plan import KV_NAMES, CachePlan
from .items import Collectors
from .settings import LEAST_APART, AbsorptionSettings
from .solve import nothing, residual, solve

GIB = 2**30
# a warm-up has stopped learning when WITHIN more chunks have lowered the error that is left by less than this share of it
LEAST_GAIN, WITHIN = 0.05, 2
# the ridge at which learning is watched, where the settings leave it open
WATCHED_RIDGE = 1.0


def cache_bytes(plan: CachePlan) -> int:
    """The most that keys and values on the device take together with an absorption's statistics and corrections."""
    names = (*KV_NAMES, "absorption")
    return max(sum(size for name, size in sizes.items() if name in names) for sizes in plan.moments())


@dataclass(frozen=True)
class Ends:
    """Latent frames after which a warm-up ends: `earliest`, and at the `latest`. `never`: whole windows fit the budget."""

    earliest: int
    latest: int
    never: bool = False


def ends_of(
    settings: AbsorptionSettings, plan: CachePlan, chunk_frames: int, planned: Callable[[CachePlan, int], CachePlan]
) -> Ends:
    """When a warm-up in `plan` ends. `planned`: the plan with the phases of a warm-up of so many frames."""
    least = settings.warmup_frames
    if settings.switch == "fixed":
        return Ends(least, least)
    if settings.switch == "learned":
        return Ends(least, settings.longest_frames)
    if not settings.budget_gib:
        raise ValueError("switch when memory asks needs a budget: give budget_gib")
    whole, budget = replace(plan, frames=None, phases=()), settings.budget_gib * GIB
    if cache_bytes(whole) <= budget:
        return Ends(least, least, never=True)
    # with so many chunks more all windows are full: they would not fit
    window = max(layer.anchor_frames + layer.ring_frames for layer in plan.layers)
    low, high = 0, -(-window // chunk_frames) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = cache_bytes(planned(whole, least + middle * chunk_frames)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return Ends(least + low * chunk_frames, least + low * chunk_frames)


@dataclass
class Learning:
    """How a warm-up learns: (the next frame, share of the missing energy that is left on the newest chunk) chunk by chunk."""

    curve: list[tuple[int, float]] = field(default_factory=list)

    def measure(
        self,
        next_frame: int,
        collector: Collectors,
        settings: AbsorptionSettings,
        rank: int | None,
        prior_of: Callable[[int], torch.Tensor | None],
    ) -> None:
        """Solve on all chunks but the two newest and judge on the newest, if there are enough and this was not done yet."""
        if collector.chunks < LEAST_APART or (self.curve and self.curve[-1][0] >= next_frame):
            return
        ridge = WATCHED_RIDGE if settings.ridge is None else settings.ridge
        left = missing = 0.0
        for i in collector.layers:
            prior = prior_of(i)
            for one in collector.each:
                held_out = one.held_out[i]
                left += residual(held_out, solve(one.seen[i], ridge, rank, prior))
                missing += residual(held_out, nothing(held_out))
        self.curve.append((next_frame, left / missing if missing > 0 else 0.0))

    @property
    def gain(self) -> float | None:
        """By which share the newest chunks lowered what is left; None before that is known."""
        if len(self.curve) <= WITHIN:
            return None
        (_, before), (_, now) = self.curve[-1 - WITHIN], self.curve[-1]
        return 1 - now / before if before > 0 else 0.0

    @property
    def stopped(self) -> bool:
        return self.gain is not None and self.gain < LEAST_GAIN


def why_switched(settings: AbsorptionSettings, ends: Ends, learning: Learning) -> str:
    """A sentence without its full stop, for the report."""
    if settings.switch == "fixed":
        return f"the warm-up of {settings.warmup_frames} latent frames was over"
    if settings.switch == "memory":
        budget = f"the budget of {settings.budget_gib:g} GiB"
        if ends.latest == settings.warmup_frames:
            return f"the least warm-up of {settings.warmup_frames} latent frames was over, and one chunk more would exceed {budget}"
        return f"after a warm-up of {ends.latest} latent frames one chunk more would exceed {budget}"
    if learning.stopped:
        return f"the last {WITHIN} chunks lowered the error that is left by {learning.gain:.1%} of it, less than {LEAST_GAIN:.0%}"
    return f"the longest warm-up, {ends.latest} latent frames, was over, and it had not stopped learning"
