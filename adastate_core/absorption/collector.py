"""The statistics of many layers over chunks, with rows held out; only whole chunks count.

The newest chunk is held out. If it is to lie `apart` from those to fit on, so is the one before it, which then lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from .moments import FIELDS, Moments

# with a single chunk, every fifth token of it is held out; with several, the last chunk is held out
FIFTH = 5
# the parts of the statistics, in the order of their rows
KINDS = ("seen", "between", "held_out")


class Collector:
    """Moments of `layers`: `seen` to fit on, `held_out` to choose by, and `between` what is neither. Those of the chunk under way
    are kept by themselves, to be dropped if it fails."""

    def __init__(
        self, layers: Iterable[int], width: int, blocks: int, device: torch.device, apart: bool = False
    ) -> None:
        self.layers, self.width, self.blocks, self.device = tuple(layers), width, blocks, device
        self.apart, self.chunks = apart, 0
        # layer -> (seen, between or None, held out, whole chunks in them)
        self._whole: dict[int, tuple[Moments, Moments | None, Moments, int]] = {}
        # (seen, held out) of the chunk under way; if there are whole chunks already, all its rows are held out
        self._current: dict[int, tuple[Moments | None, Moments]] = {}

    @property
    def seen(self) -> dict[int, Moments]:
        return {layer: one[0] for layer, one in self._whole.items()}

    @property
    def between(self) -> dict[int, Moments | None]:
        return {layer: one[1] for layer, one in self._whole.items()}

    @property
    def held_out(self) -> dict[int, Moments]:
        return {layer: one[2] for layer, one in self._whole.items()}

    def start_chunk(self) -> None:
        """Forget what a chunk that was not finished has added."""
        self._current = {}

    def add(self, layer: int, local: torch.Tensor, full: torch.Tensor) -> None:
        """Rows of one pass, [B, N, d] each."""
        if layer not in self._current:
            self._current[layer] = None if self.chunks else self._empty(), self._empty()
        seen, held = self._current[layer]
        if seen is None:
            held.add(local.flatten(0, 1), full.flatten(0, 1))
            return
        for first in range(FIFTH):
            part = slice(first, None, FIFTH)
            moments = held if first == FIFTH - 1 else seen
            moments.add(local[:, part].flatten(0, 1), full[:, part].flatten(0, 1))

    def joins(self) -> list[tuple[int, Callable[[], None]]]:
        """(layer, write) for each layer. The write makes the layer's rows of the chunk under way count, and may be called again.
        `close_chunk` comes after all writes."""
        return [(layer, partial(self._join, layer)) for layer in self._current]

    def _join(self, layer: int) -> None:
        """Rows that were held out before join the rows to fit on, or first lie between. The rows of the chunk under way are held
        out instead."""
        chunks = self.chunks + 1
        if layer in self._whole and self._whole[layer][3] == chunks:
            return
        (seen, held), between = self._current[layer], None
        if seen is None:
            seen, leaving, between, _ = self._whole[layer]
            if not self.apart or chunks == 2:  # what was held out of the first chunk is a part of it
                leaving, between = between if leaving is None else leaving.merged(between), None
            seen = seen if leaving is None else seen.merged(leaving)
        self._whole[layer] = seen, between, held, chunks

    def close_chunk(self) -> None:
        """The chunk under way is whole."""
        if self._current:
            self.chunks += 1
            self._current = {}

    def of(self, layers: Iterable[int]) -> Collector:
        """A collector of only these `layers`, with what has been collected so far."""
        kept = Collector(layers, self.width, self.blocks, self.device, self.apart)
        kept.chunks = self.chunks
        kept._whole = {layer: self._whole[layer] for layer in kept.layers}
        return kept

    def _empty(self) -> Moments:
        return Moments.empty(self.width, self.blocks, self.device)

    def state(self) -> dict[str, Any]:
        """Whole chunks' moments as flat tensors, and their number."""
        tensors: dict[str, Any] = {"chunks": self.chunks}
        for kind in KINDS:
            for layer, one in getattr(self, kind).items():
                tensors |= {} if one is None else {f"{kind}.{layer}.{name}": t for name, t in one.tensors().items()}
        return tensors

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; ValueError if a tensor is missing or has another shape."""
        self.chunks = state["chunks"]
        if not self.chunks:
            return
        found: dict[str, dict[int, Moments | None]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for layer in self.layers:
                found[kind][layer] = None
                if kind == "between" and f"{kind}.{layer}.{FIELDS[0]}" not in state:
                    continue
                moments = self._empty()
                for name in FIELDS:
                    saved, own = state.get(f"{kind}.{layer}.{name}"), getattr(moments, name)
                    if not isinstance(saved, torch.Tensor) or saved.shape != own.shape or saved.dtype != own.dtype:
                        raise ValueError("the state's absorption statistics do not fit its settings: it is damaged")
                    own.copy_(saved)
                found[kind][layer] = moments
        self._whole = {i: (*(found[kind][i] for kind in KINDS), self.chunks) for i in self.layers}
