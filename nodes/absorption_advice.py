"""When an absorption is of little use: what Plan Rollout Memory and REPORT say of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..adastate_core.rollout import RolloutSpec

# share of a layer's attention energy: where no layer loses more without its history, there is next to nothing to absorb
LITTLE = 0.02
LEAVE_OUT = "leave the absorption out, or turn absorb off and compare"


def beforehand(spec: RolloutSpec) -> list[str]:
    """What is known before anything runs."""
    if not _corrects(spec) or spec.anchor.kind != "adaptive":
        return []
    return [
        "absorption is for models that read a long history, and here the adaptive state carries what has to last, which layers "
        f"keep that forget: {LEAVE_OUT}"
    ]


def afterwards(spec: RolloutSpec, report: Mapping[str, Any]) -> list[str]:
    """What the absorption's own report shows, once it has switched."""
    lost = [one["before"] for one in report["residuals"]]
    if not _corrects(spec) or report["phase"] != "switched" or not lost or max(lost) >= LITTLE:
        return []
    return [
        f"there was little to absorb: without its history no layer loses more than {max(lost):.2g} of its attention's energy "
        f"(below {LITTLE:g}), so dropping it alone costs next to nothing: {LEAVE_OUT}"
    ]


def _corrects(spec: RolloutSpec) -> bool:
    """Whether layers forget and something takes the place of their history."""
    settings = spec.absorption
    forgets = settings is not None and settings.layers(spec.geometry.layers) > 0
    return forgets and settings.absorb and settings.ridge != math.inf
