"""What attention asks an absorption for in a pass: full attention in two parts, and the corrections of the switched layers.

The state of the run does not change here. Rows that are collected belong to the chunk under way. They count when the chunk is
committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from ..cache.kv_cache import KVCache
from ..cache.reference_tokens import ReferenceTokens
from ..cache.slots import LayerSlots
from ..rope import Layout, Rope
from .host_history import HostHistory
from .items import Collectors
from .lse import Part, attend_part, merge, rows
from .settings import AbsorptionSettings
from .solve import Correction


@dataclass(frozen=True)
class Trial:
    """What attention does while layers are tried: every layer has its whole past, but for `layer`, which has the local part with
    its `correction` (None: nothing stands in)."""

    layer: int | None = None
    correction: Correction | None = None


class Corrections:
    """The corrections of one run. `standing`: those of the switched layers, in the compute dtype on the device. `histories`: the
    frames that watched layers have lost. `collector`: if there is one, it takes the rows of all layers before the switch, and of
    the watched layers after it."""

    def __init__(self, settings: AbsorptionSettings, cache: KVCache, pinned: int, rope: Rope) -> None:
        """`pinned`: a switched layer keeps the frames of its window whose video index is below this number."""
        self.settings, self.cache, self.pinned, self.rope = settings, cache, pinned, rope
        self.switched = False
        # tokens that every pass sees, and no layer forgets
        self.reference: ReferenceTokens | None = None
        self.collector: Collectors | None = None
        # what is tried in the passes of now, if anything is
        self.trial: Trial | None = None
        self.standing: dict[int, Correction] = {}
        self.histories: dict[int, HostHistory] = {}

    def parts(self, layer: LayerSlots, current_frames: int, hidden: int = 0) -> tuple[list[slice], list[slice]]:
        """(local, history) as runs of the layer's buffer slots, without the newest `hidden` frames of the window."""
        return layer.parts(current_frames, self.settings.local_window_frames, self.pinned, hidden)

    def attend(self, layer: int, q: torch.Tensor, current_frames: int, layout: Layout) -> torch.Tensor | None:
        """This layer's output, if the absorption has to make it, else None. q [B, N, width] is rotated like the keys."""
        if self.trial is not None:
            return self._tried(self.trial, layer, q, current_frames, layout.again)
        if self.collector is None:
            return None
        if not self.switched:
            return self.collect(layer, q, current_frames)
        if layer in self.histories and len(self.histories[layer]):
            local = self._near(layer, q, self.parts(self.cache.layers[layer], current_frames)[0])
            most = self.cache.plan.block_frames
            past = self.histories[layer].read(layout, self.rope, self.cache.heads, self.cache.device, most)
            full = merge(local, attend_part(q, *past, self.cache.heads))
            self.collector.add(layer, rows(local), rows(full))
        return None

    def correct(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """A layer's attention output `out`, with its correction for what the layer can no longer see. Layers without a correction
        get `out` back."""
        correction = self.standing.get(layer)
        return out if correction is None else correction.apply(out)

    def collect(self, layer: int, q: torch.Tensor, current_frames: int) -> torch.Tensor:
        """Full attention, made of both parts; the rows of both go into the statistics."""
        near, far = self.parts(self.cache.layers[layer], current_frames)
        local = self._near(layer, q, near)
        full = merge(local, self._local(layer, q, far))
        self.collector.add(layer, rows(local), rows(full))
        return rows(full)

    def _tried(self, trial: Trial, layer: int, q: torch.Tensor, current_frames: int, hidden: int) -> torch.Tensor:
        """Attention over a past without its newest `hidden` frames: whole, or of the layer that is tried its local part with the
        correction."""
        near, far = self.parts(self.cache.layers[layer], current_frames, hidden)
        if layer != trial.layer:
            return rows(self._near(layer, q, near + far))
        local = rows(self._near(layer, q, near))
        return local if trial.correction is None else trial.correction.apply(local)

    def _near(self, layer: int, q: torch.Tensor, slots: list[slice]) -> Part:
        """Attention to these slots and to the reference."""
        local = self._local(layer, q, slots)
        if self.reference is None:
            return local
        return merge(local, attend_part(q, *self.reference.read(layer), self.cache.heads))

    def _local(self, layer: int, q: torch.Tensor, slots: list[slice]) -> Part:
        cache = self.cache.layers[layer]
        return reduce(merge, [attend_part(q, *cache.read_slots(part), self.cache.heads) for part in slots])
