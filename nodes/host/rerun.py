"""When a rollout's cached result must not be replayed: it was cut short, or the files it names are gone.

The host replays a node's outputs as long as its inputs and its fingerprint stay the same. The fingerprint of a rollout is
empty until then, and changes once for each such result.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # a host that does not say what it executes: results are replayed as they always were
    get_executing_context = None

_MOST = 512
_lock = threading.Lock()


class Place(NamedTuple):
    """Which node of which queued prompt is at work."""

    prompt_id: str
    node_id: str


def executing() -> Place | None:
    """The node that the host executes in this thread, or None outside the host's executor."""
    context = get_executing_context() if get_executing_context is not None else None
    return None if context is None else Place(str(context.prompt_id), str(context.node_id))


class _Recent(OrderedDict):
    """A dict of the newest entries."""

    def put(self, key: Any, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > _MOST:
            self.popitem(last=False)


_asked: _Recent = _Recent()  # place -> what was asked for there
_marks: _Recent = _Recent()  # what was asked for -> the fingerprint, once it is not empty any more
_files: _Recent = _Recent()  # what was asked for -> the files of its newest result


def fingerprint(inputs: dict[str, Any]) -> str:
    """For `fingerprint_inputs` of the node at work, whose unlinked inputs are `inputs`."""
    place = executing()
    if place is None:
        return ""
    text = json.dumps(inputs, sort_keys=True, default=repr)
    asked = (place.node_id, hashlib.sha256(text.encode()).hexdigest())
    with _lock:
        _asked.put(place, asked)
        if any(not path.is_file() for path in _files.get(asked, ())):
            _files.pop(asked)
            _marks.put(asked, uuid.uuid4().hex)
        return _marks.get(asked, "")


def finished(place: Place | None, files: list[Path], short: bool) -> None:
    """A rollout ended with these files; `short`: before the length that was asked for."""
    with _lock:
        asked = _asked.get(place)
        if asked is None:
            return
        _files.put(asked, tuple(files))
        if short:
            _marks.put(asked, uuid.uuid4().hex)
