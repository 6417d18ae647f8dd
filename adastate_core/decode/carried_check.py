"""What a streaming decoder carries, from a file: numbered tensors without a gap, of one floating point type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..files.header_check import Damage, check_values

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def carried(
    values: Mapping[str, Any], prefix: str, dims: int, seen: int, marks: Sequence[int] = ()
) -> dict[int, torch.Tensor]:
    """The tensors `prefix`0, 1, ... among `values`, by number, of `dims` axes each, all of one batch and dtype; `marks` are
    numbers in whose place there is none. Damage for anything else, and where there are some but no latent was `seen`."""
    found = {name: value for name, value in values.items() if name.startswith(prefix)}
    numbers: dict[int, str] = {i: f"{prefix}{i}" for i in range(len(found) + len(marks)) if f"{prefix}{i}" in found}
    for name in found:
        if name not in numbers.values():
            raise Damage(f"{name} is there, but not all that come before it")
    for i in range(len(numbers) + len(marks)):
        if (i in numbers) == (i in marks):
            raise Damage(f"{prefix}{i} is {'marked as empty too' if i in numbers else 'missing'}")
    if bool(seen) != bool(numbers):
        raise Damage(f"{prefix}0 is {'there' if numbers else 'missing'}, and {seen} latents were decoded")
    tensors = {i: found[name] for i, name in sorted(numbers.items())}
    first = next(iter(tensors.values()), None)
    for i, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != dims or tensor.dtype not in FLOATS:
            raise Damage(f"{prefix}{i} is not {dims}-dimensional floating point")
        if tensor.dtype != first.dtype or tensor.shape[0] != first.shape[0]:
            raise Damage(f"{prefix}{i} has another dtype or batch than the first")
        check_values(f"{prefix}{i}", tensor)
    return tensors
