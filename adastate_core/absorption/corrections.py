"""What attention asks an absorption for in a pass: full attention in two parts, and what the switched layers get put back.

Nothing of the run moves here. Rows that are collected belong to the chunk under way, and count once it is committed.
"""

from __future__ import annotations

from functools import reduce

import torch

from ..cache.kv_cache import KVCache
from ..cache.slots import LayerSlots
from ..rope import Layout, Rope
from .collector import Collector
from .host_history import HostHistory
from .lse import Part, attend_part, merge, rows
from .settings import AbsorptionSettings
from .solve import Correction


class Corrections:
    """One run's. `standing` are the corrections of switched layers, in the compute dtype on the device; `histories` what
    watched ones have lost; `collector`, while there is one, takes the rows of all layers or, after the switch, of those."""

    def __init__(self, settings: AbsorptionSettings, cache: KVCache, pinned: int, rope: Rope) -> None:
        """`pinned`: the video's first frames that a switched layer keeps in its window, those below this index."""
        self.settings, self.cache, self.pinned, self.rope = settings, cache, pinned, rope
        self.switched = False
        self.collector: Collector | None = None
        self.standing: dict[int, Correction] = {}
        self.histories: dict[int, HostHistory] = {}

    def parts(self, layer: LayerSlots, current_frames: int) -> tuple[list[slice], list[slice]]:
        """(local, history) as runs of the layer's buffer slots."""
        return layer.parts(current_frames, self.settings.local_window_frames, self.pinned)

    def attend(self, layer: int, q: torch.Tensor, current_frames: int, layout: Layout) -> torch.Tensor | None:
        """This layer's output if it is the absorption's to make, else None. q [B, N, width] rotated, as keys are."""
        if self.collector is None:
            return None
        if not self.switched:
            return self.collect(layer, q, current_frames)
        if layer in self.histories and len(self.histories[layer]):
            local = self._local(layer, q, self.parts(self.cache.layers[layer], current_frames)[0])
            past = self.histories[layer].read(layout, self.rope, self.cache.heads, self.cache.device)
            full = merge(local, attend_part(q, *past, self.cache.heads))
            self.collector.add(layer, rows(local), rows(full))
        return None

    def correct(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """What a layer's attention gave, with what it can no longer see put back; as it was for other layers."""
        correction = self.standing.get(layer)
        return out if correction is None else correction.apply(out)

    def collect(self, layer: int, q: torch.Tensor, current_frames: int) -> torch.Tensor:
        """Full attention, made of both parts; the rows of both go into the statistics."""
        near, far = self.parts(self.cache.layers[layer], current_frames)
        local = self._local(layer, q, near)
        full = merge(local, self._local(layer, q, far))
        self.collector.add(layer, rows(local), rows(full))
        return rows(full)

    def _local(self, layer: int, q: torch.Tensor, slots: list[slice]) -> Part:
        cache = self.cache.layers[layer]
        return reduce(merge, [attend_part(q, *cache.read_slots(part), self.cache.heads) for part in slots])
