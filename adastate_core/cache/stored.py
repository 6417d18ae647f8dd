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
from .host_copies import Frames, HostCopies, place
from .slots import LayerSlots, LayerSnapshot, blocks, without_copies
from .working_bytes import locked
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

    def locked_bytes(self, plan: CachePlan) -> int:
        if plan.cache_device == "gpu":
            return 0
        kept = self.store_size.frames
        blocks = [2 * kept * plan.code_bytes, kept * plan.scale_bytes, plan.blended_bytes(self.blend_frames)]
        return sum(map(locked, [*blocks, 2 * plan.current_frames * plan.frame_bytes]))

    def build(self, plan: CachePlan, device: torch.device, workspace: Workspace, room: StoredSpec) -> StoredLayer:
        return StoredLayer(plan, self, device, workspace, room)


class StoredLayer(LayerSlots):
    """One layer's frames in a store. Mutable, private to one run; `k` and `v` are the shared scratch."""

    def __init__(
        self,
        plan: CachePlan,
        layer: StoredSpec,
        device: torch.device,
        workspace: Workspace,
        room: StoredSpec,
        old: StoredLayer | None = None,
    ) -> None:
        super().__init__(plan, layer, device, room, old)
        self.workspace = workspace
        place = torch.device("cpu") if workspace.host else device
        pinned = workspace.host and device.type == "cuda"
        self.store = Store.of(plan, room.store_size, place, pinned, None if old is None else old.store)
        frame = (plan.current_frames, 2, plan.batch, plan.tokens, plan.width)
        self.staging = torch.zeros(frame, dtype=plan.dtype, device=place, pin_memory=pinned)
        self.first_ring = room.store_size.frames - room.ring_frames
        # of the anchor's frames and of the ring's: where each key is, and where it goes when it is expanded
        self._moves: list[list[tuple[float | None, float]]] = [[], []]

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
        """Note where every stored key has to be in `layout` when it is expanded; nothing is written."""
        self._rope = rope
        for i, entries in enumerate(self.wanted(layout)):
            self._moves[i] = [(slot.position, to) for _, (slot, to) in sorted(entries.items())]
        return iter(())

    def expand(self, source: Store) -> None:
        """Fill the scratch with this layer's frames out of `source`, which is its store or a copy of it."""
        low, high = self.stored_range
        start = self.layer.anchor_frames - len(self.anchor)
        if self.anchor and self.layer.blend_frames:
            self._expand(source.blend[start : self.layer.anchor_frames], None, self._moves[0], start)
        elif self.anchor:
            self._expand(*_frames(source, low, self.first_ring), self._moves[0], start)
        if self.held:
            self._expand(*_frames(source, self.first_ring, high), self._moves[1], self.window_start)

    def _expand(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        moves: list[tuple[float | None, float]],
        start: int,
    ) -> None:
        """In blocks (plan.block_frames), so that the work in float32 takes no more than a pass's own frames do."""
        heads = self.plan.heads
        for part in blocks(list(range(len(codes))), [to for _, to in moves], self.plan.block_frames):
            scale = (None, None) if scales is None else scales[part].unbind(1)
            out = slice(start + part.start, start + part.stop)
            unpack_rotated(codes[part, 0], scale[0], heads, _turn(self._rope, moves[part]), self.k[:, out])
            unpack(codes[part, 1], scale[1], heads, self.v[:, out])

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: keep its un-rotated keys and its values until the commit."""
        frames = keys.shape[1] // self.plan.tokens
        keys, values = keys.unflatten(1, (frames, -1)), self.v[:, self.current_start : self.current_start + frames]
        for i in range(frames):  # one by one: only a contiguous target in host memory is written without waiting
            self.staging[i, 0].copy_(keys[:, i], non_blocking=True)
            self.staging[i, 1].copy_(values[:, i], non_blocking=True)

    def _like(self, layer: StoredSpec, room: StoredSpec) -> StoredLayer:
        return StoredLayer(self.plan, layer, self.device, self.workspace, room, self)

    def _carry(self, old: StoredLayer, ring: int, to: int) -> None:
        self._copy(self.first_ring + to, old, old.first_ring + ring)

    def _carry_anchor(self, old: StoredLayer, slot: int) -> None:
        if self.store.blend is None:
            self._copy(self.anchor_index(slot), old, old.anchor_index(slot))

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
        return self._stored(self.first_ring + ring)

    def _stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a frame of the store."""
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

    def _anchor_buffers(self) -> list[torch.Tensor]:
        self.workspace.settle()
        store = self.store
        held = [t[: self.first_ring] for t in (store.codes, store.scales) if t is not None]
        return held + ([] if store.blend is None else [store.blend])

    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        if self.store.blend is None:
            self._put(index, key, value)
        else:
            for i, x in enumerate((key, value)):
                self.store.blend[index, i].copy_(x.float(), non_blocking=True)

    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        if self.store.blend is None:
            self._blend_in_place(slot, self._stored(self.anchor_index(slot)), source, weight, scratch)
            return
        held = self.store.blend[self.anchor_index(slot)].to(self.device, non_blocking=True)
        for kept, one, (raw, out) in zip(held, source(), scratch, strict=True):
            torch.lerp(kept, raw.copy_(one), weight, out=out)

    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        if self.store.blend is None:
            self._put(index, scratch[0, 1], scratch[1, 1])
            return
        for i, (_, blended) in enumerate(scratch):
            self.store.blend[index, i].copy_(blended, non_blocking=True)

    def _order(self, anchor_slots: tuple[int, ...], ring_slots: tuple[int, ...]) -> list[int]:
        anchors = [] if self.layer.blend_frames else [self.anchor_index(slot) for slot in anchor_slots]
        return anchors + [self.first_ring + ring for ring in ring_slots]

    def snapshot(self, copies: HostCopies) -> LayerSnapshot:
        """As LayerSlots; what is stored is copied bit for bit."""
        self.workspace.settle()
        order = self._order(tuple(self.anchor), (*self.pinned, *self.window))
        parts: dict[str, Frames] = {name: (self._frames_of(self.store.codes, i), order) for i, name in enumerate(KINDS)}
        if self.store.scales is not None:
            parts["scales"] = self.store.scales.permute(2, 0, 1, 3), order
        if self.store.blend is not None:
            parts |= {f"blend_{name}": (self._frames_of(self.store.blend, i), None) for i, name in enumerate(KINDS)}
        return self._snapshot_of(parts, copies)

    @staticmethod
    def _frames_of(stored: torch.Tensor, kind: int) -> torch.Tensor:
        """Keys or values [B, n, P, width] of stored frames: a view."""
        return stored[:, kind].transpose(0, 1)

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
            place(self._frames_of(self.store.codes, i), order, saved.tensors[name])
            if self.store.blend is not None:
                self.store.blend[:, i].copy_(saved.tensors[f"blend_{name}"].transpose(0, 1))
        if self.store.scales is not None:
            place(self.store.scales.permute(2, 0, 1, 3), order, saved.tensors["scales"])


def _frames(source: Store, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    return source.codes[low:high], None if source.scales is None else source.scales[low:high]


def _turn(rope: Rope, moves: list[tuple[float | None, float]]) -> Turn:
    """What brings keys from positions (None: raw) to others; a key that is there already stays bit for bit."""
    if all(came is None for came, _ in moves):
        return rope.turn(None, [to for _, to in moves])
    return Turn.joined([rope.turn([None], [None]) if came == to else rope.turn([came], [to]) for came, to in moves])
