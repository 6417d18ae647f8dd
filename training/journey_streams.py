"""One stream of the journey, and what is measured of it: the rollout from a true first chunk, its pictures, and its anchor's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from adastate_core.decode.wan_vae import pictures_of
from adastate_core.geometry import WAN21
from adastate_core.measure.attention_share import measure_shares
from adastate_core.measure.metrics import motion, sharpness

from . import journey_measures as measures
from .codec import encode_clip
from .contenders import Contender
from .evaluate import true_segment
from .journey import Scene, render
from .latents import encode
from .measures import balloon_colour_error, sky_reading
from .sheets import decoded
from .world import CHUNK_LATENTS

# what is measured of a stretch of a stream, in the order of the table; the first three from the given start to the stretch's end,
# the others in its last training horizon
DISTANCE, BORDERS, DAYS = "distance, of the true", "borders passed", "day, of the true"
STILL, LIKE, ANCHOR = "still in the first region", "like the first picture", "anchor's picture to the present, dE"
COLUMNS = (
    DISTANCE, BORDERS, DAYS, STILL, LIKE, ANCHOR, "motion, of the true", "sharpness, of the true",
    "sky off its colours, dE", "ground off its colours, dE", "balloon off its colour, dE",
)  # fmt: skip
# of every chunk
CONTENT_ERROR, STATE_ERROR, ANCHOR_SERIES = "content's error, dE", "state's error, dE", "anchor's picture, dE"


@dataclass(frozen=True)
class Rolled:
    """Streams that begin with true latents: content [N, 16, T, h, w] and the first frame of the state after each chunk
    [N, 16, chunks, h, w]; None without a state. After a given chunk that is the chunk's last frame, as the product has it."""

    latents: torch.Tensor
    hidden: torch.Tensor | None

    def of(self, stream: int) -> Rolled:
        return Rolled(*(None if t is None else t[stream : stream + 1] for t in (self.latents, self.hidden)))


def scenes_of(count: int, seed: int) -> list[Scene]:
    return [Scene.draw(torch.Generator().manual_seed(seed + i), 1) for i in range(count)]


