"""Features of sound, 50 a second as wav2vec2 gives them, at the times of a video's frames.

As Wan 2.2's S2V and the host (wan_sound_to_video) do it: 50 a second become 30 by linear interpolation whose two ends are the
track's, and a video frame takes the nearest of those; beyond the track there is nothing but zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EAR_RATE, PICTURE_RATE = 50, 30


def seconds_of(features: int) -> float:
    """Seconds that so many features stand for."""
    return features / EAR_RATE


@dataclass(frozen=True)
class Places:
    """Where in a track of features some video frames lie: between row `lower` and row `upper`, `share` of the latter; int64 and
    float64 [count]. `inside`: whether there is sound then, bool [count]."""

    lower: torch.Tensor
    upper: torch.Tensor
    share: torch.Tensor
    inside: torch.Tensor

    @property
    def rows(self) -> range:
        """All rows that they need, none where all frames lie outside."""
        if not self.inside.any():
            return range(0)
        return range(int(self.lower[self.inside].min()), int(self.upper[self.inside].max()) + 1)

    def taken(self, rows: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """The frames' features [count, C], float32, of the track's rows [n, C] from row `begin` on."""
        out = torch.zeros(len(self.inside), rows.shape[1], dtype=torch.float32)
        lower, upper = (rows[places[self.inside] - begin].float() for places in (self.lower, self.upper))
        out[self.inside] = torch.lerp(lower, upper, self.share[self.inside].float()[:, None])
        return out


def places(length: int, fps: float, count: int, first: int = 0, offset: float = 0.0) -> Places:
    """Where video frames `first` .. `first + count` lie in a track of `length` features; a frame before 0 lies where frame 0 does.

    `offset`: seconds of sound before video frame 0. ValueError for fps that are not above 0.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    made = int(length / float(EAR_RATE) * PICTURE_RATE)  # in floats, as the host counts
    frames = torch.arange(first, first + count, dtype=torch.float64).clamp(min=0)
    nearest = ((frames / fps + offset) * PICTURE_RATE).round()  # half to even
    inside = (nearest >= 0) & (nearest < made)
    step = (length - 1) / (made - 1) if made > 1 else 0.0
    at = nearest.clamp(0, max(made - 1, 0)) * step
    lower = at.floor().clamp(max=max(length - 1, 0))
    upper = (lower + 1).clamp(max=max(length - 1, 0))
    return Places(lower.long(), upper.long(), at - lower, inside)


def frame_features(features: torch.Tensor, fps: float, count: int, first: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Features [T50, C] at the times of video frames `first` .. `first + count`, float32 [count, C]; see `places`."""
    return places(len(features), fps, count, first, offset).taken(features)
