"""Caches that hold less on the device: frames stored as they are or in 8 bits, there or in host memory.

A stored layer keeps its frames un-rotated. When a pass comes to it, they are expanded into one scratch in the compute
dtype that all layers share (cache/workspace.py), laid out as attention reads it, keys rotated to their positions on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..anchors import Source
from ..rope import Layout, Rope, Turn
from .byte_plan import HOST, CachePlan, LayerSpec
from .eight_bits import quantised, unpack, unpack_rotated
from .enter_leave import LayerDraft
from .slots import LayerSlots, LayerSnapshot, Slot, to_cpu, without_copies
from .workspace import Store, Workspace

KINDS = ("keys", "values")


@dataclass(frozen=True)
class StoredSpec(LayerSpec):
    """Frames in a store of the plan's `cache_dtype` and `cache_device`."""

    def bytes(self, plan: CachePlan) -> dict[str, int]:
        kept = self.store_size.frames
        held = {
            "k": kept * plan.code_bytes,
            "v": kept * plan.code_bytes,
            "scales": kept * plan.scale_bytes,
            "current": 2 * plan.current_frames * plan.frame_bytes,
            "ema": plan.blended_bytes(self.blend_frames),
        }
        if plan.cache_device != "gpu":
            held = {f"{HOST}{name}": size for name, size in held.items()}
        return held | {"replay": self.replay_bytes(plan)}

    def build(self, plan: CachePlan, device: torch.device, workspace: Workspace) -> StoredLayer:
        return StoredLayer(plan, self, device, workspace)


