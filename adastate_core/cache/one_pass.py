"""Anchor and window made again by one pass, whose frames all see each other (LongLive's recache, arXiv 2509.22622).

The window is empty while the pass runs, and the anchor too if it is made again. So the pass's own keys and values need no room
of their own: those that stay lie in the slots that they will have, the others in the slots of a chunk. The commit moves nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from ..anchors import Anchor, AnchorStatic
from ..rope import Layout
from ..shots import NOTHING, staying
from .slots import LayerSlots, Slot, runs

# anchor, pinned frames and window of a layer, as `LayerSlots.take_books` takes them
Books = tuple[dict[int, Slot], "OrderedDict[int, Slot]", "OrderedDict[int, Slot]"]


def goes_with(anchor: Anchor) -> bool:
    """Whether such a pass can make an anchor again: none, or a plain sink; not one that what leaves the window changes."""
    return type(anchor) in (Anchor, AnchorStatic)


@dataclass(frozen=True)
class OnePass:
    """The video's frames `first` .. `end` - 1. The first `anchored` of them go to anchor slots 0, 1, ...; of the others those of
    `pin` (shots.py) and the newest enter the window, as many as it takes, and the rest, a chunk's frames at most, are only seen."""

    first: int
    end: int
    anchored: int
    pin: range = NOTHING

    @staticmethod
    def before(end: int, anchor_frames: int, window_frames: int, chunk_frames: int) -> OnePass:
        """What is made again before the chunk from frame `end` on: all frames that there are, the anchor's among them, as long as
        anchor, window and a chunk have room for them; then as many as window and a chunk have."""
        if end <= anchor_frames + window_frames + chunk_frames:
            return OnePass(0, end, min(end, anchor_frames))
        return OnePass(end - window_frames - chunk_frames, end, 0)

    @property
    def frames(self) -> int:
        return self.end - self.first

    def placed(self, layout: Layout, chunk_frames: int) -> Layout:
        """Positions of the pass: `layout`, but with fixed ones its newest chunk stands where a chunk does."""
        more = max(0, self.frames - chunk_frames)
        return replace(layout, jump=-more) if layout.mode == "fixed" else layout

    def of(self, layer: LayerSlots) -> OnePassLayer:
        """What attention calls of a layer during the pass."""
        return OnePassLayer(layer, self)


class OnePassLayer:
    """A layer in such a pass, with the methods of LayerSlots that attention calls."""

    def __init__(self, layer: LayerSlots, one_pass: OnePass) -> None:
        self.layer, self.one_pass = layer, one_pass
        made = range(one_pass.first + one_pass.anchored, one_pass.end)
        # the frames that stay, by ring slot
        self.staying = staying(made, layer.room.ring_frames, one_pass.pin)
        stays = set(self.staying)
        seen, window = itertools.count(layer.current_start), itertools.count(layer.window_start)
        # the buffer slot of each of the pass's frames
        self.slots = [layer.anchor_index(slot) for slot in range(one_pass.anchored)]
        self.slots += [next(window if frame in stays else seen) for frame in made]

    def write_current(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stage the pass's own rotated keys and values [B, frames * P, width]."""
        for buffer, made in ((self.layer.k, keys), (self.layer.v, values)):
            for slot, frame in zip(self.slots, made.unflatten(1, (len(self.slots), -1)).unbind(1), strict=True):
                buffer[:, slot].copy_(frame)

    def read(self, current_frames: int, layout: Layout | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the anchor, if it is not made again, and of the pass, each [B, tokens, width]: views, or a copy while
        the window and a chunk have room for more frames than there are."""
        layer = self.layer
        read = sorted([*(layer.anchor_index(slot) for slot in layer.anchor), *self.slots])
        places = [slice(run[0], run[-1] + 1) for run in runs(read)]
        if len(places) == 1:
            return layer.read_slots(places[0])
        keys, values = (torch.cat([t[:, place] for place in places], 1).flatten(1, 2) for t in (layer.k, layer.v))
        return keys, values

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After the pass has attended: write the un-rotated keys [B, frames * P, width] and the values of what stays to where the
        layer keeps them. Its books do not name them yet."""
        layer, first = self.layer, self.one_pass.first
        raw = keys.unflatten(1, (self.one_pass.frames, -1))
        for slot in range(self.one_pass.anchored):
            layer.write_anchor(slot, raw[:, slot], layer.v[:, self.slots[slot]])
        for ring, frame in enumerate(self.staying):
            layer.enter(ring, raw[:, frame - first], layer.v[:, layer.window_start + ring])

    def books(self) -> Books:
        """Which frame lies where once the pass is committed."""
        layer = self.layer
        anchor = (
            {slot: Slot(slot) for slot in range(self.one_pass.anchored)} if self.one_pass.first == 0 else layer.anchor
        )
        window = OrderedDict((ring, Slot(frame)) for ring, frame in enumerate(self.staying))
        return anchor, layer.pinned, window
