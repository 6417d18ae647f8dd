"""One layer's cache with everything in the compute dtype on the device: keys are rotated where they lie.

Each layer has one K and one V buffer of fixed size, laid out in latent frames as

    [ anchor, filled from the right | current: state, content | window, a ring filled from the left ]

so that what a query may read is always one slice, with no mask and no concatenation: an anchor is only partly
filled while the window is still empty. Attention does not depend on the order of its keys.

Keys are rotated once a chunk, and only if their position changed. Where a frame will have to be rotated again later (a
relative window that keeps it for more than a chunk, an anchor that blends evicted frames), an un-rotated copy is kept, so a
key is always exactly one rotation away from the raw one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..anchors import Anchor, Source
from ..rope import Layout, Rope, Turn
from .byte_plan import CachePlan, LayerSpec
from .enter_leave import LayerDraft
from .host_copies import Frames, HostCopies, place
from .slots import LayerSlots, LayerSnapshot, Slot, Turned, blocks, runs, with_copies


@dataclass(frozen=True)
class RotatedSpec(LayerSpec):
    """`keep_raw`: an un-rotated copy of the window's keys. `raw_anchor`: the anchor's keys stay un-rotated, and a pass turns
    them when it reads them."""

    keep_raw: bool = False
    raw_anchor: bool = False

    @staticmethod
    def of(
        anchor: Anchor, window_frames: int, chunk_frames: int, positions: str, shares_window: bool = False
    ) -> RotatedSpec:
        """What an anchor policy and a window need under a position mode. Where a pass `shares_window`, the window stands still
        and the anchor moves from pass to pass."""
        moves = positions != "absolute" and not shares_window
        return RotatedSpec(
            anchor.frames,
            window_frames,
            keep_raw=window_frames > 0 and (moves and window_frames > chunk_frames or anchor.takes_evicted),
            blend_frames=anchor.frames if anchor.blends else 0,
            replay_frames=anchor.replay_frames,
            raw_anchor=shares_window,
        )

    def small(self, window_frames: int, pinned_frames: int) -> RotatedSpec:
        keep_raw = self.keep_raw and window_frames + pinned_frames > 0
        return replace(self, window_frames=window_frames, pinned_frames=pinned_frames, keep_raw=keep_raw)

    def bytes(self, plan: CachePlan) -> dict[str, int]:
        kept = (self.anchor_frames + self.ring_frames) * plan.frame_bytes
        return {
            "k": kept,
            "v": kept,
            "rotated_copy": self.ring_frames * plan.frame_bytes if self.keep_raw else 0,
            "current": 2 * plan.current_frames * plan.frame_bytes,
            "ema": plan.blended_bytes(self.blend_frames),
            "replay": self.replay_bytes(plan),
        }

    def build(self, plan: CachePlan, device: torch.device, workspace: Any, room: RotatedSpec) -> RotatedLayer:
        return RotatedLayer(plan, self, device, room)


class RotatedLayer(LayerSlots):
    """One layer's buffers in the compute dtype, on the model's device. Mutable, private to one run."""

    def __init__(
        self,
        plan: CachePlan,
        layer: RotatedSpec,
        device: torch.device,
        room: RotatedSpec,
        old: RotatedLayer | None = None,
    ) -> None:
        super().__init__(plan, layer, device, room, old)
        slots = layer.anchor_frames + plan.current_frames + room.ring_frames
        frame = (plan.tokens, plan.width)
        self.k = torch.zeros((plan.batch, slots, *frame), dtype=plan.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.raw = self._buffer(room.ring_frames, plan.dtype) if layer.keep_raw else None
        self.blend_k, self.blend_v = (None, None) if old is None else (old.blend_k, old.blend_v)
        if old is None and layer.blend_frames:
            self.blend_k, self.blend_v = (self._buffer(layer.blend_frames, torch.float32) for _ in range(2))
        self._anchor_turn: Turn | None = None

    def _buffer(self, frames: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(
            (self.plan.batch, frames, self.plan.tokens, self.plan.width), dtype=dtype, device=self.k.device
        )

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated, by the plan's names."""
        frame = self.k[:, :1].nbytes
        current = self.plan.current_frames * frame
        return {
            "k": self.k.nbytes - current,
            "v": self.v.nbytes - current,
            "rotated_copy": 0 if self.raw is None else self.raw.nbytes,
            "current": 2 * current,
            "ema": 0 if self.blend_k is None else self.blend_k.nbytes + self.blend_v.nbytes,
            "replay": 0 if self.first_frames is None else self.first_frames.nbytes,
        }

    def turns(self, layout: Layout, rope: Rope, heads: int) -> Iterator[Callable[[], None]]:
        """Writes that bring every cached key to its position in `layout`, one after another; only where it changed."""
        self._rope = rope
        anchor, window = self.wanted(layout)
        if self.layer.raw_anchor:
            self._anchor_turn = rope.turn(None, [anchor[slot][1] for slot in sorted(anchor)]) if anchor else None
        else:
            yield from self._turns(anchor, 0, self.blend_k, rope, heads)
        yield from self._turns(window, self.window_start, self.raw, rope, heads)

    def _turns(
        self, entries: dict[int, tuple[Slot, float]], start: int, raw: torch.Tensor | None, rope: Rope, heads: int
    ) -> Iterator[Callable[[], None]]:
        """Keys at `start + offset`, from `raw` (same offsets) if there is one, else in place. In blocks (plan.block_frames),
        whatever the length of the window.

        A key that is rotated already and has no raw copy is turned by the difference.
        """
        moved = {o: (e, to) for o, (e, to) in sorted(entries.items()) if e.position != to}
        for run in runs(list(moved)):
            for part in blocks(run, [moved[o][1] for o in run], self.plan.block_frames):
                block = run[part]
                offsets = slice(block[0], block[-1] + 1)
                target = self.k[:, start + offsets.start : start + offsets.stop]
                source = target if raw is None else raw[:, offsets]
                came = None if raw is not None else [moved[o][0].position for o in block]
                turn = rope.turn(came, [moved[o][1] for o in block])
                turned = rope.turned(source.flatten(1, 2).unflatten(-1, (heads, -1)), turn)
                lost = block if raw is None and start else ()
                yield Turned(target, turned.reshape(target.shape), [moved[o] for o in block], lost)

    def anchor_keys(self, slots: slice) -> torch.Tensor:
        keys = self.k[:, slots]
        if not self.layer.raw_anchor:
            return keys
        keys = (keys if self.blend_k is None else self.blend_k[:, slots]).to(keys)
        rows = keys.flatten(1, 2).unflatten(-1, (self.plan.heads, -1))
        return Rope.rotate(rows, self._anchor_turn).reshape(keys.shape)

    def current_slots(self, frames: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.plan.batch != 1:
            return None
        start = self.current_start
        keys, values = (t[0, start : start + frames].flatten(0, 1).unsqueeze(0) for t in (self.k, self.v))
        return keys, values

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: what is staged to be cached are the un-rotated keys."""
        frames = keys.shape[1] // self.plan.tokens
        self.k[:, self.current_start : self.current_start + frames].copy_(keys.unflatten(1, (frames, -1)))

    def _carry(self, old: RotatedLayer, ring: int, to: int) -> None:
        places = zip(self._places(to), old._places(ring), strict=True)
        for (target, index), (source, came) in places:
            target[:, index].copy_(source[:, came])

    def _carry_anchor(self, old: RotatedLayer, slot: int) -> None:
        to, came = self.anchor_index(slot), old.anchor_index(slot)
        self.k[:, to].copy_(old.k[:, came])
        self.v[:, to].copy_(old.v[:, came])

    def draft(self, scratch: torch.Tensor | None) -> LayerDraft:
        return LayerDraft(self, scratch)

    def staged(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.current_start + frame
        return self.k[:, index], self.v[:, index]

    def leaving(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        raw = self.k[:, self.window_start + ring] if self.raw is None else self.raw[:, ring]
        return raw, self.v[:, self.window_start + ring]

    def shown(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.leaving(ring)

    def shown_position(self, slot: Slot) -> float | None:
        return slot.position if self.raw is None else None

    def enter(self, ring: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.k[:, self.window_start + ring].copy_(key)
        self.v[:, self.window_start + ring].copy_(value)
        if self.raw is not None:
            self.raw[:, ring].copy_(key)

    def _take(self, ring: int) -> list[torch.Tensor]:
        return [buffer[:, index].clone() for buffer, index in self._places(ring)]

    def _place(self, ring: int, taken: list[torch.Tensor]) -> None:
        for (buffer, index), one in zip(self._places(ring), taken, strict=True):
            buffer[:, index].copy_(one)

    def _places(self, ring: int) -> list[tuple[torch.Tensor, int]]:
        """Where a ring slot's key, value and raw key lie."""
        index = self.window_start + ring
        return [(self.k, index), (self.v, index), *([(self.raw, ring)] if self.raw is not None else [])]

    def _anchor_buffers(self) -> list[torch.Tensor]:
        places = [t[:, : self.layer.anchor_frames] for t in (self.k, self.v)]
        return places + ([] if self.blend_k is None else [self.blend_k, self.blend_v])

    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        self.k[:, index].copy_(key)
        self.v[:, index].copy_(value)
        if self.blend_k is not None:
            self.blend_k[:, index].copy_(key)
            self.blend_v[:, index].copy_(value)

    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        if self.blend_k is None:
            self._blend_in_place(slot, (self.k[:, index], self.v[:, index]), source, weight, scratch)
            return
        for held, one, (raw, out) in zip((self.blend_k, self.blend_v), source(), scratch, strict=True):
            torch.lerp(held[:, index], raw.copy_(one), weight, out=out)

    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        if self.blend_k is None:
            self.k[:, index].copy_(scratch[0, 1])
        else:
            self.blend_k[:, index].copy_(scratch[0, 1])
            self.blend_v[:, index].copy_(scratch[1, 1])
        self.v[:, index].copy_(scratch[1, 1])

    def _order(self, anchor_slots: tuple[int, ...], ring_slots: tuple[int, ...]) -> list[int]:
        return [self.anchor_index(s) for s in anchor_slots] + [self.window_start + r for r in ring_slots]

    def snapshot(self, copies: HostCopies) -> LayerSnapshot:
        rings = (*self.pinned, *self.window)
        order = self._order(tuple(self.anchor), rings)
        parts: dict[str, Frames] = {"keys": (self.k, order), "values": (self.v, order)}
        if self.raw is not None:
            parts["raw"] = self.raw, rings
        if self.blend_k is not None:
            parts |= {"blend_keys": (self.blend_k, None), "blend_values": (self.blend_v, None)}
        return self._snapshot_of(parts, copies)

    def restore(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot of a layer with the same plan; the snapshot stays as it is."""
        saved = with_copies(saved, self.raw is not None, self.blend_k is not None)
        frame = (self.plan.tokens, self.plan.width)
        kept = (self.plan.batch, len(saved.frames), *frame)
        shapes = {"keys": kept, "values": kept}
        if self.raw is not None:
            shapes["raw"] = (self.plan.batch, len(saved.ring_slots), *frame)
        if self.blend_k is not None:
            shapes |= dict.fromkeys(("blend_keys", "blend_values"), tuple(self.blend_k.shape))
        self._check(saved, shapes)
        self._adopt(saved)
        order = self._order(saved.anchor_slots, saved.ring_slots)
        place(self.k, order, saved.tensors["keys"])
        place(self.v, order, saved.tensors["values"])
        if self.raw is not None:
            place(self.raw, saved.ring_slots, saved.tensors["raw"])
        if self.blend_k is not None:
            self.blend_k.copy_(saved.tensors["blend_keys"])
            self.blend_v.copy_(saved.tensors["blend_values"])