def true_start(codec: nn.Module, scenes: list[Scene], latents: int) -> torch.Tensor:
    """The scenes' first latents [N, 16, latents, h, w]; whole chunks."""
    encoder = partial(encode_clip, codec)
    return torch.stack([encode(encoder, scene, latents // CHUNK_LATENTS, render) for scene in scenes])


@torch.no_grad()
def rolled(contender: Contender, scenes: list[Scene], seed: int, start: torch.Tensor, length: int) -> Rolled:
    """The product's rollout of `length` latent frames, of which the first are `start` (whole chunks)."""
    latents, hidden = [], []
    for chunk in contender.rollout(scenes, seed).chunks(length, given=start):
        latents.append(chunk.latents)
        hidden.append(chunk.latents[:, :, -1:] if chunk.hidden is None else chunk.hidden[:, :, :1])
    has_state = contender.anchor["kind"] == "adaptive"
    return Rolled(torch.cat(latents, 2), torch.cat(hidden, 2) if has_state else None)


def last_of_chunks(latents: int) -> list[int]:
    """The number of every chunk's last picture."""
    return [WAN21.pictures(n) - 1 for n in range(CHUNK_LATENTS, latents + 1, CHUNK_LATENTS)]


def true_pictures(scene: Scene, count: int) -> torch.Tensor:
    """The world's own first `count` pictures, without a codec."""
    return torch.cat([render(scene, part) for part in torch.arange(count).split(512)])


@torch.no_grad()
def state_pictures(codec: nn.Module, one: Rolled) -> torch.Tensor | None:
    """[chunks, 64, 64, 3] what the state shows after each chunk, decoded as a picture of its own; None without a state."""
    if one.hidden is None:
        return None
    return torch.cat([decoded(codec, latent[:, None]) for latent in one.hidden[0].unbind(1)])


def stretch(video: torch.Tensor, true: torch.Tensor, scene: Scene, start: int, last: range) -> dict[str, float]:
    """Every column but the anchor's of a stream's pictures [T, 64, 64, 3] from `start`, the last given one, to the end of the
    pictures `last`; `true` are the world's own of those, through the codec."""
    frames = torch.arange(start, last.stop, measures.HOP)
    truth = scene.truth(frames[[0, -1]])
    way, end = video[start : last.stop], video[last.start : last.stop]
    kinds, off = measures.ground_reading(end)
    before = measures.steady(measures.ground_reading(way)[0])
    first = scene.truth(torch.zeros(1, dtype=torch.long))["kind"]
    values = (
        measures.travelled(way)[-1] / (truth["pan"][1] - truth["pan"][0]),
        measures.borders(before)[-1],
        measures.days(way)[-1] / (truth["days"][1] - truth["days"][0]),
        (measures.steady(kinds) == first).float().mean(),
        measures.likeness(end, video[0]).mean(),
        torch.tensor(torch.nan),
        motion(end).mean() / motion(true).mean(),
        sharpness(end).mean() / sharpness(true).mean(),
        sky_reading(end)[1].mean(),
        off.mean(),
        torch.nanmean(balloon_colour_error(end, scene)),
    )
    return {name: float(value) for name, value in zip(COLUMNS, values, strict=True)}


class Streams:
    """The scenes, their true starts and pictures, and what is measured of a contender's stream."""

    def __init__(self, codec: nn.Module, config: dict[str, Any], count: int, lengths: list[int]) -> None:
        self.codec, self.config, self.lengths = codec, config, lengths
        self.scenes = scenes_of(count, config["scenes_seed"])
        self.given, self.horizon = config["given_latents"], config["horizon_latents"]
        self.latents = max(lengths) * self.horizon
        self._true: dict[tuple[int, int], torch.Tensor] = {}

    def rolled(self, contender: Contender) -> Rolled:
        start = true_start(self.codec, self.scenes, self.given)
        return rolled(contender, self.scenes, self.config["seed"], start, self.latents)

    def true(self, stream: int, length: int) -> torch.Tensor:
        """The world's own pictures of the last horizon before `length` horizons, through the codec; made once."""
        if (stream, length) not in self._true:
            segment = range((length - 1) * self.horizon, length * self.horizon)
            made = true_segment(self.codec, self.scenes[stream], segment, render)
            self._true[stream, length] = made.half()
        return self._true[stream, length].float()

    @torch.no_grad()
    def measured(self, one: Rolled | None, has_first: bool, stream: int) -> tuple[dict[str, Any], torch.Tensor]:
        """({"stretches": length -> columns, "series": name -> a value a chunk}, the pictures) of a stream, whose anchor is the
        first picture or not; without a rollout of the world's own pictures, whose last horizon alone goes through the codec."""
        scene, start = self.scenes[stream], WAN21.pictures(self.given) - 1
        if one is None:
            video, states = true_pictures(scene, WAN21.pictures(self.latents)), None
        else:
            video, states = decoded(self.codec, one.latents[0]), state_pictures(self.codec, one)
        series, stretches = self._series(scene, video, states, has_first), {}
        for length in self.lengths:
            last = range(pictures_of((length - 1) * self.horizon), pictures_of(length * self.horizon))
            true = self.true(stream, length)
            shown = torch.cat([video[: last.start], true]) if one is None else video
            first, end = (n * self.horizon // CHUNK_LATENTS for n in (length - 1, length))
            far = series[ANCHOR_SERIES][max(first, self.given // CHUNK_LATENTS) : end]
            stretches[f"{length}x"] = stretch(shown, true, scene, start, last) | {ANCHOR: sum(far) / len(far)}
        return {"stretches": stretches, "series": series}, video

    def _series(
        self, scene: Scene, video: torch.Tensor, states: torch.Tensor | None, has_first: bool
    ) -> dict[str, list[float]]:
        """A value at every chunk's last picture. The anchor that a chunk has seen is the state after the chunk before."""
        numbers, start = torch.tensor(last_of_chunks(self.latents)), WAN21.pictures(self.given) - 1
        present, truth = video[numbers], render(scene, numbers)
        columns = measures.in_view_since(scene, start, numbers)
        anchor = state_error = torch.full((len(numbers),), torch.nan)
        if has_first:
            anchor = measures.picture_distance(present, video[0])
        elif states is not None:
            anchor = measures.picture_distance(present, torch.cat([states[:1], states[:-1]]))
        if states is not None:
            state_error = measures.error(states, truth, columns)
        hop = WAN21.temporal_stride * CHUNK_LATENTS
        way = measures.travelled(video[start : int(numbers[-1]) + 1], hop)
        found = {
            "distance": torch.cat([torch.full((len(numbers) - len(way),), torch.nan), way]),
            LIKE: measures.likeness(present, video[0]),
            "to the first picture, dE": measures.picture_distance(present, video[0]),
            ANCHOR_SERIES: anchor,
            CONTENT_ERROR: measures.error(present, truth, columns),
            STATE_ERROR: state_error,
        }
        return {name: values.tolist() for name, values in found.items()}


@torch.no_grad()
def shares(contender: Contender, scene: Scene, seed: int, chunks: int) -> dict[str, list[dict[str, float]]]:
    """Of a free stream's attention, chunk by chunk and by the frame's place: its share among all frames (`of all`), and of a cached
    one among those (`of the context`, as the paper's figure counts); means over layers."""
    found = measure_shares(contender.rollout([scene], seed), chunks)
    return {
        "of all": [dict(zip(one.labels, one.mean, strict=True)) for one in found],
        "of the context": [dict(zip(one.past.labels, one.past.mean, strict=True)) for one in found],
    }
