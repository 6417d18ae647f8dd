"""A world beside the demo's, whose first picture is right for as long as a model is trained, and wrong later.

A camera travels over a landscape so slowly that more than half of the first picture is still in view after 81 pictures, and nothing
of it after 481. The landscape has no period: one region follows another, each unlike the two before it. A day lasts 8 training
horizons. In the condition there is the balloon's colour alone. In none: the camera's speed, which each stream draws for itself,
the time of day, and the landscape. Sky, balloon, terrains and their things are those of the demo's world (world.py), whose codec
is used here too.

Pictures are [T, H, W, 3] float32 in 0..1, 16 a second, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adastate_core.prompts.demo_words import VOCABULARY

from .world import (
    BALLOON_COLOURS,
    BALLOON_RADIUS,
    LANTERN_STATES,
    SIZE,
    TERRAIN_COLOURS,
    _box,
    _disc,
    _over,
    _paint_sun_and_moon,
    _standing_things,
    sky_colours,
    sky_light,
)

# 8 training horizons of 80 pictures
DAY_FRAMES = 640
# pixels a picture: after 80 of them 13 to 29 of 64 columns have left, after 480 all have, since 77 to 173 went by
SPEEDS = (0.16, 0.36)
# how far a stream can travel; enough for more than 60 horizons at the highest speed
REACH = 2048
REGION_PIXELS, THING_PIXELS, PATCH_PIXELS, PATCH_WIDTHS = (36.0, 64.0), (28.0, 40.0), (22.0, 34.0), (10.0, 16.0)
# the slots of the vocabulary that the condition gives
SLOTS = ("balloon", "lantern")
# kinds of region: those whose colours the demo's codec has seen
KINDS = tuple(TERRAIN_COLOURS)
HORIZON, FOOT, BORDER = 37.0, 49.0, 10.0
# columns a pixel of the painted landscape, of which a picture's columns are exact means
_FINE = 4
_RIDGE = ((47.3, 3.0), (29.1, 1.4), (83.7, 2.2))


def _spaced(generator: torch.Generator, spacing: tuple[float, float], reach: float) -> torch.Tensor:
    """Places from below 0 to beyond `reach`, at random distances within `spacing`."""
    count = int((reach + 3 * spacing[1]) / spacing[0]) + 2
    steps = spacing[0] + (spacing[1] - spacing[0]) * torch.rand(count, generator=generator)
    return steps.cumsum(0) - 2 * spacing[1]


def _drawn_kinds(generator: torch.Generator, count: int) -> torch.Tensor:
    """[count] kinds of region, each unlike the two before it."""
    kinds: list[int] = []
    for draw in torch.rand(count, generator=generator).tolist():
        others = [kind for kind in range(len(KINDS)) if kind not in kinds[-2:]]
        kinds.append(others[int(draw * len(others))])
    return torch.tensor(kinds)


@dataclass(frozen=True)
class Landscape:
    """What lies along the way, in pixels from the left edge of a stream's first picture.

    Region i has the kind `kinds[i]` and ends at `borders[i]`. `things` stand on the ground; a dark patch of `widths[i]` lies at
    `patches[i]`, by which movement shows. `ridge` are the phases of the far hills.
    """

    borders: torch.Tensor
    kinds: torch.Tensor
    things: torch.Tensor
    patches: torch.Tensor
    widths: torch.Tensor
    ridge: torch.Tensor

    @staticmethod
    def draw(generator: torch.Generator) -> Landscape:
        reach = REACH + SIZE
        borders = _spaced(generator, REGION_PIXELS, reach)
        patches = _spaced(generator, PATCH_PIXELS, reach)
        low, high = PATCH_WIDTHS
        return Landscape(
            borders=borders,
            kinds=_drawn_kinds(generator, len(borders)),
            things=_spaced(generator, THING_PIXELS, reach),
            patches=patches,
            widths=low + (high - low) * torch.rand(len(patches), generator=generator),
            ridge=torch.rand(len(_RIDGE), generator=generator),
        )

    def region(self, x: torch.Tensor) -> torch.Tensor:
        """The number of the region at each place, int64."""
        return torch.searchsorted(self.borders, x.contiguous()).clamp(max=len(self.borders) - 1)

    def colours(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """[N, 3] of the far hills (part 0) or the ground (1) at places [N]; neighbours blend at their border."""
        table = torch.tensor([TERRAIN_COLOURS[kind][part] for kind in KINDS])[self.kinds]
        number = torch.searchsorted(self.borders, (x - BORDER / 2).contiguous()).clamp(max=len(self.borders) - 2)
        share = ((x - self.borders[number]) / BORDER + 0.5).clamp(0, 1)[:, None]
        return torch.lerp(table[number], table[number + 1], share)


@dataclass(frozen=True)
class Scene:
    """One stream. `speed` in pixels a picture, `clock` in days at its first picture."""

    balloon: str
    speed: float
    clock: float
    balloon_phase: float
    landscape: Landscape

    @staticmethod
    def draw(generator: torch.Generator, chunks: int) -> Scene:
        """A random scene, as long as any (`chunks` is what the demo's world asks for)."""
        speed, clock, phase = torch.rand(3, generator=generator).tolist()
        words = VOCABULARY["balloon"]
        balloon = words[int(torch.randint(len(words), (1,), generator=generator))]
        low, high = SPEEDS
        return Scene(balloon, low + (high - low) * speed, clock, phase, Landscape.draw(generator))

    def words(self, chunk: int) -> dict[str, str]:
        """The condition of any chunk: there is no lantern in this world."""
        return {"balloon": self.balloon, "lantern": LANTERN_STATES[1]}

    def truth(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a perfect observer would measure, [T] each: `pan`, pixels travelled since picture 0; `days` that have passed and the
        `clock` that the sky shows; the `kind` of region at the centre column (int64) and how many `borders` have come past it; the
        balloon's place. ValueError for pictures beyond the landscape."""
        frame = frames.float()
        pan = frame * self.speed
        if len(pan) and float(pan.max()) > REACH:
            raise ValueError(
                f"picture {int(frames.max())} lies {float(pan.max()):.0f} pixels away, beyond the landscape's {REACH}"
            )
        swing = 2 * math.pi * (frame / 64 + self.balloon_phase)
        region = self.landscape.region(pan + SIZE / 2)
        return {
            "pan": pan,
            "days": frame / DAY_FRAMES,
            "clock": (self.clock + frame / DAY_FRAMES) % 1.0,
            "kind": self.landscape.kinds[region],
            "borders": region - self.landscape.region(torch.tensor([SIZE / 2])),
            "balloon_x": 18 + 3 * torch.cos(swing / 2),
            "balloon_y": 21 + 5 * torch.sin(swing),
        }


def _painted(landscape: Landscape, start: float, width: float) -> torch.Tensor:
    """The landscape in full light from `start` on, [SIZE, width * _FINE, 4]: colours times cover, and cover."""
    x = start + (torch.arange(math.ceil(width * _FINE)) + 0.5) / _FINE
    y = torch.arange(SIZE)[:, None] + 0.5
    strip = torch.zeros(SIZE, len(x), 4)

    def paint(colour: torch.Tensor, distance: torch.Tensor, columns: slice = slice(None)) -> None:
        strip[:, columns] = _over(
            strip[:, columns], torch.cat([colour, torch.ones(*colour.shape[:-1], 1)], -1), distance
        )

    ridge = HORIZON + sum(
        size * torch.sin(2 * math.pi * (x / length + phase))
        for (length, size), phase in zip(_RIDGE, landscape.ridge.tolist(), strict=True)
    )
    paint(landscape.colours(x, 0)[None], ridge - y)
    foot = FOOT + 1.5 * torch.sin(2 * math.pi * x / 61)
    shown = [p for p in landscape.things.tolist() if x[0] - 16 < p < x[-1] + 16]
    for place in shown:
        near = slice(int(torch.searchsorted(x, place - 12)), int(torch.searchsorted(x, place + 12)))
        kind = KINDS[int(landscape.kinds[landscape.region(torch.tensor([place]))])]
        distances = _standing_things(kind, x[near] - place, y, foot[near])
        for colour, distance in zip(TERRAIN_COLOURS[kind][2:], distances, strict=True):
            paint(torch.tensor(colour)[None, None], distance, near)
    ground = landscape.colours(x, 1)
    paint(ground[None], foot - y)
    gap = (x[:, None] - landscape.patches).abs() - landscape.widths / 2
    paint(0.62 * ground[None], torch.maximum(gap.amin(1), torch.maximum(55.0 - y, y - 59.0)))
    return strip


def render(scene: Scene, frames: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Pictures of the given numbers [T] (int64): [T, SIZE, SIZE, 3] float32 in 0..1. ValueError for another size."""
    if size != SIZE:
        raise ValueError(f"size is {size}; this world has {SIZE}")
    truth = scene.truth(frames)
    start = float(truth["pan"].min()) // 1
    strip = _painted(scene.landscape, start, float(truth["pan"].max()) - start + SIZE + 2)
    # means over a column's width, however it lies: differences of the integral over x, between its samples linear
    integral = torch.cat([torch.zeros(SIZE, 1, 4), strip.cumsum(1)], 1)
    edges = (truth["pan"][:, None] - start + torch.arange(SIZE + 1)) * _FINE
    low = edges.long()
    at = torch.lerp(integral[:, low], integral[:, low + 1], (edges - low)[..., None])
    columns = (at[:, :, 1:] - at[:, :, :-1]).transpose(0, 1) / _FINE

    y = (torch.arange(size) + 0.5)[None, :, None]
    x = (torch.arange(size) + 0.5)[None, None, :]
    clock = truth["clock"]
    sky = sky_colours(clock, torch.arange(size) + 0.5)[:, :, None].expand(-1, -1, size, -1)
    picture = _paint_sun_and_moon(sky, x, y, clock[:, None, None])
    picture = picture * (1 - columns[..., 3:]) + columns[..., :3] * sky_light(clock)[:, None, None, None]
    cx, cy = (truth[name][:, None, None] for name in ("balloon_x", "balloon_y"))
    basket = _box(x - cx, y, 2.5, cy + BALLOON_RADIUS + 1, cy + BALLOON_RADIUS + 5)
    picture = _over(picture, torch.tensor((0.35, 0.22, 0.12)), basket)
    return _over(picture, torch.tensor(BALLOON_COLOURS[scene.balloon]), _disc(x, y, cx, cy, BALLOON_RADIUS)).clamp(0, 1)
