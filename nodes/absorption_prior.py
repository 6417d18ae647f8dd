"""A prior of absorptions as the nodes make, load and check it."""

from __future__ import annotations

from typing import Any

from ..adastate_core.absorption.prior import Prior, prior_of
from ..adastate_core.absorption.settings import settings_from
from ..adastate_core.rollout import RolloutState

# how Save Absorption saves
CORRECTION, PRIOR = "correction", "prior"
_NO_PRIOR = "prior holds none: connect Load Absorption with a file that Save Absorption saved as prior"


def linked(request: Any) -> Prior | None:
    """The prior of what is connected to an input of that name, if anything is. ValueError for an absorption of another kind."""
    if request is None:
        return None
    if not request.is_prior:
        raise ValueError(_NO_PRIOR)
    return request.prior


def made_of(state: RolloutState, before: Prior | None) -> Prior:
    """The prior of a run, which joins the runs of the one `before`."""
    described = state.spec.get("absorption")
    if described is None:
        raise ValueError(
            "there is nothing to make a prior of: the rollout ran without absorption; connect ISPA Cache Absorption to it, with a "
            "warmup_frames beyond the video's length"
        )
    found = prior_of(state.spec, settings_from(described), state.absorption)
    return found if before is None else before.joined(found)
