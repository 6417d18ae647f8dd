"""A device that is not there: it has neither float64 nor complex numbers, and its tensors do not mix with the CPU's.

    with NoDoubleDevice() as device:
        rollout = ... model_on(device, TinyModel()) ...

Its tensors say that they lie on `privateuseone`, the name that torch has for devices that it does not know, and are computed
on the CPU, so that real numbers come out and can be compared. What
Apple's GPUs refuse is refused: a result in float64 or complex numbers, and an operation over tensors of both devices, but
for copies, CPU indices and CPU scalars. The operators themselves are the CPU's: an operator that the device lacks is not
found here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

DEVICE = torch.device("privateuseone", 0)
REFUSED = (torch.float64, torch.complex32, torch.complex64, torch.complex128)
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Held(torch.Tensor):
    """A tensor of the device: `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Held:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Held({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OutOfOrder(_DummyBackendModule):
    def is_available(self) -> bool:
        return False


class OutOfOrderHook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


class NoDoubleDevice(TorchDispatchMode):
    """While it is entered, tensors may be made on DEVICE."""

    def __enter__(self) -> torch.device:
        _register()
        # torch.tensor(numbers, device=...) makes them on the CPU, and the copy that follows is seen here
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return DEVICE

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lift)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@functools.cache
def _register() -> None:
    """Tell torch that there is such a device: it asks for the guard of one before it indexes.

    It is said to be out of order, so that nothing else (torch.accelerator, other fake devices) counts on it.
    """
    _setup_privateuseone_for_python_backend(backend_module=OutOfOrder(), hook=OutOfOrderHook())


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operator: on the numbers, and what it gives on the device that it belongs to."""
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    held = [t for t in tensors if isinstance(t, Held)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if not held and (asked is None or asked.type != DEVICE.type):
        return func(*args, **kwargs)
    _check_places(func, args, tensors, held)
    here = asked.type == DEVICE.type if asked is not None else True
    inner = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
    inner_args, inner = tree_map(lambda t: t.inner if isinstance(t, Held) else t, (args, inner))
    out = func(*inner_args, **inner)
    written = [a for a, one in zip(args, func._schema.arguments, strict=False) if _written(one)]
    written += [kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and _written(a)]
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(lambda t: _given(func, t) if here and isinstance(t, torch.Tensor) else t, out)


def _given(func: Any, out: torch.Tensor) -> Held:
    if out.dtype in REFUSED:
        raise TypeError(
            f"{func}: cannot make a tensor of {out.dtype} on the {DEVICE.type} device, which does not have it"
        )
    return Held(out)


def _check_places(func: Any, args: tuple, tensors: list[torch.Tensor], held: list[torch.Tensor]) -> None:
    if func in CROSSING or not held:
        return
    if func in INDEXING:
        tensors = [args[0], *(args[2:3] if len(args) > 2 else ())]
    if any(not isinstance(t, Held) and t.dim() for t in tensors) and any(isinstance(t, Held) for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors on one device, found them on {DEVICE} and the CPU")
    if func not in INDEXING and not isinstance(tensors[0], Held) and _written(func._schema.arguments[0]):
        raise RuntimeError(f"{func}: writes what lies on {DEVICE} to the CPU")


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def model_on(device: torch.device, model: nn.Module) -> nn.Module:
    """`model` with its weights on `device`, where its rollouts then run."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach().to(device))
    model.device = device
    return model
