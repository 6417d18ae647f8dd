"""Counts what a GPU would be asked to do: aten operations on CUDA tensors that are neither views nor mere allocations, by part.

    with fake_cuda() as (device, _), CountedOps() as counted, torch.no_grad():
        with counted.part("pass"):
            ...
    counted.total("pass")          # operations within it, parts of it included
    counted.ops["pass/block"]      # Counter of operations by name, of that part alone

One operation is one kernel, but for a matrix product that is split now and then. What a compiler makes one kernel of counts as one
operation: `counted.one` is a compiler in name. `aside` counts nothing: for what stands in for something else.

`crossings` are the operations that make the CPU wait for the device or copy between the two, each with its part: there must be none
within a pass. Each is an operation too and lies in the totals, since the device copies for it.

Count under `torch.no_grad()`. In inference mode torch hands on whole linears and attentions instead of what they are made of.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# make a tensor, or another name of one, and start no kernel
NOTHING = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten._pin_memory", "aten.is_pinned", "aten.resize_")
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class CountedOps(TorchDispatchMode):
    """`ops`: operations by part and name. `bytes`: what they read and write, by part. `crossings`: (part, operation).

    `seen(func, args, out)` is shown every operation of aten that counts.
    """

    def __init__(self, seen: Callable[[Any, tuple, Any], None] = lambda func, args, out: None) -> None:
        super().__init__()
        self._seen = seen
        self.ops: dict[str, Counter[str]] = defaultdict(Counter)
        self.bytes: dict[str, int] = defaultdict(int)
        self.crossings: list[tuple[str, str]] = []
        self._parts: list[str] = []
        self._quiet = 0

    @property
    def here(self) -> str:
        """The part that is counted now, with what it lies in: "chunk/pass/block"."""
        return "/".join(self._parts)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is counted within it belongs to part `name` of the one around it."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a part."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing within it is counted; `crossings` still are."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def one(self, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """A compiler, in name: `function` as one operation of its own name, or of another, that reads the tensors that it gets and
        writes those that it gives."""

        def compiled(*args: Any, **kwargs: Any) -> Any:
            with self.aside():
                out = function(*args, **kwargs)
            self._note(name or function.__name__, tensors_of((args, kwargs, out)))
            return out

        return compiled

    def _note(self, name: str, tensors: list[torch.Tensor]) -> None:
        if not self._quiet and any(map(on_device, tensors)):
            self.ops[self.here][name] += 1
            self.bytes[self.here] += sum(t.numel() * t.element_size() for t in tensors if on_device(t))

    def total(self, part: str = "") -> int:
        """Operations of `part` and of all that lies in it; without a name, of everything."""
        return sum(self.names(part).values())

    def names(self, part: str = "") -> Counter[str]:
        """The same by name."""
        return sum((ops for name, ops in self.ops.items() if lies_in(name, part)), Counter())

    def total_bytes(self, part: str = "") -> int:
        """Bytes of `part` and of all that lies in it, each input and output counted once an operation."""
        return sum(size for name, size in self.bytes.items() if lies_in(name, part))

    def crossed(self, part: str = "") -> list[tuple[str, str]]:
        """The `crossings` of `part` and of all that lies in it."""
        return [found for found in self.crossings if lies_in(found[0], part)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = tensors_of((args, kwargs)), tensors_of(out)
        if any(map(on_device, (*given, *made))):
            if crosses(func, args, given, made):
                self.crossings.append((self.here, str(func)))
            if is_work(func) and not self._quiet:
                self._note(str(func.overloadpacket), [*given, *made])
                self._seen(func, args, out)
        return out


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def lies_in(name: str, part: str) -> bool:
    """Whether the part with the path `name` is `part` or lies in it; every part lies in ""."""
    return not part or name == part or name.startswith(f"{part}/") or f"/{part}/" in f"/{name}/"


def is_work(func: Any) -> bool:
    """Whether an operation starts a kernel or a copy: it is no view and does more than allocate."""
    name = str(func.overloadpacket)
    if func is aten._local_scalar_dense.default:
        return True
    returned = [one.alias_info for one in func._schema.returns]
    view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not view and name.startswith("aten.") and not name.startswith(NOTHING)


def crosses(func: Any, args: tuple, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    """Whether an operation asks the device for a number, or moves tensors between it and the CPU."""
    if func in COPIES:
        return len({t.device.type for t in (*given, *made)}) > 1
    if func in INDEXED:
        indices = [t for t in args[1] if t is not None]
        return any(t.device.type == "cpu" or t.dtype in (torch.bool, torch.uint8) for t in indices)
    return any(tag in func.tags for tag in ASKS)


def over_budget(counted: Mapping[str, int], budget: Mapping[str, int], exact: bool = True) -> list[str]:
    """What is wrong with counts beside the committed ones, a sentence each. A budget only goes down: with `exact`, a count
    below it has to be committed."""
    wrong = [f"{part}: nobody counted it" for part in budget if part not in counted]
    for part, count in counted.items():
        most = budget.get(part)
        if most is None:
            wrong.append(f"{part}: {count}, and no budget")
        elif count > most:
            wrong.append(f"{part}: {count}, and {most} are allowed")
        elif exact and count < most:
            wrong.append(f"{part}: {count} is less than the {most} of the budget; commit the lower number")
    return wrong
