"""The phases of a rollout's cache: what is allocated while one lasts, and what is while one passes into the next.

A layer has a spec, which says how many frames its window keeps in the end, and room for as many of them as can be there in a phase.
From one phase to the next, layers get new buffers one at a time: first those that shrink, then those that grow. A layer's new
buffers are made and filled before the old ones go, so the peak on the way is one layer above what is held before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# buffers that a layer hands on when it is resized, so that they are never there twice
HANDED_ON = ("ema", "replay", "host_ema")


@dataclass(frozen=True)
class Phase:
    """What a part of the rollout asks of the cache.

    `layers`: the spec (LayerSpec) of what each layer keeps in the end. `most_frames`: more than so many latent frames of the video
    are never made while the phase lasts (None: no bound of its own). `absorption_bytes`: what an absorption has on the device
    beside keys and values.
    """

    name: str
    layers: tuple[Any, ...]
    most_frames: int | None = None
    absorption_bytes: int = 0


def least(*bounds: int | None) -> int | None:
    """The smallest bound of those that there are."""
    return min((bound for bound in bounds if bound is not None), default=None)


# a layer's spec, and the one that its buffers are made for
Sized = tuple[Any, Any]


def resizes(before: Iterable[Sized], after: Sequence[Sized]) -> list[int]:
    """Which layers change, in the order in which they do: those that shrink, then those that grow."""
    pairs = list(zip(before, after, strict=True))
    changed = [i for i, (old, new) in enumerate(pairs) if old != new]
    return sorted(changed, key=lambda i: pairs[i][1][1].ring_frames > pairs[i][0][1].ring_frames)
