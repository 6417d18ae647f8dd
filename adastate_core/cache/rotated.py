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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..anchors import Anchor, Source
from ..rope import Layout, Rope
from .byte_plan import CachePlan, LayerSpec
from .enter_leave import LayerDraft
from .slots import LayerSlots, LayerSnapshot, Slot, runs, to_cpu, with_copies, write_turned


@dataclass(frozen=True)
class RotatedSpec(LayerSpec):
    """`keep_raw`: an un-rotated copy of the window's keys."""

    keep_raw: bool = False

    @staticmethod
    def of(anchor: Anchor, window_frames: int, chunk_frames: int, positions: str) -> RotatedSpec:
        """What an anchor policy and a window need under a position mode."""
        moves = positions != "absolute"
        return RotatedSpec(
            anchor.frames,
            window_frames,
            keep_raw=moves and window_frames > 0 and (window_frames > chunk_frames or anchor.takes_evicted),
            blend_frames=anchor.frames if anchor.blends else 0,
            replay_frames=anchor.replay_frames,
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

    def build(self, plan: CachePlan, device: torch.device, workspace: Any) -> RotatedLayer:
        return RotatedLayer(plan, self, device)


class RotatedLayer(LayerSlots):
    """One layer's buffers in the compute dtype, on the model's device. Mutable, private to one run."""

    def __init__(self, plan: CachePlan, layer: RotatedSpec, device: torch.device) -> None:
        super().__init__(plan, layer, device)
        slots = layer.anchor_frames + plan.current_frames + layer.ring_frames
        frame = (plan.tokens, plan.width)
        self.k = torch.zeros((plan.batch, slots, *frame), dtype=plan.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.raw = self._buffer(layer.ring_frames, plan.dtype) if layer.keep_raw else None
        self.blend_k = self._buffer(layer.blend_frames, torch.float32) if layer.blend_frames else None
        self.blend_v = torch.zeros_like(self.blend_k) if self.blend_k is not None else None

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
        anchor, window = self.wanted(layout)
        yield from self._turns(anchor, 0, self.blend_k, rope, heads)
        yield from self._turns(window, self.window_start, self.raw, rope, heads)

    def _turns(
        self, entries: dict[int, tuple[Slot, float]], start: int, raw: torch.Tensor | None, rope: Rope, heads: int
    ) -> Iterator[Callable[[], None]]:
        """Keys at `start + offset`, from `raw` (same offsets) if there is one, else in place.

        A key that is rotated already and has no raw copy is turned by the difference.
        """
        moved = {o: (e, to) for o, (e, to) in sorted(entries.items()) if e.position != to}
        for run in runs(list(moved)):
            offsets = slice(run[0], run[-1] + 1)
            target = self.k[:, start + offsets.start : start + offsets.stop]
            source = target if raw is None else raw[:, offsets]
            came = None if raw is not None else [moved[o][0].position for o in run]
            turn = rope.turn(came, [moved[o][1] for o in run])
            turned = rope.rotate(source.flatten(1, 2).unflatten(-1, (heads, -1)), turn)
            yield partial(write_turned, target, turned.reshape(target.shape), [moved[o] for o in run])

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: what is staged to be cached are the un-rotated keys."""
        frames = keys.shape[1] // self.plan.tokens
        self.k[:, self.current_start : self.current_start + frames].copy_(keys.unflatten(1, (frames, -1)))

    def empty(self, layer: RotatedSpec) -> RotatedLayer:
        """A cache of the same kind for `layer`, with nothing in it."""
        return RotatedLayer(self.plan, layer, self.device)

    def shrunk(self, layer: RotatedSpec) -> RotatedLayer:
        """The same layer with a smaller plan: its anchor, the window's oldest `pinned_frames` and newest frames."""
        small = self.empty(layer)
        for i, (ring, entry) in enumerate(self.kept_by(layer)):
            raw = self.raw is not None and small.raw is None
            source = self.raw[:, ring] if raw else self.k[:, self.window_start + ring]
            small.k[:, small.window_start + i].copy_(source)
            small.v[:, small.window_start + i].copy_(self.v[:, self.window_start + ring])
            if small.raw is not None:
                small.raw[:, i].copy_(self.raw[:, ring])
            held = small.pinned if i < layer.pinned_frames else small.window
            held[i] = Slot(entry.frame, None if raw else entry.position)
        for slot, entry in self.anchor.items():
            to, index = small.anchor_index(slot), self.anchor_index(slot)
            small.k[:, to].copy_(self.k[:, index])
            small.v[:, to].copy_(self.v[:, index])
            small.anchor[slot] = Slot(entry.frame, entry.position)
        small.blend_k, small.blend_v = self.blend_k, self.blend_v
        small.first_frames = self.first_frames
        return small

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

    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        self.k[:, index].copy_(key)
        self.v[:, index].copy_(value)
        if self.blend_k is not None:
            self.blend_k[:, index].copy_(key)
            self.blend_v[:, index].copy_(value)

    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        for held, one, (raw, out) in zip((self.blend_k, self.blend_v), source(), scratch, strict=True):
            torch.lerp(held[:, index], raw.copy_(one), weight, out=out)

    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        self.blend_k[:, index].copy_(scratch[0, 1])
        self.blend_v[:, index].copy_(scratch[1, 1])
        self.v[:, index].copy_(scratch[1, 1])

    def _order(self, anchor_slots: tuple[int, ...], ring_slots: tuple[int, ...]) -> list[int]:
        return [self.anchor_index(s) for s in anchor_slots] + [self.window_start + r for r in ring_slots]

    def snapshot(self) -> LayerSnapshot:
        """A copy on the CPU of all that is cached (what is staged for the current chunk is not)."""
        rings = (*self.pinned, *self.window)
        order = self._order(tuple(self.anchor), rings)
        tensors = {"keys": _to_cpu(self.k, order), "values": _to_cpu(self.v, order)}
        if self.raw is not None:
            tensors["raw"] = _to_cpu(self.raw, rings)
        if self.blend_k is not None:
            every = range(self.layer.anchor_frames)
            tensors |= {"blend_keys": _to_cpu(self.blend_k, every), "blend_values": _to_cpu(self.blend_v, every)}
        return self._snapshot_of(tensors)

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
        self.k[:, order] = saved.tensors["keys"].to(self.k)
        self.v[:, order] = saved.tensors["values"].to(self.v)
        if self.raw is not None:
            self.raw[:, list(saved.ring_slots)] = saved.tensors["raw"].to(self.raw)
        if self.blend_k is not None:
            self.blend_k.copy_(saved.tensors["blend_keys"])
            self.blend_v.copy_(saved.tensors["blend_values"])


def _to_cpu(buffer: torch.Tensor, slots: Iterable[int]) -> torch.Tensor:
    """A copy of some slots [B, slots, P, width]."""
    return to_cpu((buffer[:, slot] for slot in slots), (buffer.shape[0], *buffer.shape[2:]), buffer.dtype)
