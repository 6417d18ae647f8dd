"""What a commit will make of a deep sink's layer: as layer_draft.py, for the cache of deep_sink.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .anchors import Anchor
from .deep_sink import DeepLayer
from .layer_draft import write_frame
from .layer_slots import Slot


class DeepDraft:
    """What a commit will make of a deep sink's layer (as LayerDraft): what the chunk did not choose is forgotten in it."""

    def __init__(self, cache: DeepLayer, scratch: torch.Tensor) -> None:
        """`scratch`: what `DeepLayer.scratch` gives."""
        self.cache, self._scratch = cache, scratch
        self.anchor = {slot: replace(entry) for slot, entry in cache.anchor.items()}
        self.window = OrderedDict((i, replace(entry)) for i, entry in cache.window.items())
        self.chosen = cache.chosen
        self.writes: list[Callable[[], object]] = []
        self.left: list[Callable[[], None]] = []

    def fill(self, anchor: Anchor, first_frame: int, content_frames: int, state_frames: int) -> None:
        """Content that a pass staged enters home or the sink, after home has become what the chunk chose."""
        cache = self.cache
        if cache.compressed:
            self._settle()
        for i in range(content_frames):
            source = partial(cache.staged, state_frames + i)
            if (slot := anchor.slot_of(first_frame + i)) is not None:
                self.writes.append(partial(write_frame, cache.write_anchor, slot, source))
                self.anchor[slot] = Slot(first_frame + i)
            else:
                index = self.chosen + len(self.window)
                self.writes.append(partial(write_frame, cache.enter, index, source))
                self.window[index] = Slot(first_frame + i)
        queries = torch.cat([cache.queries, cache.new_queries[:, :content_frames]], 1)
        self.writes.append(partial(cache.queries.copy_, queries[:, queries.shape[1] - cache.recent :]))
        self.writes.append(self._take_books)
        anchor.committed(self, first_frame, content_frames)

    def _settle(self) -> None:
        """Home becomes what is in `staged`."""
        cache = self.cache
        first, count, chosen, staged = len(self.anchor), cache.count, cache.chosen_frames, cache.layer.staged_frames
        index = cache.picked[..., None].expand(-1, -1, cache.plan.width)
        kept = self._scratch.unflatten(1, (chosen, -1)) if chosen else self._scratch[:, :0, None]
        self.writes += [
            partial(torch.gather, cache.raw.flatten(1, 2), 1, index, out=self._scratch),
            partial(cache.raw[:, :chosen].copy_, kept),
            partial(cache.ids.copy_, cache.picked_ids()),
        ]
        for j in range(cache.recent):  # upwards: a frame that is moved lies above all places that are filled before it
            target, source = cache.raw[:, chosen + j], cache.raw[:, count - cache.recent + j]
            self.writes.append(partial(target.copy_, source))
        for i in range(staged):
            for buffer in (cache.k, cache.v):
                target, source = buffer[:, cache.home_index(i)], buffer[:, cache.staged_start + i]
                self.writes.append(partial(target.copy_, source))
        frames = [slot.frame for slot in self.window.values()][len(self.window) - cache.recent :]
        self.window = OrderedDict((i, Slot(f, first + i)) for i, f in zip(range(chosen, staged), frames, strict=True))
        self.chosen = chosen

    def _take_books(self) -> None:
        self.cache.chosen, self.cache.compressed = self.chosen, False
        self.cache.take_books(self.anchor, self.cache.pinned, self.window)
