"""What other packs build on: policies, presets and samplers of their own, made known by one call of `register`.

The pack gives this module to them as `adastate` (docs/extending.md). What is in `__all__` keeps its meaning.
"""

from __future__ import annotations

from .anchors import Anchor, LayerView, RolloutNumbers, Source
from .anchors import register as register_anchor
from .schedules.schedule import Schedule
from .schedules.solvers import Solver, denoised, register_sampler, renoised
from .weights.presets import Preset, register_preset

__all__ = [
    "Anchor", "LayerView", "Preset", "RolloutNumbers", "Schedule", "Solver", "Source", "denoised", "register", "renoised",
]  # fmt: skip


def register(thing: object, *examples: Anchor, name: str = "") -> object:
    """Make an anchor policy (a class under Anchor), a Preset, or with its `name` a sampler known; gives `thing` back, so
    that it can decorate a class. `examples` are a policy's, for tests. ValueError, in a sentence, for anything else."""
    if isinstance(thing, type) and issubclass(thing, Anchor):
        return register_anchor(thing, *examples)
    if isinstance(thing, Preset):
        return register_preset(thing)
    if callable(thing) and name:
        register_sampler(name, thing)
        return thing
    raise ValueError(
        f"{thing!r:.80} cannot be registered; give a class under Anchor, a Preset, or a sampler with its name=..."
    )
