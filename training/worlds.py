"""The worlds that clips can be drawn from, by the name that a run's file gives as `world`."""

from __future__ import annotations

from types import ModuleType

from . import journey, world

WORLDS = {"demo": world, "journey": journey}


def world_of(config: dict) -> ModuleType:
    """The module of a run's world, the demo's where its file names none: `Scene.draw`, `render` and `DAY_FRAMES` are there in each.

    ValueError for an unknown name.
    """
    name = config.get("world", "demo")
    if name not in WORLDS:
        raise ValueError(f"world is {name!r}; it must be one of {', '.join(WORLDS)}")
    return WORLDS[name]
