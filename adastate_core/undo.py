"""What brings a past back to what it was before a chunk's preparation, without a copy of its cache.

A flush moves the newest frames to the window's first slots; those that were there change places with them, and nothing else
is written before the chunk's commit. So frames and books change back. What commits frames again (a recache, a restart) makes
the window from the recent latents, the hidden state, the anchor and the prompt: an undone one leaves the window empty, and the
past notes how many of the newest latents have to be committed again before the next chunk. Copies are made only of what cannot
be made again: keys that are turned in place, and the anchor where committing again changes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from .cache.kv_cache import KVCache
from .cache.slots import LayerSlots, Slot, Turned
from .cache.steps import Step
from .standing import Standing


class Exchange:
    """The newest `keep` frames of a layer's window on their way to its first slots, whose frames take their places."""

    def __init__(self, index: int, layer: LayerSlots, keep: int) -> None:
        self.index, self.layer, self._before = index, layer, layer.window_books()
        newest = list(layer.window.items())[max(0, len(layer.window) - keep) :]
        first = len(layer.pinned)
        self._after = OrderedDict((first + i, slot) for i, (_, slot) in enumerate(newest))
        to = dict(zip((ring for ring, _ in newest), self._after, strict=True))
        left, filled = [r for r in to if r not in self._after], [r for r in self._after if r not in to]
        # each slot whose frame moves, and where it moves to
        self._to = {ring: place for ring, place in (to | dict(zip(filled, left, strict=True))).items() if ring != place}
        self._taken: dict[int, list[torch.Tensor]] = {}
        self._made = False

    def make(self) -> None:
        """Move them. If it fails on the way, `back` still leads to where they were."""
        self._take(self._to)
        for ring, place in self._to.items():
            self.layer._place(place, self._taken[ring])
        self.layer.take_window(self._after)
        self._made, self._taken = True, {}

    def _take(self, rings: Sequence[int] | dict[int, int]) -> None:
        self._taken = {ring: self.layer._take(ring) for ring in rings}

    def back(self) -> list[Step]:
        """Steps that bring every frame back to its slot."""
        writes: list[Callable[[], object]] = []
        if self._made:
            came = {place: ring for ring, place in self._to.items()}
            writes = [partial(self._take, came), *(partial(self._put, place, ring) for place, ring in came.items())]
        else:
            writes = [partial(self._put, ring, ring) for ring in self._taken]
        return [Step(self.index, write) for write in (*writes, self._returned)]

    def _put(self, taken: int, ring: int) -> None:
        self.layer._place(ring, self._taken[taken])

    def _returned(self) -> None:
        """Every frame is back; what was taken of one layer is let go before the next one's is."""
        self.layer.take_window(*self._before)
        self._taken = {}


@dataclass(frozen=True)
class _Key:
    """A key that was turned in place: of which ring slot, as it was, and where it was rotated to."""

    index: int
    layer: LayerSlots
    ring: int
    key: torch.Tensor
    position: float | None


@dataclass(frozen=True)
class _Aside:
    """What committing frames again changes of a layer beside its window: tensors, and the anchor's books if it changes."""

    index: int
    layer: LayerSlots
    copies: list[torch.Tensor]
    anchor: dict[int, Slot] | None

    @staticmethod
    def of(index: int, layer: LayerSlots, anchor_too: bool) -> _Aside:
        copies = [t.to("cpu", copy=True) for t in layer.beside_window(anchor_too)]
        return _Aside(index, layer, copies, _books(layer.anchor) if anchor_too else None)

    def put_back(self) -> None:
        for held, one in zip(self.layer.beside_window(self.anchor is not None), self.copies, strict=True):
            held.copy_(one)
        if self.anchor is not None:
            self.layer.anchor = _books(self.anchor)


def _books(anchor: dict[int, Slot]) -> dict[int, Slot]:
    return {slot: replace(entry) for slot, entry in anchor.items()}


@dataclass
class Undo:
    """What `Past.rewind` goes back to: how far the rollout was, what its observer marked, and what was changed since.

    `again`: so many of the newest latents have to be committed again, because their window is lost (0: it is not).
    """

    now: Standing
    observer: Any = None
    again: int = 0
    _moved: list[Exchange] = field(default_factory=list)
    _turned: dict[tuple[int, int], _Key] = field(default_factory=dict)
    _aside: list[_Aside] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies, which are on the CPU."""
        aside = sum(t.nbytes for one in self._aside for t in one.copies)
        return aside + sum(one.key.nbytes for one in self._turned.values())

    def moves(self, exchange: Exchange) -> None:
        """Frames are about to change places."""
        self._moved.append(exchange)

    def turns(self, index: int, layer: LayerSlots, turned: object) -> None:
        """Keys are about to be turned. Those of the ring that have no raw copy are kept, as far as they are not made again."""
        if not isinstance(turned, Turned):
            return
        for i, ring in enumerate(turned.in_place):
            key = id(layer), ring
            if key not in self._turned and (not self.again or ring in layer.pinned):
                copy = turned.target[:, i].to("cpu", copy=True)
                self._turned[key] = _Key(index, layer, ring, copy, turned.moved[i][0].position)

    def commits_again(self, frames: int, caches: Sequence[KVCache], anchor_too: bool) -> None:
        """The window is about to be made from the newest `frames` latents. `anchor_too`: the anchor changes as well."""
        if not self._aside:
            self._aside = [_Aside.of(index, layer, anchor_too) for cache in caches for index, layer in enumerate(cache)]
        self.again = frames

    def steps(self, caches: Sequence[KVCache]) -> list[Step]:
        """The way back. Each step may be run again."""
        steps = [
            Step(one.index, partial(one.layer.turn_back, one.ring, one.key, one.position))
            for one in self._turned.values()
        ]
        if not self.again:
            return steps + [step for exchange in reversed(self._moved) for step in exchange.back()]
        for cache in caches:
            steps += [Step(i, partial(layer.take_window, OrderedDict())) for i, layer in enumerate(cache)]
        return steps + [Step(one.index, one.put_back) for one in self._aside]
