"""What a video of the world shows, against what it should: every measure also runs on true renders.

Videos are [T, 64, 64, 3] float32 in 0..1. Colours are compared in CIE Lab (D65), where a distance of 1 is about what an
eye can just tell apart.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from adastate_core.measure.lab_colour import lab
from adastate_core.measure.metrics import motion

from .world import BALLOON_COLOURS, BALLOON_RADIUS, DAY_FRAMES, PACE_PIXELS, TERRAIN_COLOURS, Scene, sky_colours

_ROAD_ROW = 57
_GROUND_ROWS = slice(60, 64)
_BALLOON_REGION = (slice(6, 36), slice(4, 34))
# rows of pure sky, high and low, and the columns right of the balloon
_SKY_ROWS, _SKY_COLUMNS = (slice(0, 3), slice(28, 31)), slice(30, 64)


def balloon_mask(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T, rows, columns] bool: what has the balloon's colour where it flies."""
    region = video[:, _BALLOON_REGION[0], _BALLOON_REGION[1]]
    return (region - torch.tensor(BALLOON_COLOURS[scene.balloon])).norm(dim=-1) < 0.25


def balloon_found(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T] bool: a blob of the balloon's colour and about its size where the balloon flies."""
    area = balloon_mask(video, scene).flatten(1).sum(1).float() / (torch.pi * BALLOON_RADIUS**2)
    return (area > 0.4) & (area < 2.0)


def balloon_place(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T, 2] x and y of the blob's centre in pixels; NaN where there is none."""
    mask = balloon_mask(video, scene).float()
    rows, columns = (torch.arange(s.start, s.stop) + 0.5 for s in _BALLOON_REGION)
    weight = mask.sum((1, 2))
    place = torch.stack([(mask * columns).sum((1, 2)), (mask * rows[:, None]).sum((1, 2))], -1) / weight[:, None]
    return torch.where((weight > 20)[:, None], place, torch.nan)


def balloon_travel(video: torch.Tensor, scene: Scene) -> float:
    """How far the balloon's centre comes in 8 frames, mean in pixels; NaN if it is never found twice."""
    place = balloon_place(video, scene)
    return torch.nanmean((place[8:] - place[:-8]).norm(dim=-1)).item()


def balloon_colour_error(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T] Lab distance between the blob's mean colour and the balloon's; NaN where there is none."""
    mask = balloon_mask(video, scene)[..., None].float()
    region = video[:, _BALLOON_REGION[0], _BALLOON_REGION[1]]
    mean = (region * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    distance = (lab(mean) - lab(torch.tensor(BALLOON_COLOURS[scene.balloon]))).norm(dim=-1)
    return torch.where(mask.sum((1, 2, 3)) > 20, distance, torch.nan)


def terrain_right(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T] bool: the ground's hue is nearest to that of the scene's terrain (brightness follows the clock)."""
    ground = video[:, _GROUND_ROWS].mean((1, 2))
    directions = torch.stack([torch.tensor(c[1]) / torch.tensor(c[1]).norm() for c in TERRAIN_COLOURS.values()])
    hue = ground / ground.norm(dim=-1, keepdim=True).clamp(min=1e-4)
    brightness = torch.stack([torch.tensor(c[1]).norm() for c in TERRAIN_COLOURS.values()])
    distance = (hue[:, None] - directions).norm(dim=-1)
    # snow and city are both grey: tell them apart by how bright the ground is against the sky's light
    light = (ground.norm(dim=-1, keepdim=True) - brightness * 0.75).abs()
    return (distance + 0.3 * light).argmin(-1) == list(TERRAIN_COLOURS).index(scene.terrain)


def pan_speed(video: torch.Tensor) -> torch.Tensor:
    """[T - 8] pixels a frame: the shift of the road within 8 frames that fits best, between 0 and 16."""
    road = video[:, _ROAD_ROW].mean(-1)
    road = road - road.mean(-1, keepdim=True)
    later, now = road[8:], road[:-8]
    scores = []
    for shift in range(17):
        a, b = later[:, : 64 - shift], now[:, shift:]
        scores.append((a * b).mean(-1) / (a.square().mean(-1) * b.square().mean(-1)).sqrt().clamp(min=1e-6))
    return torch.stack(scores, -1).argmax(-1) / 8


def flow_error(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T - 8] pixels a frame: how far the ground's flow is from the world's."""
    return (pan_speed(video) - PACE_PIXELS[scene.pace]).abs()


def pace_right(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T - 8] bool: the ground's flow is within 0.25 pixel a frame of the pace."""
    return flow_error(video, scene) <= 0.25


@lru_cache
def _skies() -> torch.Tensor:
    """[160, 2, 3] Lab colours of the sky's two strips over a day."""
    rows = torch.stack([torch.arange(s.start, s.stop).float().mean() + 0.5 for s in _SKY_ROWS])
    return lab(sky_colours(torch.arange(160) / 160, rows))


def sky_reading(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([T] time of the day in 0..1 that the sky shows best, [T] how far its colours are from that, in Lab)."""
    strips = [video[:, rows, _SKY_COLUMNS].flatten(1, 2).median(1).values for rows in _SKY_ROWS]
    seen = lab(torch.stack(strips, 1))
    distance = (seen[:, None] - _skies()).norm(dim=-1).mean(-1)
    best = distance.min(1)
    return best.indices / len(_skies()), best.values


def clock_rate(video: torch.Tensor) -> float:
    """How fast the day passes, in the world's days: 1 as it should, 0 frozen, below 0 backwards."""
    clock, _ = sky_reading(video)
    hop = 16
    passed = (clock[hop:] - clock[:-hop] + 0.5) % 1.0 - 0.5
    return (passed.mean() / (hop / DAY_FRAMES)).item()


def seam(video: torch.Tensor, first_frame: int = 0, chunk_frames: int = 12) -> float:
    """Motion from the last frame of a chunk to the first of the next, against motion elsewhere; 1 without seams.

    `first_frame` is the number of the video's first frame in its stream. Chunks have `chunk_frames` frames, the first one 3 fewer.
    """
    moved = motion(video)
    border = (torch.arange(1, len(moved) + 1) + first_frame - (chunk_frames - 3)) % chunk_frames == 0
    return (moved[border].mean() / moved[~border].mean()).item()
