"""When a rollout's cached result must not be replayed: an output is linked that it did not make, it was cut short, or the files it
names are gone.

The host replays a node's outputs as long as its inputs and its fingerprint stay the same. The fingerprint of a rollout is a random
word. It stays that of the newest result as long as that one may be replayed, and is a new one otherwise.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .links import fed_by, linked_slots

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # a host that does not say what it executes: results are replayed as they always were
    get_executing_context = None

_MOST = 512
_lock = threading.Lock()
Asked = tuple[str, str]  # a node, and a digest of its unlinked inputs
Slots = frozenset[int]  # outputs by their index


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


@dataclass(frozen=True)
class _Queued:
    """What a prompt asks of a node: its inputs, and which of the outputs that are made on demand. `word` is the fingerprint that
    it was answered. `done`: it has run for it; `short`: not to the end."""

    asked: Asked
    on_demand: Slots
    linked: Slots
    word: str
    done: bool = False
    short: bool = False


@dataclass(frozen=True)
class _Result:
    """The newest result that was asked for in the same way: the word that it is cached under, the outputs that all results under
    this word have, what it was made from (links.fed_by), its files or folders of frames. Once it is not `whole` it is not
    replayed."""

    word: str
    outputs: Slots
    fed_by: str | None
    files: tuple[Path, ...]
    whole: bool


_queued: _Recent = _Recent()  # place -> _Queued
_results: _Recent = _Recent()  # asked -> _Result


def fingerprint(inputs: dict[str, Any], on_demand: Slots) -> str:
    """For `fingerprint_inputs` of the node at work, whose unlinked inputs are `inputs`. Its outputs `on_demand` are made where they
    are linked, the others always."""
    place = executing()
    if place is None:
        return ""
    text = json.dumps(inputs, sort_keys=True, default=repr)
    asked = (place.node_id, hashlib.sha256(text.encode()).hexdigest())
    linked = _linked(place, on_demand)
    with _lock:
        before, result = _queued.get(place), _results.get(asked)
        replays = result is not None and result.whole and linked <= result.outputs
        if replays and all(path.exists() for path in result.files):
            word = result.word
        elif before is not None and before.asked == asked and before.linked == linked and _unused(before, result):
            word = before.word
        else:
            word = uuid.uuid4().hex
        _queued.put(place, _Queued(asked, on_demand, linked, word))
        return word


def linked_outputs(place: Place | None, on_demand: Slots) -> Slots:
    """Those of the outputs `on_demand` that the node at work has to make: all where no fingerprint of ours guards its result."""
    with _lock:
        queued = _queued.get(place)
    if queued is None:
        return on_demand
    return queued.linked | _linked(place, on_demand)  # what other nodes have added since counts too


def take_kept_files(place: Place | None) -> tuple[Path, ...]:
    """The files of the newest result that was asked for in the same way and made from the same, if the node at work runs again
    because more of its outputs are linked. Else none. They are given once: whoever fails with them begins afresh the next time."""
    made_from = None if place is None else fed_by(*place)
    with _lock:
        queued = _queued.get(place)
        result = None if queued is None else _results.get(queued.asked)
        if result is None or made_from is None or result.fed_by != made_from or queued.linked <= result.outputs:
            return ()
        _results.put(queued.asked, replace(result, fed_by=None))
        return result.files


def finished(place: Place | None, files: list[Path], short: bool, outputs: Slots) -> None:
    """A rollout ended with these files and, of the outputs on demand, these; `short`: before the length that was asked for."""
    made_from = None if place is None else fed_by(*place)
    with _lock:
        queued = _queued.get(place)
        if queued is None:
            return
        again = _results.get(queued.asked)
        if again is not None and again.word == queued.word:
            outputs &= again.outputs
        if queued.done:  # the items of a list, whose files are not told apart
            short, made_from = short or queued.short, None
        _queued.put(place, replace(queued, done=True, short=short))
        _results.put(queued.asked, _Result(queued.word, outputs, made_from, tuple(files), not short))


def _linked(place: Place, on_demand: Slots) -> Slots:
    slots = linked_slots(*place)
    return on_demand if slots is None else slots & on_demand


def _unused(queued: _Queued, result: _Result | None) -> bool:
    """Whether nothing has been made yet under the word of a question, so that it may be answered with it again."""
    return not queued.done and (result is None or result.word != queued.word)
