"""How far a video of the journey has come, against what it should: distance, landscape, day; and how like it is to its beginning.

Videos are [T, 64, 64, 3] float32 in 0..1. Every measure also runs on true renders, where the answer is known
(tests/training/test_journey_measures.py). Sky and balloon are read as in the demo's world (measures.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from adastate_core.measure.lab_colour import lab

from . import measures
from .journey import KINDS, Scene
from .world import SIZE, TERRAIN_COLOURS, sky_light

# pictures between which a shift is looked for, and the shifts that are tried, in pixels
HOP = 8
_SHIFTS = torch.arange(-6.0, 10.01, 0.25)
# rows below balloon and basket, with hills, things and patches; rows of bare ground; columns around the middle
_TRACKED, _GROUND, _MIDDLE = slice(40, 64), slice(60, 64), slice(28, 36)
# rows of the landscape, for how like two pictures are
_LANDSCAPE = slice(34, 64)
# pictures that a kind of region has to stay for a border to count
_STAYS = 16


def _evened(rows: torch.Tensor) -> torch.Tensor:
    """[N, h, w, 3] with each colour's mean 0 and all their deviation 1 in every picture: without the light of the day."""
    centred = rows - rows.mean((1, 2), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-4)


def _shifted(rows: torch.Tensor, shift: float) -> tuple[torch.Tensor, slice]:
    """[N, h, w, 3] moved to the left by `shift` pixels (between two columns: linear), and the columns that are known."""
    low = int(shift // 1)
    share = shift - low
    first, last = max(0, -low), min(SIZE, SIZE - 1 - low)
    here, right = rows[:, :, first + low : last + low], rows[:, :, first + low + 1 : last + low + 1]
    return torch.lerp(here, right, share), slice(first, last)


def shifts(video: torch.Tensor, hop: int = HOP) -> torch.Tensor:
    """[(T - 1) // hop] pixels that the landscape moved to the left within each `hop` pictures, between -6 and 10.

    The shift whose overlap correlates best, to a fraction of a step by a parabola through its neighbours.
    """
    rows = video[::hop, _TRACKED]
    now, later = rows[:-1], rows[1:]
    costs = []
    for shift in _SHIFTS.tolist():
        moved, columns = _shifted(now, shift)
        costs.append((_evened(later[:, :, columns]) - _evened(moved)).square().mean((1, 2, 3)))
    cost = torch.stack(costs, -1)
    best = cost.argmin(-1)
    inner = best.clamp(1, len(_SHIFTS) - 2)
    before, at, after = (cost.gather(1, (inner + d)[:, None])[:, 0] for d in (-1, 0, 1))
    bend = (before + after - 2 * at).clamp(min=1e-9)
    part = torch.where(best == inner, (0.5 * (before - after) / bend).clamp(-0.5, 0.5), 0.0)
    return _SHIFTS[best] + part * (_SHIFTS[1] - _SHIFTS[0])


def travelled(video: torch.Tensor, hop: int = HOP) -> torch.Tensor:
    """[1 + (T - 1) // hop] pixels travelled since the first picture, at every `hop`-th one."""
    return F.pad(shifts(video, hop).cumsum(0), (1, 0))


def light_of(video: torch.Tensor) -> torch.Tensor:
    """[T] the light on the ground at the time of day that the sky shows."""
    return sky_light(measures.sky_reading(video)[0])


def ground_reading(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([T] kind of region at the middle of the picture, int64; [T] how far the ground's colour there is from that kind's in the
    light of the hour, in Lab). On a border the colours mix, and the distance grows."""
    seen = lab(video[:, _GROUND, _MIDDLE].mean((1, 2)))
    known = torch.tensor([TERRAIN_COLOURS[kind][1] for kind in KINDS])
    distance = (seen[:, None] - lab(known * light_of(video)[:, None, None])).norm(dim=-1)
    nearest = distance.min(1)
    return nearest.indices, nearest.values


def steady(kinds: torch.Tensor, stays: int = _STAYS) -> torch.Tensor:
    """Kinds [T] without those that do not stay for `stays` pictures: they count as the one before."""
    held, out = int(kinds[: 2 * stays].mode().values), []
    runs = torch.unique_consecutive(kinds, return_counts=True)
    for kind, count in zip(*(run.tolist() for run in runs), strict=True):
        held = kind if count >= stays else held
        out += [held] * count
    return torch.tensor(out)


def borders(kinds: torch.Tensor) -> torch.Tensor:
    """[T] how many borders between regions have come past since the first picture, of `steady` kinds [T]."""
    return F.pad((kinds[1:] != kinds[:-1]).long().cumsum(0), (1, 0))


def days(video: torch.Tensor, hop: int = HOP) -> torch.Tensor:
    """[1 + (T - 1) // hop] days that have passed since the first picture, by the sky, at every `hop`-th one."""
    clock, _ = measures.sky_reading(video[::hop])
    return F.pad(((clock.diff() + 0.5) % 1.0 - 0.5).cumsum(0), (1, 0))


def likeness(video: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """[T] correlation of each picture's landscape with that of `picture` [64, 64, 3], place by place, the day's light left out: 1
    for the same view, about 0 for another one. Each colour's mean is left out, so a ground of the same colour is not alike yet."""
    rows, first = _evened(video[:, _LANDSCAPE]), _evened(picture[None, _LANDSCAPE])
    return (rows * first).mean((1, 2, 3))


def picture_distance(video: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """[T] mean Lab distance of each picture's pixels from those of `picture` [64, 64, 3], or of pictures [T, 64, 64, 3]."""
    return (lab(video) - lab(picture)).norm(dim=-1).mean((1, 2))


def in_view_since(scene: Scene, start: int, frames: torch.Tensor) -> torch.Tensor:
    """[T, 64] bool: columns of the truth at `frames` [T] that were in view at picture `start` already."""
    gone = (scene.truth(frames)["pan"] - scene.truth(torch.tensor([start]))["pan"])[:, None]
    return torch.arange(SIZE) + 1 <= SIZE - gone


def error(video: torch.Tensor, truth: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[T] mean Lab distance of pictures from true ones [T, 64, 64, 3] over `columns` [T, 64] bool; NaN where there are none."""
    distance = (lab(video) - lab(truth)).norm(dim=-1).mean(1)
    return (distance * columns).sum(1) / columns.sum(1).where(columns.any(1), torch.nan)
