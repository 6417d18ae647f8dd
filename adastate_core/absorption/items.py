"""A batch: every item has statistics and a correction of its own, although all of them share the choice of layers.

In states of earlier packs all items of a batch have one. It stays what it was: the statistics are those of all rows together, and
the correction is the same for every item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .collector import Collector
from .solve import Correction, Fit


class Collectors:
    """A Collector for each item of a batch, or one for the rows of all items together. All of them collect the same chunks."""

    def __init__(self, each: Sequence[Collector]) -> None:
        self.each = tuple(each)

    @property
    def chunks(self) -> int:
        """Whole chunks."""
        return self.each[0].chunks

    @property
    def layers(self) -> tuple[int, ...]:
        return self.each[0].layers

    def start_chunk(self) -> None:
        """Forget what a chunk that was not finished has added."""
        for one in self.each:
            one.start_chunk()

    def add(self, layer: int, local: torch.Tensor, full: torch.Tensor) -> None:
        """Rows of one pass, [B, N, d] each."""
        if len(self.each) == 1:
            self.each[0].add(layer, local, full)
            return
        for item, one in enumerate(self.each):
            one.add(layer, local[item : item + 1], full[item : item + 1])

    def joins(self) -> list[tuple[int, Callable[[], None]]]:
        """(layer, write) as a Collector's, of every item."""
        return [step for one in self.each for step in one.joins()]

    def close_chunk(self) -> None:
        """The chunk under way is whole."""
        for one in self.each:
            one.close_chunk()

    def of(self, layers: Iterable[int]) -> Collectors:
        """Those of only these `layers`, with what has been collected so far."""
        layers = tuple(layers)
        return Collectors([one.of(layers) for one in self.each])

    def state(self) -> dict[str, Any]:
        """Whole chunks' moments as flat tensors, and their number. Where each item has its own, there is a first dimension."""
        states = [one.state() for one in self.each]
        if len(states) == 1:
            return states[0]
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0] if name != "chunks"}
        return {"chunks": self.chunks} | stacked

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave for as many items; ValueError if a tensor is missing or has another shape."""
        many = len(self.each) > 1
        for item, one in enumerate(self.each):
            one.restore({name: t[item] if many and isinstance(t, torch.Tensor) else t for name, t in state.items()})


def together(fits: Sequence[Fit]) -> Fit:
    """The fit of a layer of several items, with their corrections along a first dimension. Residual and discrepancy are the items'
    means, the ridge is the largest, and `items` are the items' own. The fit of a single item is that item's."""
    if len(fits) == 1:
        return fits[0]
    corrections = [fit.correction for fit in fits]
    stacked = None if corrections[0] is None else stack(corrections)
    mean = [sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("residual", "discrepancy")]
    return Fit(stacked, max(fit.ridge for fit in fits), *mean, figures(fits), any(fit.towards for fit in fits))


def figures(fits: Sequence[Fit]) -> tuple[tuple[float, float, float], ...]:
    """(ridge, residual, discrepancy) of each."""
    return tuple((fit.ridge, fit.residual, fit.discrepancy) for fit in fits)


def apart(fit: Fit, items: int) -> list[Fit]:
    """The fits of a layer's single items. If there is one for all, each of them has that one."""
    if not fit.items:
        return [fit] * items
    return [
        Fit(fit.correction and of_item(fit.correction, i), *one, towards=fit.towards) for i, one in enumerate(fit.items)
    ]


def stack(corrections: Sequence[Correction]) -> Correction:
    """Corrections of single items as one, with the items along a first dimension."""
    if len(corrections) == 1:
        return corrections[0]
    parts = zip(*(one.parts() for one in corrections), strict=True)
    return Correction(*(None if part[0] is None else torch.stack(part) for part in parts))


def of_item(correction: Correction, item: int) -> Correction:
    """One item's part of a correction that each item has its own of."""
    return Correction(*(None if part is None else part[item] for part in correction.parts()))
