"""Caches that hold less on the device: frames stored as they are or in 8 bits, there or in host memory.

A stored layer keeps its frames un-rotated. When a pass comes to it, they are expanded into one scratch in the compute
dtype that all layers share, laid out as attention reads it, keys rotated to their positions on the way. From host
memory they land in one of two device buffers first, the next layer's while this one's are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .cache_plan import CachePlan, LayerPlan, StoreSize
from .layer_slots import LayerSlots, LayerSnapshot, Slot, Source, to_cpu, without_copies
from .rope import Layout, Rope, Turn

# dtype and largest code
CODES = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
KINDS = ("keys", "values")
TINY = torch.finfo(torch.float32).tiny


def check_cache_dtype(cache_dtype: str, device: torch.device) -> None:
    """ValueError if `device` cannot cast to and from the 8-bit floats that `cache_dtype` asks for."""
    if cache_dtype != "fp8":
        return
    try:
        torch.ones(1, device=device).to(CODES["fp8"][0]).float()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"cache_dtype is fp8, which the device {device} cannot cast; choose int8 or model") from error


def quantised(x: torch.Tensor, heads: int, cache_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, P, heads * d] of one frame as 8-bit codes of the same shape and float32 scales [B, heads].

    Symmetric: a head's largest magnitude becomes the largest code. What is stored stands for code * scale.
    """
    dtype, most = CODES[cache_dtype]
    rows = x.float().unflatten(-1, (heads, -1))
    scale = (rows.abs().amax((1, 3)) / most).clamp_min(TINY)
    codes = (rows / scale[:, None, :, None]).clamp(-most, most)
    return (codes.round() if cache_dtype == "int8" else codes).to(dtype).flatten(2), scale


def unpack(packed: torch.Tensor, scale: torch.Tensor | None, heads: int, out: torch.Tensor) -> None:
    """Write frames [n, B, P, width], times their scales [n, B, heads], to `out` [B, n, P, width]: one rounding."""
    out.copy_(packed.transpose(0, 1))
    if scale is not None:  # codes are exact in every compute dtype; the product is made in float32
        out.unflatten(-1, (heads, -1)).mul_(scale.transpose(0, 1)[:, :, None, :, None])


def unpack_rotated(packed: torch.Tensor, scale: torch.Tensor | None, heads: int, turn: Turn, out: torch.Tensor) -> None:
    """The same for keys, turned by the `turn` of their n frames."""
    frames, batch, tokens = packed.shape[:3]
    rows = packed.transpose(0, 1).float().reshape(batch, frames * tokens, heads, -1)
    turned = Rope.rotate(rows, turn).unflatten(1, (frames, tokens))
    if scale is not None:
        turned.mul_(scale.transpose(0, 1)[:, :, None, :, None])
    out.copy_(turned.flatten(-2))


@dataclass
class Store:
    """Frames one after another: `codes` [n, 2, B, P, width] (keys, values), `scales` [n, 2, B, heads] float32 of 8-bit
    codes, and `blend` [A, 2, B, P, width] float32 of an anchor that blends."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    blend: torch.Tensor | None

    @staticmethod
    def of(plan: CachePlan, size: StoreSize, device: torch.device, pinned: bool) -> Store:
        """An empty store of `size` on `device`; `pinned`: in page-locked memory."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)

        frame = (2, plan.batch, plan.tokens, plan.width)
        return Store(
            zeros(size.frames, *frame, dtype=CODES[plan.cache_dtype][0] if plan.cache_dtype in CODES else plan.dtype),
            zeros(size.frames, 2, plan.batch, plan.heads) if plan.cache_dtype in CODES else None,
            zeros(size.blend_frames, *frame) if size.blend_frames else None,
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.blend) if t is not None)

    def take(self, other: Store, low: int, high: int) -> None:
        """Copy the frames low..high - 1 of another store, and all that blend; on a device, without waiting."""
        self.codes[low:high].copy_(other.codes[low:high], non_blocking=True)
        if self.scales is not None:
            self.scales[low:high].copy_(other.scales[low:high], non_blocking=True)
        if other.blend is not None:
            self.blend[: len(other.blend)].copy_(other.blend, non_blocking=True)


