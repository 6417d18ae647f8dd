"""Policies of other packs: ADASTATE_PACKS names their folders, as PATH does, and they are held to what the pack promises."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

from adastate_core import extend
from adastate_core.anchors import KINDS, OWN_KINDS


@functools.cache
def others() -> tuple[str, ...]:
    """The kinds that the packs registered."""
    sys.modules["adastate"] = extend
    for folder in filter(None, os.environ.get("ADASTATE_PACKS", "").split(os.pathsep)):
        load_pack(Path(folder)).adastate_register()
    return tuple(kind for kind in KINDS if kind not in OWN_KINDS)


def load_pack(folder: Path):
    """A pack's module, as the host loads it."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
