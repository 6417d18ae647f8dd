"""What a report says of an absorption: when and why it switched, how its ridges were chosen, what is left in each layer."""

from __future__ import annotations

from typing import Any

from ..cache.byte_plan import CachePlan
from .settings import LEAST_APART, AbsorptionSettings
from .solve import Fit
from .warm_up import GIB, Ends, Learning, cache_bytes


def how_chosen(settings: AbsorptionSettings, chunks: int) -> str:
    """A phrase on the rows that ridges were chosen on, where `chunks` were collected; 0 for a correction of before."""
    if not chunks:
        return "solved before"
    if not settings.absorb:
        return "no correction was asked for"
    if settings.ridge is not None:
        return f"the ridge was given, {settings.ridge:g}"
    if settings.judge == "next":
        return "on the last chunk, next to those to fit on, as in the state's own version"
    if chunks < LEAST_APART:
        return f"{chunks} collected chunks are too few to choose on, so that the ridge is 1, or nothing where that is better"
    return f"fitted on the first {chunks - 2} of {chunks} collected chunks, judged on the last"


def residuals_told(fits: dict[int, Fit], changes: dict[int, float]) -> list[dict[str, Any]]:
    """By layer: the held-out error without and with its correction, the ridge, and whether a prior drew it; by how much the picture
    changes without its history, where that was asked; and the same figures of each item of a batch."""
    told = []
    for i, one in sorted(fits.items()):
        entry = {"layer": i, "before": one.discrepancy, "after": one.residual, "ridge": str(one.ridge)}
        entry |= {"towards_prior": True} if one.towards else {}
        entry |= {"change": changes[i]} if i in changes else {}
        items = [{"before": d, "after": r, "ridge": str(ridge)} for ridge, r, d in one.items]
        told.append(entry | ({"items": items} if items else {}))
    return told


def switch_told(
    settings: AbsorptionSettings, ends: Ends, plan: CachePlan, at: int | None, why: str, learning: Learning
) -> dict[str, Any]:
    """How the switch was asked for, the first frame after it, and why then. "left": of a warm-up that may stop learning the share
    of the missing energy that is left, chunk by chunk."""
    if ends.never:
        taken = cache_bytes(plan.plain) / GIB
        why = f"memory never asks: whole windows take {taken:.4g} GiB of the budget of {settings.budget_gib:g} GiB"
    told = {"asked": settings.switch, "at_frame": at, "why": why, "latest_frame": ends.latest}
    told |= {"budget_gib": settings.budget_gib} if settings.switch == "memory" else {}
    return told | ({"left": [list(one) for one in learning.curve]} if settings.switch == "learned" else {})
