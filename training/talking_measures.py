"""What a video of the world that speaks shows of its sound and of its reference: every measure also runs on true renders."""

from __future__ import annotations

import torch

from .measures import balloon_mask
from .world import LANTERN_CENTRE, LANTERN_COLOURS, LANTERN_RADIUS, Scene

# rows and columns in which the lantern hangs, with its radius and a few pixels around
_LANTERN_REGION = (
    slice(0, 40),
    slice(int(LANTERN_CENTRE[0] - LANTERN_RADIUS) - 2, int(LANTERN_CENTRE[0] + LANTERN_RADIUS) + 2),
)
# distance in RGB up to which a pixel has the lantern's colour (the sky comes as near as 0.153 to the blue one), and how many of
# them are a lantern
_NEAR_ENOUGH, _LEAST = 0.14, 60


def balloon_radius(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T] pixels: the radius of a disc as large as what has the balloon's colour where it flies."""
    return (balloon_mask(video, scene).flatten(1).sum(1).float() / torch.pi).sqrt()


def _lantern_masks(video: torch.Tensor) -> dict[str, torch.Tensor]:
    """By colour, [T, rows, columns] bool: the pixels that have it where lanterns hang."""
    region = video[:, _LANTERN_REGION[0], _LANTERN_REGION[1]]
    return {name: (region - torch.tensor(c)).norm(dim=-1) < _NEAR_ENOUGH for name, c in LANTERN_COLOURS.items()}


def lantern_height(video: torch.Tensor) -> torch.Tensor:
    """[T] row of the middle of the lantern, whichever its colour; NaN where there is none."""
    masks = torch.stack(list(_lantern_masks(video).values()))
    counts = masks.flatten(2).sum(2)
    mask = masks[counts.argmax(0), torch.arange(len(video))].float()
    rows = torch.arange(mask.shape[1]) + 0.5
    height = (mask.sum(2) * rows).sum(1) / mask.sum((1, 2)).clamp(min=1)
    return torch.where(counts.amax(0) >= _LEAST, height, torch.nan)


def lantern_right(video: torch.Tensor, colour: str) -> torch.Tensor:
    """[T] bool: there is a lantern, and it has this colour rather than another one."""
    counts = {name: mask.flatten(1).sum(1) for name, mask in _lantern_masks(video).items()}
    others = torch.stack([count for name, count in counts.items() if name != colour])
    return (counts[colour] >= _LEAST) & (counts[colour] > others.amax(0))


def follows(seen: torch.Tensor, told: torch.Tensor) -> float:
    """Pearson's correlation of two tracks [T] over the frames where `seen` is known; NaN below a dozen of them, 0 where
    one of the two does not move."""
    known = ~seen.isnan()
    if int(known.sum()) < 12:
        return float("nan")
    a, b = (t[known].double() - t[known].double().mean() for t in (seen, told))
    size = (a.square().sum() * b.square().sum()).sqrt()
    return 0.0 if size < 1e-9 else float((a * b).sum() / size)
