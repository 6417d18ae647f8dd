"""The families that a rollout drives."""

from __future__ import annotations

from .family import Family
from .wan21 import WAN21_TEXT
from .wan22 import WAN22_5B
from .wan22_s2v import WAN22_S2V

FAMILIES = (WAN21_TEXT, WAN22_5B, WAN22_S2V)


def family_of(model_class: str) -> Family | None:
    """The family that a class of the host belongs to; None if no rollout takes it."""
    return next((family for family in FAMILIES if model_class in family.model_classes), None)
