"""The families that a rollout drives."""

from __future__ import annotations

from ..geometry import LatentSpace
from .family import Family
from .wan21 import WAN21_TEXT
from .wan22 import WAN22_5B

FAMILIES = (WAN21_TEXT, WAN22_5B)


def family_of(model_class: str) -> Family | None:
    """The family that a class of the host belongs to; None if no rollout takes it."""
    return next((family for family in FAMILIES if model_class in family.model_classes), None)


def family_in(space: LatentSpace) -> Family:
    """The family whose models work in a latent space of geometry.SPACES."""
    return next(family for family in FAMILIES if family.space == space)
