"""CUDA without a GPU: fake tensors that know their shape, dtype and device and refuse two devices in one operation.

    with fake_cuda() as (device, mode):                 # torch.device("cuda", 0)
        rollout = ... model_on(device, TinyModel()) ...

Nothing is computed. What has to be known of numbers is answered: every condition holds, every number is ANSWER. Streams,
events and page-locked memory are there in name only, but what is said about them is checked: page-locked tensors are on the
CPU, what waits and records are streams and events of the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ANSWER = 64
# (module, function) that remember what a device can do; the pack is loaded under more than one name
TRIED = (("lse", "fastest_way"), ("solve", "solving_device"))
aten = torch.ops.aten


class FakeCuda(FakeTensorMode):
    """Fake tensors, with answers to what real ones would have to be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else float(ANSWER) if dtype.is_floating_point else ANSWER
        if func is aten.nonzero.default and args[0].ndim == 1 and args[0].device.type == "cpu":  # every condition holds
            return self.from_tensor(torch.arange(len(args[0]))[:, None])
        if func is aten._pin_memory.default:
            self._pin(args[0].device)
            return args[0]
        if kwargs.pop("pin_memory", None):
            self._pin(torch.device(kwargs.get("device") or "cpu"))
        return super().dispatch(func, types, args, kwargs)

    def _pin(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise RuntimeError(f"only memory of the CPU can be page-locked, not that of {device}")
        self.pinned += 1


class Event:
    def record(self, stream: Any = None) -> None:
        assert stream is None or isinstance(stream, Stream)

    def synchronize(self) -> None:
        pass


class Stream:
    def __init__(self, device: Any = None) -> None:
        assert torch.device(device).type == "cuda"

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, Event)

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        pass


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    assert isinstance(stream, Stream)
    yield


def _record_stream(tensor: torch.Tensor, stream: Any) -> None:
    assert tensor.device.type == "cuda" and isinstance(stream, Stream)


@contextmanager
def fake_cuda() -> Iterator[tuple[torch.device, FakeCuda]]:
    """(the device, its mode) while it is entered."""
    names = {"Stream": Stream, "Event": Event, "stream": _stream, "current_stream": Stream}
    recorded = mock.patch.object(torch.Tensor, "record_stream", _record_stream)
    with mock.patch.multiple(torch.cuda, **names), recorded, FakeCuda() as mode:
        try:
            yield torch.device("cuda", 0), mode
        finally:  # what was tried on fake tensors says nothing about a real device
            for name, module in list(sys.modules.items()):
                for tried in TRIED:
                    if name.endswith(f"adastate_core.absorption.{tried[0]}"):
                        getattr(module, tried[1]).cache_clear()
