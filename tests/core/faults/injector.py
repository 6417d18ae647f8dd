"""Failing operations: a mode of torch's dispatcher that counts them and raises at one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class InjectedMemory(torch.OutOfMemoryError):
    """As a device out of memory says it."""


class InjectedInterrupt(KeyboardInterrupt):
    """Ctrl-C."""


class InjectedEnd(BaseException):
    """What is no Exception: a thread that is ended, a host that stops a prompt."""


INJECTED = (InjectedMemory, InjectedInterrupt, InjectedEnd)
# memory as often as the other two kinds together
KINDS = (InjectedMemory, InjectedMemory, InjectedInterrupt, InjectedEnd)


def kind_of(*numbers: object) -> type[BaseException]:
    """Which of the kinds is raised, by these numbers alone."""
    return random.Random("/".join(map(str, numbers))).choice(KINDS)


def chosen(count: int, *numbers: object) -> int:
    """One of 0..count - 1, by these numbers alone."""
    return random.Random("/".join(map(str, numbers))).randrange(max(1, count))


@dataclass(frozen=True)
class Place:
    """Where an operation writes: so the same copy is known again when it is made a second time."""

    address: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """An operation that ran: its name, and where it writes if that is a tensor that was there before."""

    name: str
    writes: Place | None


def _written(func: Any, args: tuple, kwargs: dict) -> Place | None:
    """Where an operation writes in place, or None."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
            return Place(value.data_ptr(), tuple(value.shape))
    out = kwargs.get("out")
    return Place(out.data_ptr(), tuple(out.shape)) if isinstance(out, torch.Tensor) else None


class Injector(TorchDispatchMode):
    """Counts operations, remembers them, and raises `kind` once, where `wanted` says so.

    `late`: the operation has run by then, as where a device reports an error after the fact.
    """

    def __init__(
        self, wanted: Callable[[int, Operation], bool], kind: type[BaseException] = InjectedMemory, late: bool = False
    ) -> None:
        super().__init__()
        self.wanted, self.kind, self.late = wanted, kind, late
        self.operations: list[Operation] = []
        self.failed: Operation | None = None
        # what the failed one was to write to, held so that no other tensor gets its address
        self.held: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        number, operation = len(self.operations), Operation(str(func), _written(func, args, kwargs))
        self.operations.append(operation)
        if self.failed is None and self.wanted(number, operation):
            self.failed, self.held = operation, (args, kwargs) if operation.writes else None
            if self.late:
                func(*args, **kwargs)
            raise self.kind(f"injected at operation {number}, {operation.name}")
        return func(*args, **kwargs)


def watching() -> Injector:
    """Nothing fails."""
    return Injector(lambda number, operation: False)


def at(number: int, kind: type[BaseException], late: bool = False) -> Injector:
    """The `number`-th operation fails, counted from 0."""
    return Injector(lambda n, operation: n == number, kind, late)


def again(place: Place | None) -> Injector:
    """The first copy to the same place fails."""
    return Injector(lambda n, operation: place is not None and operation.writes == place)