class _Landing:
    """A device store that one layer's frames are copied to, and when that is done and no longer needed."""

    def __init__(self, plan: CachePlan, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.store = Store.of(plan, plan.largest_store, device, pinned=False)
        self.layer: int | None = None
        self.side = side
        if side is not None:
            self.ready, self.used = torch.cuda.Event(), torch.cuda.Event()
            for tensor in (self.store.codes, self.store.scales, self.store.blend):
                if tensor is not None:  # freed in the middle of a copy, it must not be given to anyone before its end
                    tensor.record_stream(side)

    def fetch(self, index: int, layer: StoredLayer) -> None:
        """Start copying a layer's frames here, after the last use of what lies here."""
        self.layer = index
        if self.side is None:
            self.store.take(layer.store, *layer.stored_range)
            return
        self.side.wait_event(self.used)
        with torch.cuda.stream(self.side):
            self.store.take(layer.store, *layer.stored_range)
            self.ready.record()

    def use(self, layer: StoredLayer) -> None:
        """Expand what has landed."""
        if self.side is not None:
            torch.cuda.current_stream(layer.device).wait_event(self.ready)
        layer.expand(self.store)
        if self.side is not None:
            self.used.record(torch.cuda.current_stream(layer.device))


class Workspace:
    """What all stored layers share on the device: `k` and `v` [B, slots, P, width] for the layer whose turn it is."""

    def __init__(self, plan: CachePlan, device: torch.device) -> None:
        self.device = device
        self.host = plan.cache_device != "gpu"
        self.side = torch.cuda.Stream(device) if self.host and device.type == "cuda" else None
        self.fit(plan)

    def fit(self, plan: CachePlan) -> None:
        """Have the size that `plan` says; what is in it is lost. If there is no room, the next pass tries again."""
        self.plan, self.k, self.v = plan, None, None
        self.landings: list[_Landing] = []
        self._allocate()

    def _allocate(self) -> None:
        plan = self.plan
        shape = (plan.batch, plan.most_slots, plan.tokens, plan.width)
        k, v = (torch.zeros(shape, dtype=plan.dtype, device=self.device) for _ in range(2))
        self.landings = [_Landing(plan, self.device, self.side) for _ in range(2)] if self.host else []
        self.k, self.v = k, v

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated, by the plan's names."""
        prefetch = sum(landing.store.nbytes for landing in self.landings)
        return {"scratch": self.k.nbytes + self.v.nbytes, "prefetch": prefetch}

    def begin(self, layers: list[StoredLayer]) -> None:
        """A pass starts: what was fetched before may be stale."""
        if self.k is None:
            self._allocate()
        for landing in self.landings:
            landing.layer = None
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        if self.landings:
            self.landings[0].fetch(0, layers[0])

    def open(self, layers: list[StoredLayer], index: int) -> None:
        """Expand layer `index`, and start fetching the next one."""
        if not self.landings:
            layers[index].expand(layers[index].store)
            return
        here, other = self.landings[index % 2], self.landings[(index + 1) % 2]
        if here.layer != index:
            here.fetch(index, layers[index])
        if index + 1 < len(layers):
            other.fetch(index + 1, layers[index + 1])
        here.use(layers[index])

    def settle(self) -> None:
        """Wait until host memory holds what was written to it, and nothing reads it any more."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).synchronize()
            self.side.synchronize()


class StoredLayer(LayerSlots):
    """One layer's frames in a store. Mutable, private to one run; `k` and `v` are the shared scratch."""

    def __init__(self, plan: CachePlan, layer: LayerPlan, device: torch.device, workspace: Workspace) -> None:
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

    def empty(self, layer: LayerPlan) -> StoredLayer:
        """A cache of the same kind for `layer`, with nothing in it."""
        return StoredLayer(self.plan, layer, self.device, self.workspace)

    def shrunk(self, layer: LayerPlan) -> StoredLayer:
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
