"""The draft of a commit to one layer: its future books (which frame lies in which slot), and the writes that put the frames there.

Making a draft does not change the layer. All that can fail happens then: the anchor's policy, copies to the CPU. The writes
read what the pass has staged and what the layer holds. A write that fails half way may be run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..anchors import Anchor, Source
from ..shots import NOTHING
from .slots import LayerSlots, Slot

Write = Callable[[], object]


class LayerDraft:
    """A layer as an anchor's policy sees it while a chunk is committed (anchors.LayerView). What the policy asks for is done later,
    when the `writes` run in order. When all of them have run, each of `left` is called."""

    def __init__(self, cache: LayerSlots, scratch: torch.Tensor | None) -> None:
        """`scratch` [2, 2, B, P, width] float32: where a blended anchor slot is computed before it is written."""
        self.cache, self.layer, self._scratch = cache, cache.layer, scratch
        self.anchor, self.pinned, self.window = (
            type(held)((place, replace(slot)) for place, slot in held.items())
            for held in (cache.anchor, cache.pinned, cache.window)
        )
        # the frame that left the window first, if one has left
        self.first_left: int | None = None
        # the frames that a shot pins, and which of them do not leave this layer
        self._pin = self._stays = NOTHING
        self.left: list[Callable[[], None]] = []
        self._writes: list[Write] = []
        self._kept: list[Write] = []
        # ring slot -> what this commit puts there in the end; a frame that enters and leaves in one commit is never written
        self._entering: dict[int, Source] = {}

    @property
    def held(self) -> int:
        return len(self.pinned) + len(self.window)

    @property
    def writes(self) -> list[Write]:
        """All writes in order. The anchor's come first, because the frames that it takes from the window are still there then."""
        enter = [partial(write_frame, self.cache.enter, ring, source) for ring, source in self._entering.items()]
        return [*self._writes, *self._kept, *enter, self._take_books]

    def _take_books(self) -> None:
        self.cache.take_books(self.anchor, self.pinned, self.window)

    def fill(
        self,
        anchor: Anchor,
        first_frame: int,
        content_frames: int,
        state_frames: int,
        pin: range = NOTHING,
        keeps: bool = True,
    ) -> None:
        """Content that a pass staged enters, the oldest leave, then the policy sets the anchor. The frames of `pin` do not leave
        (shots.py), if the layer `keeps` them."""
        self._pin, self._stays = pin, pin if keeps else NOTHING
        frames = range(first_frame, first_frame + content_frames)
        slots = {f: anchor.slot_of(f) for f in frames}
        slots = {f: slot for f, slot in slots.items() if slot is not None and slot < self.layer.anchor_frames}
        pinned = {slot.frame for slot in self.pinned.values()}
        entering = [f for f in frames if f not in slots and f not in pinned]
        leaving = max(0, self.held + len(entering) - self.layer.ring_frames)
        left = 0
        for i, frame in enumerate(frames):
            source = partial(self.cache.staged, state_frames + i)
            if frame in slots:
                self.set_anchor(slots[frame], frame, source)
            elif frame in entering:
                left += self._push(anchor, frame, source, (left, leaving))
        if state_frames and self.layer.anchor_frames:
            anchor.state_committed(self, [partial(self.cache.staged, i) for i in range(state_frames)], first_frame)
        anchor.committed(self, first_frame, content_frames)

    def _push(self, anchor: Anchor, frame: int, source: Source, place: tuple[int, int]) -> bool:
        """Put a frame into the window. Returns whether a frame left for it; `place` is (its number, how many leave in all)."""
        if self.layer.window_frames == 0:
            self._leaves(frame)
            anchor.evicted(self, frame, source, place)
            self._tell(frame, None, source)
            return True
        ring = self.held
        full = ring == self.layer.ring_frames
        if full:
            ring, oldest = next(item for item in self.window.items() if item[1].frame not in self._stays)
            self._leaves(oldest.frame)
            if (just_came := self._entering.get(ring)) is not None:
                raw = shown = partial(self.cache.as_stored, just_came)
                position = None
            else:
                raw, shown = partial(self.cache.leaving, ring), partial(self.cache.shown, ring)
                position = self.cache.shown_position(oldest)
            self._tell(oldest.frame, position, shown)
            if anchor.takes_evicted:
                anchor.evicted(self, oldest.frame, raw, place)
            del self.window[ring]
        self._entering[ring] = source
        self.window[ring] = Slot(frame)
        return full

    def _leaves(self, frame: int) -> None:
        self.first_left = frame if self.first_left is None else self.first_left

    def _tell(self, frame: int, position: float | None, source: Source) -> None:
        if self.cache.on_evict is not None:
            key, value = (t.to(self.cache.plan.dtype) for t in source())
            self.left.append(self.cache.on_evict(frame, position, key, value, self._pin))

    @property
    def window_frames(self) -> int:
        return self.layer.window_frames

    def frame_in(self, slot: int) -> int | None:
        """The video frame that an anchor slot stands for, or None while it is empty."""
        held = self.anchor.get(slot)
        return None if held is None else held.frame

    def clear_anchor(self) -> None:
        """Empty every anchor slot."""
        self.anchor.clear()

    def set_anchor(self, slot: int, frame: int, source: Source) -> None:
        """Put a raw key and value [B, P, width] into an anchor slot."""
        self._writes.append(partial(write_frame, self.cache.write_anchor, slot, source))
        self.anchor[slot] = Slot(frame)

    def blend_anchor(self, slot: int, source: Source, weight: float) -> None:
        """Move an anchor slot by `weight` towards a raw key and value [B, P, width]."""
        self._writes.append(partial(self.cache.blend, slot, source, weight, self._scratch))
        self._writes.append(partial(self.cache.write_blended, slot, self._scratch))
        self.anchor[slot].position = self.cache.blended_position(self.anchor[slot])

    def keep_first(self, first_frame: int, content_frames: int) -> None:
        """Keep raw keys and values of those staged content frames that are among the first `replay_frames`."""
        for i in range(min(content_frames, self.layer.replay_frames - first_frame)):
            source = partial(self.cache.staged, self.cache.plan.state_frames + i)
            self._kept.append(partial(write_frame, self.cache.write_first, first_frame + i, source))

    def replay(self, source: int, frame: int) -> None:
        """Put the kept first frame `source` in the place, and at the positions, of window frame `frame`, unless a shot pins it."""
        if frame in self._stays:
            return
        ring = next((ring for ring, slot in self.window.items() if slot.frame == frame), None)
        if ring is not None:
            self._entering[ring] = partial(self.cache.first_frame, source)
            self.window[ring].position = None


def write_frame(write: Callable[[int, torch.Tensor, torch.Tensor], None], place: int, source: Source) -> None:
    """Have a frame's key and value made and written to a slot."""
    write(place, *source())
