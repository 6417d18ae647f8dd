"""The statistics of many layers over chunks, with rows held out; only whole chunks count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .moments import FIELDS, Moments

# of a single chunk every fifth token is held out; of several, the last chunk
FIFTH = 5


class Collector:
    """Moments of `layers`: `seen` to fit on, `held_out` to choose by, and the chunk under way, which may be thrown away."""

    def __init__(self, layers: Iterable[int], width: int, blocks: int, device: torch.device) -> None:
        self.layers, self.width, self.blocks, self.device = tuple(layers), width, blocks, device
        self.seen: dict[int, Moments] = {}
        self.held_out: dict[int, Moments] = {}
        self.chunks = 0
        # (seen, held out) of the chunk under way; once there are whole chunks all of it is held out
        self._current: dict[int, tuple[Moments | None, Moments]] = {}

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

    def finish_chunk(self) -> None:
        """The chunk under way is whole: what was held out before it joins what is fitted on."""
        if not self._current:
            return
        for layer, (seen, held) in self._current.items():
            if seen is None:
                self.seen[layer].merge(self.held_out[layer])
            else:
                self.seen[layer] = seen
            self.held_out[layer] = held
        self.chunks += 1
        self._current = {}

    def keep(self, layers: Iterable[int]) -> None:
        """Forget all other layers; these have been collected so far."""
        self.layers = tuple(layers)
        self.seen, self.held_out = ({i: kind[i] for i in self.layers} for kind in (self.seen, self.held_out))

    def _empty(self) -> Moments:
        return Moments.empty(self.width, self.blocks, self.device)

    def state(self) -> dict[str, Any]:
        """Whole chunks' moments as flat tensors, and their number."""
        tensors: dict[str, Any] = {"chunks": self.chunks}
        for kind, moments in (("seen", self.seen), ("held_out", self.held_out)):
            for layer, one in moments.items():
                tensors |= {f"{kind}.{layer}.{name}": t for name, t in one.tensors().items()}
        return tensors

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; ValueError if a tensor is missing or has another shape."""
        self.chunks = state["chunks"]
        if not self.chunks:
            return
        for kind in ("seen", "held_out"):
            target = self.seen if kind == "seen" else self.held_out
            for layer in self.layers:
                moments = self._empty()
                for name in FIELDS:
                    saved, own = state.get(f"{kind}.{layer}.{name}"), getattr(moments, name)
                    if not isinstance(saved, torch.Tensor) or saved.shape != own.shape or saved.dtype != own.dtype:
                        raise ValueError("the state's absorption statistics do not fit its settings: it is damaged")
                    own.copy_(saved)
                target[layer] = moments
