"""The shapes that everything else is counted in: of the latents that a VAE makes, and of a causal Wan model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatentSpace:
    """What a VAE's latents are to its pictures, and how a model takes them.

    `channels` C of a latent; `stride` and `temporal_stride`, pictures' pixels and pictures a latent one; `patch`, latent
    pixels a token's side; `latent_format`, the name of the host's class that scales them; `fps`, the rate of what the models
    were trained on. The first latent frame is one picture.
    """

    name: str
    channels: int
    stride: int
    temporal_stride: int
    patch: int
    latent_format: str
    fps: float

    @property
    def multiple(self) -> int:
        """What a picture's sides are multiples of, in pixels."""
        return self.stride * self.patch

    def pictures(self, latents: int) -> int:
        """How many pictures so many latent frames are, from the first one on."""
        return self.temporal_stride * (latents - 1) + 1 if latents > 0 else 0

    def latents(self, pictures: int) -> int:
        """How many whole latent frames so many pictures are; what is beyond them is left out."""
        return (pictures - 1) // self.temporal_stride + 1 if pictures > 0 else 0

    def whole(self, pictures: int) -> int:
        """The most pictures, up to `pictures`, that are whole latent frames."""
        return self.pictures(self.latents(pictures))

    def shape(self, batch: int, pictures: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """[B, C, T, h, w] of so many pictures of a size in pixels."""
        return batch, self.channels, self.latents(pictures), height // self.stride, width // self.stride

    def size_like(self, width: int, height: int, pixels: int) -> tuple[int, int]:
        """(width, height) of a video of `pixels` pixels or a little less, in the shape of a picture of `width` by `height`.

        Of the multiples on both sides of the lengths that have just this area and this shape: those nearest to the shape, without
        more pixels. A shape so long that a side would be less than one multiple is made shorter.
        """
        exact = (math.isqrt(pixels * width // height), math.isqrt(pixels * height // width))
        across, down = (max(1, side // self.multiple) for side in exact)
        sizes = [(self.multiple * w, self.multiple * h) for w in (across, across + 1) for h in (down, down + 1)]
        within = [size for size in sizes if math.prod(size) <= pixels] or sizes[:1]
        return min(within, key=lambda size: (abs(math.log(size[0] * height / (size[1] * width))), -math.prod(size)))

    def side_like(self, side: int, along: int, other: int) -> int:
        """The side, a multiple, that goes with `side` in the shape of a picture that has `along` there and `other` here."""
        return max(1, round(side * other / along / self.multiple)) * self.multiple

    def seconds(self, latents: float, fps: float) -> float:
        """How long so many latent frames are on screen at `fps` pictures a second."""
        return latents * self.temporal_stride / fps


WAN21 = LatentSpace("Wan 2.1", 16, 8, 4, 2, "Wan21", 16.0)
# of the 5B line (TI2V): its VAE, of 12 channels in patches of 2, has twice the stride
WAN22 = LatentSpace("Wan 2.2", 48, 16, 4, 2, "Wan22", 24.0)
SPACES = {space.name: space for space in (WAN21, WAN22)}


def space_of(spec: dict[str, Any]) -> LatentSpace:
    """The latent space of a state's spec (RolloutSpec.describe); those of before name none, and are of Wan 2.1."""
    return SPACES[spec.get("geometry", {}).get("space", WAN21.name)]


def space_with(channels: int) -> LatentSpace | None:
    """The latent space whose latents have so many channels; None if there is none."""
    return next((space for space in SPACES.values() if space.channels == channels), None)


@dataclass(frozen=True)
class ModelGeometry:
    """The shape of a causal Wan model: latent channels, layers, heads, channels a head, spatial patch; and the latent space
    that it works in."""

    channels: int
    layers: int
    heads: int
    head_dim: int
    patch: int = 2
    space: LatentSpace = WAN21

    def describe(self) -> dict[str, Any]:
        """JSON-able. The space is left out where it is Wan 2.1's: states of before do not name it."""
        names = ("channels", "layers", "heads", "head_dim", "patch")
        described: dict[str, Any] = {name: getattr(self, name) for name in names}
        return described if self.space == WAN21 else described | {"space": self.space.name}
