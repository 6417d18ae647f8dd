"""What a reader of the pack's files takes from a header and of tensors: each by its exact name, type, range, shape, dtype.

Whatever is not as it should be is a `Damage`, a phrase that names the field; what nobody asked for is one too. The reader
makes a sentence of it that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# frames, chunks, layers: no file of the pack counts so far
MOST = 10**9
_FAR = 10.0**12
_BLOCK = 1 << 22


class Damage(ValueError):
    """A phrase such as "next_chunk is 1.5, not a whole number of at least 0"."""


class Unreadable(Damage):
    """The same of a file that is not of the format at all, or cut off."""


def refusal(name: str, error: Exception, what: str) -> ValueError:
    """What to say about file `name`, which should be a `what` and gave `error` (Damage, or that it cannot be opened)."""
    if isinstance(error, Damage) and not isinstance(error, Unreadable):
        return ValueError(f"{name} is damaged: {error}; use another {what.split()[-1]}, or make it again")
    return ValueError(f"{name} cannot be read as a {what}: {error}")


def shown(value: Any) -> str:
    """A stranger's value in a sentence: short, on one line."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    text = text.strip("'\"") if isinstance(value, str) and value.isprintable() and value.strip() else text
    return text if len(text) <= 60 else f"{text[:57]}..."


class Fields:
    """A JSON object's values. `done` at the end refuses what nobody asked for."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise Damage(f"{where or 'its header'} is {shown(values)}, not a table of names and values")
        self.values, self.where = values, where
        self._asked: set[str] = set()

    def path(self, name: str) -> str:
        """How a sentence names a field."""
        return f"{self.where}.{name}" if self.where else name

    def any(self, name: str) -> Any:
        """The value as it is; Damage if it is missing."""
        self._asked.add(name)
        if name not in self.values:
            raise Damage(f"{self.path(name)} is missing")
        return self.values[name]

    def has(self, name: str) -> bool:
        """Whether there is such a field; where there may be none."""
        self._asked.add(name)
        return name in self.values

    def whole(self, name: str, least: int = 0, most: int = MOST) -> int:
        return whole(self.path(name), self.any(name), least, most)

    def number(self, name: str, least: float = -_FAR, most: float = _FAR) -> float:
        return number(self.path(name), self.any(name), least, most)

    def yes_no(self, name: str) -> bool:
        value = self.any(name)
        if type(value) is not bool:
            raise Damage(f"{self.path(name)} is {shown(value)}, not true or false")
        return value

    def text(self, name: str, known: Iterable[str] | None = None) -> str:
        value = self.any(name)
        if not isinstance(value, str):
            raise Damage(f"{self.path(name)} is {shown(value)}, not a text")
        if known is not None and value not in (known := list(known)):
            raise Damage(f"{self.path(name)} is {shown(value)}, not one of {', '.join(known)}")
        return value

    def listed(self, name: str) -> list[Any] | tuple[Any, ...]:
        value = self.any(name)
        if not isinstance(value, list | tuple):
            raise Damage(f"{self.path(name)} is {shown(value)}, not a list")
        return value

    def wholes(self, name: str, least: int = 0, most: int = MOST) -> list[int]:
        return [whole(f"{self.path(name)}[{i}]", one, least, most) for i, one in enumerate(self.listed(name))]

    def inner(self, name: str) -> Fields:
        """A field that is an object itself."""
        return Fields(self.any(name), self.path(name))

    def done(self) -> None:
        """Damage if there is a field that nobody asked for."""
        for name in self.values:
            if name not in self._asked:
                raise Damage(f"it has {shown(self.path(str(name)))}, which this version does not know")


def whole(path: str, value: Any, least: int = 0, most: int = MOST) -> int:
    if type(value) is not int or value < least:
        raise Damage(f"{path} is {shown(value)}, not a whole number of at least {least}")
    if value > most:
        raise Damage(f"{path} is {shown(value)}, not a whole number of at most {most}")
    return value


def number(path: str, value: Any, least: float = -_FAR, most: float = _FAR) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        limits = "" if (least, most) == (-_FAR, _FAR) else f" of at least {least:g}"
        limits += "" if most == _FAR else f" and at most {most:g}"
        raise Damage(f"{path} is {shown(value)}, not a finite number{limits}")
    return value


class Tensors:
    """A file's tensors. `done` at the end refuses what nobody asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str = "") -> None:
        self.tensors, self.where = tensors, where
        self._asked: set[str] = set()

    def path(self, name: str) -> str:
        """How a sentence names a tensor."""
        return f"{self.where}.{name}" if self.where else name

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; where there may be none."""
        self._asked.add(name)
        return name in self.tensors

    def take(
        self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype, positive: bool = False
    ) -> torch.Tensor:
        """A tensor of just this shape (None: any size) and dtype, without NaN or infinity; `positive`: all above 0."""
        if not self.has(name) or not isinstance(self.tensors[name], torch.Tensor):
            raise Damage(f"{self.path(name)} is missing")
        tensor = self.tensors[name]
        fits = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != dtype:
            sizes = ", ".join("any" if n is None else str(n) for n in shape)
            raise Damage(f"{self.path(name)} is {_described(tensor)}, not {_name(dtype)} [{sizes}]")
        check_values(self.path(name), tensor, positive)
        return tensor

    def done(self) -> None:
        """Damage if there is a tensor that nobody asked for."""
        for name in self.tensors:
            if name not in self._asked:
                raise Damage(
                    f"it has a tensor {shown(self.path(name))}, which this version does not know or these settings do not have"
                )


def check_values(path: str, tensor: torch.Tensor, positive: bool = False) -> None:
    """Damage if a tensor holds NaN or infinity, or with `positive` anything that is not above 0."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.dtype == torch.float8_e4m3fn:  # has no infinity
            sound = not bool(((block.view(torch.uint8) & 0x7F) == 0x7F).any())
        elif block.dtype.is_floating_point:
            low, high = (float(one) for one in torch.aminmax(block))
            sound = math.isfinite(low) and math.isfinite(high)
            if sound and positive and low <= 0:
                raise Damage(f"{path} holds values that are not above 0")
        else:
            return
        if not sound:
            raise Damage(f"{path} holds NaN or infinity")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: torch.Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"
