"""Numbers that several nodes ask for, within the bounds that the core has for them (adastate_core/bounds.py)."""

from __future__ import annotations

from typing import Any

from ..adastate_core.bounds import BOUNDS
from ..adastate_core.geometry import LatentSpace
from .host.api import widget
from .host.node import shown


def number(kind: Any, name: str, auto: bool = True, **options: Any) -> Any:
    """An io.Int or io.Float of that name. Its range is the table's, with the value for "what the checkpoint wants" where the
    table has one and `auto` is on; `options` are the widget's, and win."""
    bound = BOUNDS[name]
    least = bound.auto if auto and bound.auto is not None else bound.least
    # the front end counts steps from the least value, so none may lead from it past all the others
    step = {} if bound.step is None or (bound.least - least) % bound.step else {"step": bound.step}
    return widget(kind, name, **({"min": least, "max": bound.most} | step | options))


def check_fps(fps: float | None, *others: float) -> str | None:
    """Why this is no rate, or None: 0 and `others` stand for a model's own; a linked one arrives as None."""
    bound = BOUNDS["fps"]
    if fps is None or fps in (bound.auto, *others) or bound.least <= fps <= bound.most:
        return None
    stand_for = ", ".join(f"{value:g}" for value in (*others, bound.auto))
    return f"fps is {shown(fps)}; it must be {stand_for} or between {bound.least:g} and {bound.most:g}"


def check_size(width: int | None, height: int | None, auto: bool = False) -> str | None:
    """Why a picture cannot have this size, or None; linked numbers arrive as None. `auto`: a side may be 0."""
    for name, value in (("width", width), ("height", height)):
        least, most, step = int(BOUNDS[name].least), int(BOUNDS[name].most), int(BOUNDS[name].step)
        if auto and value == BOUNDS[name].auto:
            continue
        if value is not None and (value < least or value % step or value > most):
            nearest = round(min(max(value, least), most) / step) * step
            bounds = f"at least {least}" if value <= most else f"at most {most}"
            return f"{name} is {shown(value)}; it must be a multiple of {step}, {bounds}: try {nearest}"
    return None


def require_multiples(space: LatentSpace, width: int, height: int, whose: str = "this model") -> None:
    """ValueError, naming the sizes beside it, for a side that a model of `space` cannot have; 0 stands for one not known yet."""
    for name, side in (("width", width), ("height", height)):
        if side % space.multiple:
            below = side - side % space.multiple
            beside = f"{below} or {below + space.multiple}" if below else f"{space.multiple}"
            raise ValueError(f"{name} is {side}; {whose} needs multiples of {space.multiple}: try {beside}")
