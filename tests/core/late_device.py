"""A GPU that is not there and does nothing before it must: what is asked of it waits in streams' queues.

    with LateDevice("late") as late:                 # late.device is torch.device("cuda", 0)
        rollout = ... model_on(late.device, TinyModel()) ...

Tensors on it are computed on the CPU, so that real numbers come out, and a wait that is missing gives wrong ones. As CUDA may
have it at its worst:

- Every kernel, fill and copy is queued on the current stream, and what it will write holds NaN until then. A stream runs when
  somebody waits: `synchronize` of it, of an event or of the device, a number that is asked for (`.item()`, an `if`, a shape
  that depends on numbers, a solver of torch.linalg), a copy that blocks. It runs its own queue in order, and of another
  stream's what it was told to wait for (`wait_event`, `wait_stream`), as recorded when it was told.
- A copy to page-locked host memory with `non_blocking` lands when it runs: until then the CPU reads what was there before. One
  from it reads the memory when it runs: what the CPU has written there in the meantime is copied.
- A copy from pageable memory has read it when the call returns; one to pageable memory, or without `non_blocking`, waits for
  its stream. A host side that is not contiguous goes through a pageable copy, and a blocking copy to the device that converts
  is converted by the CPU first: host memory is read at the call, whatever is still on its way there.
- The streams beside the first run as "late" as they may, or as "early": as soon as nothing that they were told to wait for is
  left, while the first one still sleeps. A wait that is missing on either side shows in one of the two.
- "at once": nothing is late, for numbers to compare with.

Memory is never given to another tensor while work on it is queued: `record_stream` is there in name only.

Another thread may wait for an event, and runs the streams as the first one would; only the thread that entered it makes tensors.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from no_double_device import DEVICE, Held, _check_places, _register, _written, aten
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adastate_core.absorption.lse import fastest_way
from adastate_core.absorption.solve import solving_device

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# results whose shape depends on numbers
COUNTED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
# until a kernel has run, its result holds this
NOT_YET = float("nan")


class Late(Held):
    """A tensor of the device: `inner` has its numbers once the work on it has run. It says that it lies on CUDA."""

    @property
    def device(self) -> torch.device:
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _gpu().run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Stream:
    """A queue of work and of waits, (stream, how many of its items have to be done)."""

    def __init__(self, device: Any = None) -> None:
        assert torch.device(device).type == "cuda"
        self.queue: deque[Callable[[], object] | tuple[Stream, int]] = deque()
        self.done = 0
        self.gpu = _gpu()
        self.gpu.streams.append(self)

    @property
    def end(self) -> int:
        return self.done + len(self.queue)

    def add(self, item: Callable[[], object] | tuple[Stream, int]) -> None:
        with self.gpu.lock:
            self.queue.append(item)
            self.gpu.go_ahead()

    def step(self) -> None:
        item = self.queue[0]
        if isinstance(item, tuple):
            item[0].run(item[1])
        else:
            item()
        self.queue.popleft()
        self.done += 1

    def run(self, end: int | None = None) -> None:
        with self.gpu.lock:
            end = self.end if end is None else end
            while self.done < end:
                self.step()
                self.gpu.go_ahead(self)

    def go_ahead(self) -> None:
        """Run what waits for nothing."""
        while self.queue and not (isinstance(item := self.queue[0], tuple) and item[0].done < item[1]):
            self.step()

    def wait_event(self, event: Event) -> None:
        if event.at is not None:
            self.add(event.at)

    def wait_stream(self, stream: Stream) -> None:
        self.add((stream, stream.end))

    def synchronize(self) -> None:
        self.run()


class Event:
    """A place in a stream; one that was never recorded is over."""

    at: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _gpu().current
        with stream.gpu.lock:
            self.at = stream, stream.end

    def synchronize(self) -> None:
        if self.at is not None:
            self.at[0].run(self.at[1])


class _Places(TorchFunctionMode):
    """The name that the tensors go by, CUDA, in the place of the one that torch knows them by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(DEVICE if isinstance(a, torch.device) and a.type == "cuda" else a for a in args)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = kwargs | {"device": DEVICE}
        return func(*args, **kwargs)