class StoredLayer(LayerSlots):
    """One layer's frames in a store. Mutable, private to one run; `k` and `v` are the shared scratch."""

    def __init__(self, plan: CachePlan, layer: StoredSpec, device: torch.device, workspace: Workspace) -> None:
        super().__init__(plan, layer, device)
        self.workspace = workspace
        place = torch.device("cpu") if workspace.host else device
        pinned = workspace.host and device.type == "cuda"
        self.store = Store.of(plan, layer.store_size, place, pinned)
        frame = (plan.current_frames, 2, plan.batch, plan.tokens, plan.width)
        self.staging = torch.zeros(frame, dtype=plan.dtype, device=place, pin_memory=pinned)
        self.first_ring = layer.store_size.frames - layer.ring_frames
        self._turns: list[Turn | None] = [None, None]

    @property
    def k(self) -> torch.Tensor:
        return self.workspace.k

    @property
    def v(self) -> torch.Tensor:
        return self.workspace.v

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated, by the plan's names."""
        store = self.store
        sizes = {"k": store.codes[:, 0].numel() * store.codes.itemsize, "current": self.staging.nbytes}
        sizes["v"] = store.codes.nbytes - sizes["k"]
        sizes["scales"] = 0 if store.scales is None else store.scales.nbytes
        sizes["ema"] = 0 if store.blend is None else store.blend.nbytes
        named = {f"host_{name}" if self.workspace.host else name: size for name, size in sizes.items()}
        return named | {"replay": 0 if self.first_frames is None else self.first_frames.nbytes}

    @property
    def stored_range(self) -> tuple[int, int]:
        """The stored frames that are held, from and to."""
        low = self.first_ring - (0 if self.layer.blend_frames else len(self.anchor))
        return low, self.first_ring + self.held

    def turns(self, layout: Layout, rope: Rope, heads: int) -> Iterator[Callable[[], None]]:
        """Make the turns that bring every stored key to its position in `layout` when it is expanded; nothing is written."""
        for i, entries in enumerate(self.wanted(layout)):
            ordered = [entries[index] for index in sorted(entries)]
            to = [position for _, position in ordered]
            if not to or all(slot.position is None for slot, _ in ordered):
                self._turns[i] = rope.turn(None, to) if to else None
            else:
                self._turns[i] = Turn.joined([_turn(rope, slot.position, position) for slot, position in ordered])
        return iter(())

    def expand(self, source: Store) -> None:
        """Fill the scratch with this layer's frames out of `source`, which is its store or a copy of it."""
        low, high = self.stored_range
        start = self.layer.anchor_frames - len(self.anchor)
        if self.anchor and self.layer.blend_frames:
            self._expand(source.blend[start : self.layer.anchor_frames], None, self._turns[0], start)
        elif self.anchor:
            self._expand(*_frames(source, low, self.first_ring), self._turns[0], start)
        if self.held:
            self._expand(*_frames(source, self.first_ring, high), self._turns[1], self.window_start)

    def _expand(self, codes: torch.Tensor, scales: torch.Tensor | None, turn: Turn, start: int) -> None:
        """In blocks no larger than a pass's own frames, so that the work in float32 takes no more than theirs does."""
        heads = self.plan.heads
        for low in range(0, len(codes), self.plan.current_frames):
            high = min(low + self.plan.current_frames, len(codes))
            scale = (None, None) if scales is None else scales[low:high].unbind(1)
            out = slice(start + low, start + high)
            unpack_rotated(codes[low:high, 0], scale[0], heads, turn.frames(low, high), self.k[:, out])
            unpack(codes[low:high, 1], scale[1], heads, self.v[:, out])

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: keep its un-rotated keys and its values until the commit."""
        frames = keys.shape[1] // self.plan.tokens
        keys, values = keys.unflatten(1, (frames, -1)), self.v[:, self.current_start : self.current_start + frames]
        for i in range(frames):  # one by one: only a contiguous target in host memory is written without waiting
            self.staging[i, 0].copy_(keys[:, i], non_blocking=True)
            self.staging[i, 1].copy_(values[:, i], non_blocking=True)

    def empty(self, layer: StoredSpec) -> StoredLayer:
        """A cache of the same kind for `layer`, with nothing in it."""
        return StoredLayer(self.plan, layer, self.device, self.workspace)

    def shrunk(self, layer: StoredSpec) -> StoredLayer:
        """The same layer with a smaller plan: its anchor, the window's oldest `pinned_frames` and newest frames."""
        self.workspace.settle()
        small = self.empty(layer)
        for i, (ring, entry) in enumerate(self.kept_by(layer)):
            small._copy(small.first_ring + i, self, self.first_ring + ring)
            held = small.pinned if i < layer.pinned_frames else small.window
            held[i] = Slot(entry.frame, entry.position)
        for slot, entry in self.anchor.items():
            if self.store.blend is None:
                small._copy(small.anchor_index(slot), self, self.anchor_index(slot))
            small.anchor[slot] = Slot(entry.frame, entry.position)
        small.store.blend = self.store.blend
        small.first_frames = self.first_frames
        return small

    def _copy(self, to: int, other: StoredLayer, index: int) -> None:
        self.store.codes[to].copy_(other.store.codes[index])
        if self.store.scales is not None:
            self.store.scales[to].copy_(other.store.scales[index])

    def _put(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store a raw key and value [B, P, width]: this is where a frame is rounded to 8 bits, once."""
        for i, x in enumerate((key, value)):
            if self.store.scales is not None:
                x, scale = quantised(x, self.plan.heads, self.plan.cache_dtype)
                self.store.scales[index, i].copy_(scale, non_blocking=True)
            self.store.codes[index, i].copy_(x, non_blocking=True)

    def leaving(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, P, width] of a ring slot on the device: float32 out of 8 bits, else the compute dtype."""
        index = self.first_ring + ring
        codes = self.store.codes[index].to(self.device, non_blocking=True)
        if self.store.scales is not None:
            codes = self._unpacked(codes, self.store.scales[index].to(self.device, non_blocking=True))
        return codes[0], codes[1]

    def draft(self, scratch: torch.Tensor | None) -> LayerDraft:
        return LayerDraft(self, scratch)

    def staged(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.staging[frame].to(self.device, non_blocking=True)
        return key, value

    def as_stored(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store.scales is None:
            return source()
        key, value = (self._unpacked(*quantised(x, self.plan.heads, self.plan.cache_dtype)) for x in source())
        return key, value

    def _unpacked(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Float32 [..., P, width] of 8-bit codes and their scales [..., heads]."""
        return (codes.float().unflatten(-1, (self.plan.heads, -1)) * scale[..., None, :, None]).flatten(-2)

    def shown(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.leaving(ring)

    def enter(self, ring: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._put(self.first_ring + ring, key, value)

    def _take(self, ring: int) -> list[torch.Tensor]:
        self.workspace.settle()
        index, store = self.first_ring + ring, self.store
        return [t[index].clone() for t in (store.codes, store.scales) if t is not None]

    def _place(self, ring: int, taken: list[torch.Tensor]) -> None:
        index, store = self.first_ring + ring, self.store
        for held, one in zip([t for t in (store.codes, store.scales) if t is not None], taken, strict=True):
            held[index].copy_(one)

    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        if self.store.blend is None:
            self._put(index, key, value)
        else:
            for i, x in enumerate((key, value)):
                self.store.blend[index, i].copy_(x.float(), non_blocking=True)

    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        held = self.store.blend[self.anchor_index(slot)].to(self.device, non_blocking=True)
        for kept, one, (raw, out) in zip(held, source(), scratch, strict=True):
            torch.lerp(kept, raw.copy_(one), weight, out=out)

    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        for i, (_, blended) in enumerate(scratch):
            self.store.blend[index, i].copy_(blended, non_blocking=True)

    def _order(self, anchor_slots: tuple[int, ...], ring_slots: tuple[int, ...]) -> list[int]:
        anchors = [] if self.layer.blend_frames else [self.anchor_index(slot) for slot in anchor_slots]
        return anchors + [self.first_ring + ring for ring in ring_slots]

    def snapshot(self) -> LayerSnapshot:
        """A copy on the CPU of all that is stored, bit for bit (what is staged for the current chunk is not)."""
        self.workspace.settle()
        order, plan = self._order(tuple(self.anchor), (*self.pinned, *self.window)), self.plan
        codes, frame = self.store.codes, (plan.batch, plan.tokens, plan.width)
        tensors = {name: to_cpu((codes[j, i] for j in order), frame, codes.dtype) for i, name in enumerate(KINDS)}
        if self.store.scales is not None:
            scales = (self.store.scales[j].transpose(0, 1) for j in order)
            tensors["scales"] = to_cpu(scales, (plan.batch, 2, plan.heads), torch.float32)
        if self.store.blend is not None:
            for i, name in enumerate(KINDS):
                tensors[f"blend_{name}"] = to_cpu(self.store.blend[:, i].unbind(0), frame, torch.float32)
        return self._snapshot_of(tensors)

    def restore(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot of a layer with the same plan; the snapshot stays as it is."""
        self.workspace.settle()
        if self.store.scales is None:
            saved = without_copies(saved, blends=bool(self.layer.blend_frames))
        plan, order = self.plan, self._order(saved.anchor_slots, saved.ring_slots)
        frame = (plan.tokens, plan.width)
        shapes = dict.fromkeys(KINDS, (plan.batch, len(order), *frame))
        if self.store.scales is not None:
            shapes["scales"] = (plan.batch, len(order), 2, plan.heads)
        if self.store.blend is not None:
            shapes |= {f"blend_{name}": (plan.batch, self.layer.anchor_frames, *frame) for name in KINDS}
        self._check(saved, shapes)
        if self.store.scales is not None and any(saved.tensors[n].dtype != self.store.codes.dtype for n in KINDS):
            raise ValueError("the state's cache does not hold the dtype that its settings say: the file is damaged")
        self._adopt(saved)
        for i, name in enumerate(KINDS):
            for j, x in zip(order, saved.tensors[name].unbind(1), strict=True):
                self.store.codes[j, i].copy_(x)
            if self.store.blend is not None:
                self.store.blend[:, i].copy_(saved.tensors[f"blend_{name}"].transpose(0, 1))
        if self.store.scales is not None:
            for j, scale in zip(order, saved.tensors["scales"].unbind(1), strict=True):
                self.store.scales[j].copy_(scale.transpose(0, 1))


def _frames(source: Store, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    return source.codes[low:high], None if source.scales is None else source.scales[low:high]


def _turn(rope: Rope, position: float | None, to: float) -> Turn:
    """What brings one frame's key from `position` (None: raw) to `to`; where it is already, it stays bit for bit."""
    return rope.turn([None], [None]) if position == to else rope.turn([position], [to])
