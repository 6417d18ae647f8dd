"""What others add to the pack: packs that build on it, and presets as TOML in the user's folder.

Another pack has a function `adastate_register` in its `__init__.py`. It is called with no arguments once all packs are loaded,
whichever came first, and finds the pack's `register` in the module `adastate` (adastate_core/extend.py).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import folder_paths
from aiohttp import web

from ...adastate_core import extend
from ...adastate_core.weights.preset_file import read_preset
from ...adastate_core.weights.presets import OWN_PRESETS, PRESETS, register_preset
from .safely import attempt
from .server import prompt_server

log = logging.getLogger("adastate")
HOOK = "adastate_register"
MODULE = "adastate"

_called: set[int] = set()
_read: dict[Path, tuple[int, int]] = {}
# which presets came from which file
_from_file: dict[Path, str] = {}


def offer() -> None:
    """Let other packs import what they build on as `adastate`."""
    sys.modules[MODULE] = extend


def when_all_are_loaded() -> None:
    """Call the packs' hooks once the server starts, which it does when it has loaded every pack."""
    server = prompt_server()
    if server is not None:

        async def call(_: web.Application) -> None:
            call_packs()

        server.app.on_startup.append(call)


def call_packs() -> None:
    """Call every loaded pack's hook that was not called yet. One that fails is logged, and the others are called."""
    for module in list(sys.modules.values()):
        hook = getattr(module, "__dict__", {}).get(HOOK)
        if callable(hook) and id(hook) not in _called:
            _called.add(id(hook))
            attempt(f"what {getattr(module, '__name__', 'a pack')} adds to AdaState could not be registered", hook)


def presets_folder() -> Path:
    """Where the user's own presets lie."""
    return Path(folder_paths.get_user_directory()) / "adastate" / "presets"


def preset_names() -> list[str]:
    """All presets that are known, those of files that were added or changed meanwhile among them."""
    _read_presets()
    return list(PRESETS)


def _read_presets() -> None:
    folder = presets_folder()
    found = {path: _stamp(path) for path in sorted(folder.glob("*.toml"))} if folder.is_dir() else {}
    if found == _read:
        return
    for path in list(_from_file):
        if found.get(path) != _read.get(path):
            PRESETS.pop(_from_file.pop(path), None)
    for path, stamp in found.items():
        if _read.get(path) == stamp and path in _from_file:
            continue
        try:
            one = read_preset(path)
            if one.name in PRESETS and one.name not in OWN_PRESETS:
                raise ValueError(f"{path.name} has the name {one.name}, which another preset has; give it another name")
            _from_file[path] = register_preset(one).name
        except (OSError, ValueError) as error:
            log.warning("A preset of the user's folder is left out: %s", error)
    _read.clear()
    _read.update(found)


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size
