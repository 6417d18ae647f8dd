"""Counts the bytes of tensors that are alive: on a device, in page-locked memory and in other host memory, and the most there were.

    with LiveBytes() as live: ...          # inside fake_cuda(), to count what a GPU would hold
    live.now["cuda"], live.peak["pinned"]

A storage lives from the operation that made it until nobody holds it. What an operation takes for itself while it runs is not
seen. Storages that are older than the count are in it only where `watch` is told of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("cuda", "pinned", "cpu")
aten = torch.ops.aten


def taken(size: int, kind: str) -> int:
    """What an allocation of `size` bytes takes: torch rounds page-locked memory up to a power of two."""
    return 1 << (size - 1).bit_length() if kind == "pinned" and size else size


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`: bytes by kind of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(KINDS, 0)
        self.peak = dict.fromkeys(KINDS, 0)
        self._held: dict[int, tuple[Any, str, int]] = {}
        self._aside = 0

    def restart(self) -> None:
        """Count the peak from here on."""
        self.peak = dict(self.now)

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count what is there already, too; once, however often it is given."""
        for tensor in tensors:
            if tensor.untyped_storage()._cdata not in self._held:
                self._hold(tensor.untyped_storage(), tensor.device.type)

    def aside(self) -> _Aside:
        """Within it what is made is not counted: it is somebody else's."""
        return _Aside(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._aside:
            pinned = func is aten._pin_memory.default or bool(kwargs.get("pin_memory"))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor, pinned, (args, kwargs))
        return out

    def _see(self, tensor: torch.Tensor, pinned: bool, given: Any) -> None:
        storage = tensor.untyped_storage()
        key, kind = storage._cdata, "pinned" if pinned else tensor.device.type
        if key in self._held:
            if pinned:  # the stand-in for CUDA locks a tensor where it lies
                held, before, size = self._held[key]
                self._count(before, -size)
                size = taken(size, kind)
                self._held[key] = held, kind, size
                self._count(kind, size)
            return
        older = (one.untyped_storage()._cdata for one in tree_leaves(given) if isinstance(one, torch.Tensor))
        if key in older:  # a view of what was there before the count, or is somebody else's
            return
        self._hold(storage, kind)

    def _hold(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, taken(storage.nbytes(), kind)
        gone = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self._held[key] = gone, kind, size
        self._count(kind, size)

    def _forget(self, key: int) -> None:
        _, kind, size = self._held.pop(key)
        self._count(kind, -size)

    def _count(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.peak[kind] = max(self.peak[kind], self.now[kind])


class _Aside:
    def __init__(self, live: LiveBytes) -> None:
        self.live = live

    def __enter__(self) -> None:
        self.live._aside += 1

    def __exit__(self, *_: object) -> None:
        self.live._aside -= 1
