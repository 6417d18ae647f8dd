"""What layers that are stored apart share on the device: the scratch that the layer whose turn it is is expanded into, and the
two buffers in which frames from host memory land, the next layer's while this one's are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .byte_plan import CachePlan, StoreSize
from .eight_bits import CODES


@dataclass
class Store:
    """Frames one after another: `codes` [n, 2, B, P, width] (keys, values), `scales` [n, 2, B, heads] float32 of 8-bit
    codes, and `blend` [A, 2, B, P, width] float32 of an anchor that blends."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    blend: torch.Tensor | None

    @staticmethod
    def of(plan: CachePlan, size: StoreSize, device: torch.device, pinned: bool, old: Store | None = None) -> Store:
        """An empty store of `size` on `device`; `pinned`: in page-locked memory. With the blended anchor of `old`."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)

        frame = (2, plan.batch, plan.tokens, plan.width)
        return Store(
            zeros(size.frames, *frame, dtype=CODES[plan.cache_dtype][0] if plan.cache_dtype in CODES else plan.dtype),
            zeros(size.frames, 2, plan.batch, plan.heads) if plan.cache_dtype in CODES else None,
            (zeros(size.blend_frames, *frame) if size.blend_frames else None) if old is None else old.blend,
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


class Stored(Protocol):
    """A layer whose frames lie in a store of its own."""

    device: torch.device
    store: Store

    @property
    def stored_range(self) -> tuple[int, int]:
        """The stored frames that are held, from and to."""
        ...

    def expand(self, source: Store) -> None:
        """Fill the scratch with this layer's frames out of `source`, which is its store or a copy of it."""
        ...


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

    def fetch(self, index: int, layer: Stored) -> None:
        """Start copying a layer's frames here, after the last use of what lies here."""
        self.layer = index
        if self.side is None:
            self.store.take(layer.store, *layer.stored_range)
            return
        self.side.wait_event(self.used)
        with torch.cuda.stream(self.side):
            self.store.take(layer.store, *layer.stored_range)
            self.ready.record()

    def use(self, layer: Stored) -> None:
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

    def give_up(self) -> None:
        """Hold nothing until the next `fit` or pass. Nothing is read from a store any more when this returns."""
        self.settle()
        self.k, self.v, self.landings = None, None, []

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
        return {"scratch": 0 if self.k is None else self.k.nbytes + self.v.nbytes, "prefetch": prefetch}

    def begin(self, layers: Sequence[Stored]) -> None:
        """A pass starts: what was fetched before may be stale."""
        if self.k is None:
            self._allocate()
        for landing in self.landings:
            landing.layer = None
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        if self.landings:
            self.landings[0].fetch(0, layers[0])

    def open(self, layers: Sequence[Stored], index: int) -> None:
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
