"""What a video of the world shows, against what it should: every measure also runs on true renders."""

from __future__ import annotations

import torch

from .world import BALLOON_COLOURS, BALLOON_RADIUS, PACE_PIXELS, TERRAIN_COLOURS, Scene

_ROAD_ROW = 57
_GROUND_ROWS = slice(60, 64)


def balloon_found(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T] bool: a blob of the balloon's colour and about its size where the balloon flies. `video` [T, 64, 64, 3]."""
    region = video[:, 6:36, 4:34]
    near = (region - torch.tensor(BALLOON_COLOURS[scene.balloon])).norm(dim=-1) < 0.25
    area = near.flatten(1).sum(1).float() / (torch.pi * BALLOON_RADIUS**2)
    return (area > 0.4) & (area < 2.0)


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


def pace_right(video: torch.Tensor, scene: Scene) -> torch.Tensor:
    """[T - 8] bool: the pan speed is within 0.25 pixel a frame of the pace."""
    return (pan_speed(video) - PACE_PIXELS[scene.pace]).abs() <= 0.25


def sharpness(video: torch.Tensor) -> torch.Tensor:
    """[T] mean absolute difference of neighbouring pixels."""
    return 0.5 * (video.diff(dim=2).abs().mean((1, 2, 3)) + video.diff(dim=1).abs().mean((1, 2, 3)))


def motion(video: torch.Tensor) -> torch.Tensor:
    """[T - 1] mean absolute difference of neighbouring frames."""
    return video.diff(dim=0).abs().mean((1, 2, 3))
