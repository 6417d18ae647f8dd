"""The budget of an absorption that switches when memory asks, where none is given: what is free when the run begins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..adastate_core.absorption.warm_up import GIB, cache_bytes
from .builder import Built
from .host import model as host_model

# budgets are in steps of 1 KiB
_STEP = 2**10


def with_budget(built: Built, model: Any, text_tokens: int, vae_bytes: int, length: int | None) -> Built:
    """The same rollout with its budget. Where it is left open, that is what is free on the device beside the model's weights, the
    host's estimate of a forward and all that is not the cache; and never less than the least warm-up takes."""
    settings = built.spec.absorption
    if settings is None or settings.switch != "memory" or settings.budget_gib:
        return built
    least = replace(built, spec=replace(built.spec, absorption=replace(settings, switch="fixed")))
    plan = least.plan(text_tokens, vae_bytes, length)
    taken = cache_bytes(plan)
    beside = model.model_size() + host_model.forward_bytes(model, plan) + plan.total_bytes - taken
    steps = max((host_model.available_bytes(model) - beside) // _STEP, math.ceil(taken / _STEP))
    known = replace(settings, budget_gib=steps * _STEP / GIB)
    return replace(built, spec=replace(built.spec, absorption=known))
