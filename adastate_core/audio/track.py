"""A track of sound that drives pictures: the sound itself, what an audio encoder made of it, and where the video begins in it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .resampling import places, seconds_of

_NEARLY = 1e-6  # of a frame: seconds are sums of fractions


@dataclass(frozen=True, eq=False)
class Sound:
    """A waveform [C, N], float32 on the CPU, in -1..1, of `rate` samples a second. ValueError for what is no such thing."""

    waveform: torch.Tensor = field(repr=False)
    rate: int

    def __post_init__(self) -> None:
        shape, dtype = list(self.waveform.shape), self.waveform.dtype
        if len(shape) != 2 or not shape[0] or dtype != torch.float32 or self.waveform.device.type != "cpu":
            raise ValueError(f"the waveform is {dtype} {shape}; it must be float32 [channels, samples] on the CPU")
        if self.rate < 1:
            raise ValueError(f"the sound has {self.rate} samples a second; it must have at least 1")

    @property
    def seconds(self) -> float:
        return self.waveform.shape[1] / self.rate

    @cached_property
    def digest(self) -> str:
        """Of what it says, hexadecimal."""
        found = hashlib.sha256(f"sound {self.rate} {tuple(self.waveform.shape)}".encode())
        _add(found, self.waveform)
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class AudioTrack:
    """What a rollout is driven by.

    `layers` is what an audio encoder's layers say, each [1, T50, C], 50 a second (perhaps one object many times); none where it was
    not encoded. `fps`: video frames a second, 0 for as many as the model makes. `offset`: seconds of the sound before the first
    picture; below 0 the pictures begin earlier.
    """

    sound: Sound | None
    layers: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    fps: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.sound is None and not self.layers:
            raise ValueError("a track needs a sound, or what an audio encoder made of it; neither is given")
        shapes = {tuple(layer.shape) for layer in self.layers}
        if len(shapes) > 1 or any(len(shape) != 3 or shape[0] != 1 for shape in shapes):
            raise ValueError(
                f"the layers are {', '.join(map(str, sorted(shapes)))}; all must be [1, T, C] and of one shape"
            )

    @property
    def seconds(self) -> float:
        """How long the sound is, from its own beginning; where there is none, how long its features are."""
        return self.sound.seconds if self.sound is not None else seconds_of(self.layers[0].shape[1])

    def frames(self, fps: float) -> int:
        """Whole video frames that it covers, from the first picture on."""
        return max(0, math.floor((self.seconds - self.offset) * fps + _NEARLY))

    def folded(self, weights: torch.Tensor, fps: float, first: int, count: int) -> torch.Tensor:
        """The sum of weights[l] * layers[l] at the times of video frames `first` .. `first + count`, float32 [count, C] on the CPU.

        Only the rows that these frames need are read. A frame before 0 is taken for frame 0. ValueError for another number of
        weights than layers.
        """
        if len(weights) != len(self.layers) or not self.layers:
            raise ValueError(f"there are {len(weights)} weights for {len(self.layers)} layers")
        at = places(self.layers[0].shape[1], fps, count, first, self.offset)
        rows = at.rows
        total = torch.zeros(len(rows), self.layers[0].shape[2], dtype=torch.float32)
        for layer, weight in self._weighted(weights):
            total.add_(layer[0, rows.start : rows.stop].to("cpu", torch.float32), alpha=weight)
        return at.taken(total, rows.start)

    def _weighted(self, weights: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """Each layer once, with all the weight that it has."""
        sums: dict[int, float] = {}
        for layer, weight in zip(self.layers, weights.tolist(), strict=True):
            sums[id(layer)] = sums.get(id(layer), 0.0) + weight
        return [(layer, sums.pop(id(layer))) for layer in self.layers if id(layer) in sums]

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256(f"track {self.fps!r} {self.offset!r}".encode())
        found.update((self.sound.digest if self.sound is not None else "").encode())
        told: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            if (same := told.setdefault(id(layer), number)) != number:
                found.update(f"as {same}".encode())
            else:
                found.update(f"{layer.dtype} {tuple(layer.shape)}".encode())
                _add(found, layer)
        return found.hexdigest()

    def digest(self) -> str:
        """Of all that it says, hexadecimal: for states, and for whoever keeps what was made of it."""
        return self._digest


def _add(found: hashlib._Hash, values: torch.Tensor) -> None:
    found.update(values.detach().to("cpu").contiguous().view(torch.uint8).numpy())