class LateDevice(TorchDispatchMode):
    """While it is entered, tensors may be made on CUDA, and torch.cuda's streams and events are the ones above."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.device, self.when = CUDA, when
        self.streams: list[Stream] = []
        # whoever adds to the streams, or runs them
        self.lock = threading.RLock()
        # page-locked storages by address, kept so that no other gets the address
        self.locked: dict[int, Any] = {}
        # copies to and from page-locked memory that did not wait
        self.to_host = self.from_host = 0
        self._ahead = False

    # ---- streams

    def go_ahead(self, running: Stream | None = None) -> None:
        """Let the streams that are early do what waits for nothing."""
        if self.when == "late" or self._ahead:
            return
        self._ahead = True
        for stream in self.streams[1 if self.when == "early" else 0 :]:
            if stream is not running:
                stream.go_ahead()
        self._ahead = False

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            stream.run()

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    # ---- entering

    def __enter__(self) -> LateDevice:
        _register()
        _entered.append(self)
        self.streams.clear()
        self.current = Stream(CUDA)
        names = {
            "Stream": Stream,
            "Event": Event,
            "stream": self._stream,
            "current_stream": lambda device=None: self.current,
        }
        self._patches = [
            mock.patch.multiple(torch.cuda, synchronize=self.synchronize, **names),
            mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
            _Places(),
        ]
        for patch in self._patches:
            patch.__enter__()
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lift)
        for patch in reversed(self._patches):
            patch.__exit__(*error)
        _entered.remove(self)
        fastest_way.cache_clear()
        solving_device.cache_clear()

    # ---- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operator: at once on the CPU, else into the queue of the current stream."""
        tensors = _tensors((args, kwargs))
        held = [t for t in tensors if isinstance(t, Late)]
        asked = kwargs.get("device")
        there = bool(held) if asked is None else asked.type == DEVICE.type
        if not held and not there:
            return self._on_host(func, args, kwargs)
        if func is aten.copy_.default:
            return self._copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        if func is aten._to_copy.default and (len(held) == 0 or not there):
            return self._to_copy(args[0], kwargs, there)
        _check_places(func, args, tensors, held)
        kwargs = {k: CPU if k == "device" else v for k, v in kwargs.items()}
        # what a kernel is given of the CPU it is given now
        args, kwargs = _mapped(_inner, (args, kwargs))
        return self._on_device(func, args, kwargs, _written_of(func, args, kwargs, held))

    def _on_host(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return self.is_locked(args[0])
        if func is aten._pin_memory.default:
            return self._lock(args[0].clone())
        lock = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        return self._lock(out) if lock else out

    def _lock(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.locked[storage.data_ptr()] = storage
        return tensor

    def is_locked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.locked

    def _on_device(self, func: Any, args: tuple, kwargs: dict[str, Any], written: list[Held]) -> Any:
        if written:
            self.current.add(lambda: func(*args, **kwargs))
            return written[0] if len(written) == 1 else tuple(written)
        if _waits(func, args):
            self.current.run()
            return _mapped(_late, func(*args, **kwargs))
        out = func(*args, **kwargs)  # for its shape: of numbers that may not be there yet
        made = _tensors(out)
        if not _views(func, made, args):  # a view is there at once
            for t in made:
                if t.is_floating_point():
                    t.fill_(NOT_YET)
            if func not in EMPTY:
                self.current.add(lambda: _fill(made, func(*args, **kwargs)))
        return _mapped(_late, out)

    # ---- copies

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        if isinstance(to, Late) and isinstance(source, Late):
            self.current.add(lambda: to.inner.copy_(source.inner))
            return to
        host, device = (source, to) if isinstance(to, Late) else (to, source)
        direct = self.is_locked(host) and host.is_contiguous() and host.shape == device.shape
        waits = not non_blocking
        if host is source:
            if not direct or (not non_blocking and to.dtype != source.dtype):
                source = source.clone()
            else:
                self.from_host += non_blocking
            self.current.add(lambda: to.inner.copy_(source))
        else:
            waits = waits or not direct
            self.to_host += not waits
            self.current.add(lambda: to.copy_(source.inner))
        if waits:
            self.current.run()
        return to

    def _to_copy(self, source: torch.Tensor, kwargs: dict[str, Any], there: bool) -> torch.Tensor:
        """Over to the other side, into new memory: page-locked if it is on the CPU and nobody waits."""
        non_blocking = bool(kwargs.get("non_blocking"))
        inner = source.inner if isinstance(source, Late) else source
        to = torch.empty_like(inner, dtype=kwargs.get("dtype"), pin_memory=False)
        if to.is_floating_point():
            to.fill_(NOT_YET)
        if there:
            to = Late(to)
        elif non_blocking:
            self._lock(to)
        return self._copy(to, source, non_blocking)


_entered: list[LateDevice] = []


def _gpu() -> LateDevice:
    return _entered[-1]


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """An operator's arguments or results, shallow as they are, with a function of each."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_mapped(function, one) for one in tree])
    if kind is dict:
        return {name: _mapped(function, one) for name, one in tree.items()}
    return function(tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in it."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [leaf for one in tree for leaf in _tensors(one)]


def _inner(t: Any) -> Any:
    return t.inner if isinstance(t, Late) else t.clone() if isinstance(t, torch.Tensor) else t


def _late(t: Any) -> Any:
    return Late(t) if isinstance(t, torch.Tensor) else t


@functools.cache
def _schema(func: Any) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    """Which arguments an operator writes to, by place and by name, and whether it gives numbers or shapes that depend on them."""
    written = [(i, one.name) for i, one in enumerate(func._schema.arguments) if _written(one)]
    others = any("Tensor" not in str(one.type) for one in func._schema.returns) or not func._schema.returns
    counts = func in COUNTED or "linalg" in func.name() or others
    return tuple(i for i, _ in written), tuple(name for _, name in written), counts


def _written_of(func: Any, args: tuple, kwargs: dict[str, Any], held: list[Held]) -> list[Held]:
    """The tensors of the device that an operator writes to."""
    places, names, _ = _schema(func)
    inner = [args[i] for i in places if i < len(args)] + [kwargs[name] for name in names if name in kwargs]
    return [next(t for t in held if t.inner is one) for one in inner]


def _waits(func: Any, args: tuple) -> bool:
    """Whether an operator's result, or its shape, is not to be had without the numbers."""
    return _schema(func)[2] or (func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]))


def _views(func: Any, made: list[torch.Tensor], args: tuple) -> bool:
    given = [t.untyped_storage()._cdata for t in _tensors(args)]
    return bool(given and made) and all(t.untyped_storage()._cdata in given for t in made)


def _fill(made: list[torch.Tensor], out: Any) -> None:
    for t, one in zip(made, _tensors(out), strict=True):
        t.copy_(one)
