"""The procedural world that the demo model is trained on, with ground truth.

A side-scrolling landscape under a sky whose clock never stands still. A stream is described by a closed
vocabulary (adastate_core/demo_words.py); everything else about it is drawn from a seed:

- in the condition: the terrain, the pace of the camera, the colour of the balloon, and for each chunk
  whether the lantern is up;
- in no condition: the time of day, the shape and offset of the hills, and the colour of the lantern. The
  lantern slides out of the view and comes back in the colour it had, so only a memory can know it.

Pictures are [T, H, W, 3] float32 in 0..1, 16 frames a second; a chunk is 3 latent frames of a codec that
turns frame 0 into one latent and every further 4 frames into one more (Wan 2.1's VAE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adastate_core.prompts.demo_words import VOCABULARY

FPS = 16
SIZE = 64
DAY_FRAMES = 320
CHUNK_LATENTS = 3
LANTERN_COLOURS = {
    "red": (0.93, 0.16, 0.14),
    "green": (0.16, 0.80, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "yellow": (0.98, 0.88, 0.15),
}
LANTERN_CENTRE, LANTERN_RADIUS = (46.0, 18.0), 9.0
# latent rows and columns (8 pixels each) that the lantern fills
LANTERN_CELLS = (slice(1, 3), slice(5, 7))
BALLOON_RADIUS = 8.0
PACE_PIXELS = {"slow": 0.5, "steady": 1.0, "fast": 1.5}
BALLOON_COLOURS = {
    "crimson": (0.80, 0.08, 0.20),
    "gold": (0.98, 0.72, 0.10),
    "white": (0.97, 0.97, 0.97),
    "violet": (0.52, 0.20, 0.78),
}
# terrain: far hills, near ground, things that stand on it (two colours)
TERRAIN_COLOURS = {
    "meadow": ((0.42, 0.62, 0.40), (0.30, 0.66, 0.22), (0.10, 0.42, 0.14), (0.40, 0.26, 0.13)),
    "desert": ((0.80, 0.58, 0.38), (0.90, 0.74, 0.40), (0.22, 0.50, 0.24), (0.22, 0.50, 0.24)),
    "snow": ((0.66, 0.74, 0.86), (0.93, 0.95, 0.99), (0.12, 0.34, 0.30), (0.32, 0.22, 0.16)),
    "city": ((0.46, 0.46, 0.54), (0.40, 0.40, 0.42), (0.72, 0.36, 0.26), (0.95, 0.86, 0.55)),
}
LANTERN_STATES = VOCABULARY["lantern"]
# The sky at eight times of the day (top, horizon, light on the ground); no two neighbours are alike, so that
# the clock can always be read off the picture.
_SKY = torch.tensor(
    [
        [0.55, 0.50, 0.75, 0.98, 0.70, 0.55, 0.80, 0.0, 0.0],
        [0.38, 0.66, 0.96, 0.86, 0.90, 0.90, 0.95, 0.0, 0.0],
        [0.18, 0.50, 0.96, 0.66, 0.86, 0.99, 1.00, 0.0, 0.0],
        [0.26, 0.62, 0.82, 0.90, 0.92, 0.74, 0.95, 0.0, 0.0],
        [0.62, 0.40, 0.55, 0.99, 0.56, 0.24, 0.80, 0.0, 0.0],
        [0.32, 0.14, 0.46, 0.66, 0.24, 0.46, 0.58, 0.0, 0.0],
        [0.04, 0.05, 0.22, 0.14, 0.16, 0.42, 0.45, 0.0, 0.0],
        [0.03, 0.18, 0.28, 0.16, 0.42, 0.46, 0.52, 0.0, 0.0],
    ]
)[:, :7]


def chunk_of_frame(frame: torch.Tensor) -> torch.Tensor:
    """The chunk (of 3 latent frames) that each pixel frame belongs to; frame 0 is a latent of its own."""
    latent = (frame + 3) // 4
    return latent // CHUNK_LATENTS


@dataclass(frozen=True)
class Scene:
    """One stream: the words of its condition and what only its seed decides.

    `lantern` holds one word of `LANTERN_STATES` a chunk; the last one holds for all further chunks.
    """

    terrain: str
    pace: str
    balloon: str
    lantern: tuple[str, ...]
    lantern_colour: str
    clock: float
    hills_phase: float
    ground_phase: float
    balloon_phase: float

    @staticmethod
    def draw(generator: torch.Generator, chunks: int, lantern: tuple[str, ...] | None = None) -> Scene:
        """A random scene. `lantern` fixes the lantern's states, else they come and go at random gaps of 1-3."""

        def pick(words: tuple[str, ...]) -> str:
            return words[int(torch.randint(len(words), (1,), generator=generator))]

        def uniform() -> float:
            return float(torch.rand(1, generator=generator))

        return Scene(
            terrain=pick(VOCABULARY["terrain"]),
            pace=pick(VOCABULARY["pace"]),
            balloon=pick(VOCABULARY["balloon"]),
            lantern=lantern or _draw_lantern(generator, chunks),
            lantern_colour=pick(tuple(LANTERN_COLOURS)),
            clock=uniform(),
            hills_phase=uniform(),
            ground_phase=uniform(),
            balloon_phase=uniform(),
        )

    def words(self, chunk: int) -> dict[str, str]:
        """The condition of one chunk, by slot of the vocabulary."""
        lantern = self.lantern[min(chunk, len(self.lantern) - 1)]
        return {"terrain": self.terrain, "pace": self.pace, "balloon": self.balloon, "lantern": lantern}

    def balloon_rgb(self) -> torch.Tensor:
        """[3] in 0..1: the colour that its word names."""
        return torch.tensor(BALLOON_COLOURS[self.balloon])

    def truth(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a perfect observer would measure: [T] float32 each (pixels at 64x64; `clock` in days)."""
        frame = frames.float()
        swing = 2 * math.pi * (frame / 64 + self.balloon_phase)
        return {
            "pan": frame * PACE_PIXELS[self.pace],
            "clock": (self.clock + frame / DAY_FRAMES) % 1.0,
            "balloon_x": 18 + 3 * torch.cos(swing / 2),
            "balloon_y": 21 + 5 * torch.sin(swing),
            "balloon_radius": torch.full_like(frame, BALLOON_RADIUS),
            "lantern_y": self._lantern_y(frames, LANTERN_CENTRE[1]),
        }

    def _lantern_y(self, frames: torch.Tensor, height: float | torch.Tensor) -> torch.Tensor:
        """Where the lantern is that hangs at `height`: it slides in, or out over the upper edge, in a chunk's first 4 frames."""
        chunks = chunk_of_frame(frames)
        last = len(self.lantern) - 1
        up = torch.tensor([word == LANTERN_STATES[0] for word in self.lantern], dtype=torch.float32)
        now, before = up[chunks.clamp(max=last)], up[(chunks - 1).clamp(0, last)]
        before = torch.where(chunks == 0, now, before)
        first_frame = (chunks * CHUNK_LATENTS * 4 - 3).clamp(min=0)
        progress = ((frames - first_frame + 1).float() / 4).clamp(0, 1)
        share = before + (now - before) * progress
        hidden = -LANTERN_RADIUS - 2
        return hidden + share * (height - hidden)


def _draw_lantern(generator: torch.Generator, chunks: int) -> tuple[str, ...]:
    """Chunk 0 at random, then hidden runs of 1-3 chunks (.35/.40/.25) between showings of 1-2 chunks."""
    states: list[str] = []
    up = bool(torch.rand(1, generator=generator) < 0.5)
    while len(states) < chunks:
        draw = float(torch.rand(1, generator=generator))
        if up:
            run = 1 if draw < 0.5 else 2
        else:
            run = 1 if draw < 0.35 else 2 if draw < 0.75 else 3
        states += [LANTERN_STATES[0] if up else LANTERN_STATES[1]] * run
        up = not up
    return tuple(states[:chunks])


def _over(picture: torch.Tensor, colour: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Paint `colour` where the signed distance (pixels, negative inside) says so, one pixel of antialiasing."""
    cover = (0.5 - distance).clamp(0, 1)[..., None]
    return picture + (colour - picture) * cover


def _disc(
    x: torch.Tensor, y: torch.Tensor, cx: torch.Tensor, cy: torch.Tensor, radius: float | torch.Tensor
) -> torch.Tensor:
    return torch.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius


def _box(x: torch.Tensor, y: torch.Tensor, half_width: float, top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs() - half_width, torch.maximum(top - y, y - bottom))


def _standing_things(terrain: str, u: torch.Tensor, y: torch.Tensor, foot: torch.Tensor) -> list[torch.Tensor]:
    """Signed distances of what stands on the ground around u = 0: (main colour, second colour)."""
    if terrain == "meadow":
        return [_disc(u, y, torch.zeros(()), foot - 11, 6.5), _box(u, y, 1.5, foot - 6, foot + 1)]
    if terrain == "desert":
        arm = _box(u - 5, y, 1.5, foot - 12, foot - 5)
        joint = _box(u - 3, y, 3.0, foot - 7, foot - 4)
        return [_box(u, y, 2.5, foot - 15, foot + 1), torch.minimum(arm, joint)]
    if terrain == "snow":
        slope = (u.abs() * 2.2 - (y - (foot - 17))) / 2.4
        return [torch.maximum(slope, y - (foot - 3)), _box(u, y, 1.5, foot - 3, foot + 1)]
    return [_box(u, y, 7.0, foot - 15, foot + 1), _box(u, y, 2.5, foot - 11, foot - 5)]


def _sky(clock: torch.Tensor) -> torch.Tensor:
    """[N, 7]: the rows of the sky's table at times of the day [N] (0..1)."""
    day = clock * len(_SKY)
    low = day.long() % len(_SKY)
    return torch.lerp(_SKY[low], _SKY[(low + 1) % len(_SKY)], (day - day.floor())[:, None])


def sky_light(clock: torch.Tensor) -> torch.Tensor:
    """[N] light on the ground at times of the day [N] (0..1)."""
    return _sky(clock)[:, 6]


def sky_colours(clock: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The clear sky at times of the day [N] (0..1) and heights [M] in pixels: [N, M, 3]."""
    sky = _sky(clock)
    return torch.lerp(sky[:, None, 0:3], sky[:, None, 3:6], (rows / 44).clamp(0, 1)[:, None])


def render(scene: Scene, frames: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Pictures of the given frame numbers [T] (int64): [T, size, size, 3] float32 in 0..1."""
    truth = {name: value[:, None, None] for name, value in scene.truth(frames).items()}
    grid = (torch.arange(size) + 0.5) * (SIZE / size)
    y, x = grid[None, :, None], grid[None, None, :]
    day = truth["clock"] * len(_SKY)
    low = day.long() % len(_SKY)
    sky = torch.lerp(_SKY[low], _SKY[(low + 1) % len(_SKY)], (day - day.floor())[..., None])
    top, horizon, light = sky[..., 0:3], sky[..., 3:6], sky[..., 6:7]
    picture = torch.lerp(top, horizon, (y / 44).clamp(0, 1)[..., None].expand(len(frames), size, size, 1))
    picture = _paint_sun_and_moon(picture, x, y, truth["clock"])
    far, near, main, second = (torch.tensor(c) * light for c in TERRAIN_COLOURS[scene.terrain])
    hills = 37 + 4.5 * torch.sin(2 * math.pi * ((x + 0.5 * truth["pan"]) / 64 + scene.hills_phase))
    picture = _over(picture, far, hills - y)
    offset = x + truth["pan"] + 64 * scene.ground_phase
    u = offset % 32 - 16
    foot = 49 + 1.5 * torch.sin(2 * math.pi * offset / 64)
    for colour, distance in zip((main, second), _standing_things(scene.terrain, u, y, foot), strict=True):
        picture = _over(picture, colour, distance)
    picture = _over(picture, near, foot - y)
    picture = _over(picture, near * 0.62, _box(u, y, 7.0, torch.tensor(55.0), torch.tensor(59.0)))
    return _paint_flyers(picture, scene, x, y, truth).clamp(0, 1)


def _paint_sun_and_moon(picture: torch.Tensor, x: torch.Tensor, y: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
    for rise, colour, radius in ((0.98, (1.0, 0.93, 0.45), 5.5), (0.50, (0.90, 0.92, 0.98), 4.5)):
        path = ((clock - rise) % 1.0) / 0.56
        disc = _disc(x, y, -8 + 80 * path, 32 - 24 * torch.sin(math.pi * path.clamp(0, 1)), radius)
        picture = _over(picture, torch.tensor(colour), disc)
    return picture


def _paint_flyers(
    picture: torch.Tensor, scene: Scene, x: torch.Tensor, y: torch.Tensor, truth: dict[str, torch.Tensor]
) -> torch.Tensor:
    lantern = torch.tensor(LANTERN_COLOURS[scene.lantern_colour])
    picture = _over(picture, lantern, _disc(x, y, torch.tensor(LANTERN_CENTRE[0]), truth["lantern_y"], LANTERN_RADIUS))
    cx, cy, radius = truth["balloon_x"], truth["balloon_y"], truth["balloon_radius"]
    basket = _box(x - cx, y, 2.5, cy + radius + 1, cy + radius + 5)
    picture = _over(picture, torch.tensor((0.35, 0.22, 0.12)), basket)
    return _over(picture, scene.balloon_rgb(), _disc(x, y, cx, cy, radius))
