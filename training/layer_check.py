"""Does the choice of layers leave those alone that a video needs? Held against leaving each layer alone without its history.

On streams of their own, in every pass of many chunks: dropped (the layer sees its local part alone) and corrected (as absorption
leaves it). The error is that of the latents, against the full history of the same stream. In the *closed* loop a layer stays alone
from the switch on, and the stream goes on from what it made: errors then hold what was lost and how far two videos drift apart. In
the *open* loop every chunk has the full history's own past: errors hold what was lost alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adastate_core.absorption.corrections import Trial
from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.absorption.solve import Solution
from adastate_core.prompts.demo_words import prompt
from adastate_core.rollout import Rollout

from .bare_model import BareModel
from .contenders import collected
from .recall import ColourJudge
from .recall_rows import Roller, Row, Warm
from .returning_lantern import colours_of, returning_scenes
from .world import CHUNK_LATENTS

# how a layer is left alone, and whether a correction stands in
WAYS = {"dropped": False, "corrected": True}


def sensitivities(report: dict[str, Any]) -> list[float]:
    """By layer, what the choice went by: small ones are switched first."""
    return [entry["change"] for entry in report["residuals"]]


class LayerCheck:
    """One model's streams. `row`: its anchor. `judge`: of a model that makes lanterns; None: colours are not looked at."""

    # what is measured, each part by an entry that it gives; the last is the closed loop
    PARTS = ("moved", "open dropped", "dropped")
    CLOSED = PARTS[-1]

    def __init__(
        self, model: nn.Module, config: dict[str, Any], streams: int, judge: ColourJudge | None, row: Row | None = None
    ) -> None:
        check, self.config, self.judge = config["check"], config, judge
        self.row = row or Row("")
        self.first = config["absorption"]["warmup_frames"] // CHUNK_LATENTS
        self.chunks = self.first + check["chunks"]
        shown = self.shown = range(1, self.chunks, 3)
        self.scenes = returning_scenes(streams, check["scenes_seed"], self.chunks, shown)
        bare = BareModel(model, prompt(self.scenes[0].words(0)))
        self.roller = Roller(bare, config, check["seed"], self.chunks)
        self.layers = bare.geometry.layers
        self._warm: tuple[int, dict[AbsorptionSettings, Warm]] = -1, {}

    def part(self, name: str, stream: int) -> dict[str, Any]:
        """One of PARTS of what is measured of a stream, JSON-able."""
        return {"moved": self.choice, "open dropped": self.open_loop, "dropped": self.closed_loop}[name](stream)

    def settings(self, absorb: bool = True) -> AbsorptionSettings:
        return AbsorptionSettings(**self.config["absorption"] | {"absorb": absorb})

    def warm(self, stream: int, settings: AbsorptionSettings) -> Warm:
        """The stream until one chunk before the switch; the newest stream's are kept."""
        if self._warm[0] != stream:
            self._warm = stream, {}
        # what decides after the warm-up changes nothing in it
        key = replace(settings, ratio=0.5)
        if key not in self._warm[1]:
            self._warm[1][key] = self.roller.warmed(self.row, self.scenes[stream], stream, key)
        return self._warm[1][key]

    def gone_on(self, stream: int, settings: AbsorptionSettings, solution: Solution | None = None) -> torch.Tensor:
        """Latents [16, T, h, w] of the whole stream."""
        warm = self.warm(stream, settings)
        return self.roller.gone_on(self.row, self.scenes[stream], stream, settings, warm, solution)[0]

    def full(self, stream: int) -> torch.Tensor:
        """The same with the full history."""
        warm = self.warm(stream, self.settings())
        return self.roller.gone_on(self.row, self.scenes[stream], stream, None, warm)[0]

    def switched(self, stream: int, settings: AbsorptionSettings) -> Rollout:
        """A rollout that has just switched."""
        state = self.warm(stream, settings).state
        rollout = self.roller.rollout(self.row, self.scenes[stream], stream, settings, state)
        collected(rollout, settings.warmup_frames, [])
        return rollout

    def choice(self, stream: int) -> dict[str, Any]:
        """How far the next chunk moves without the history of all layers, of its own size; the layers that were chosen and by what
        figures; the same if layers are tried without their correction."""
        dropped = self.settings(absorb=False)
        full, without = self.full(stream), self.gone_on(stream, replace(dropped, ratio=1.0))
        after = slice(self.first * CHUNK_LATENTS, (self.first + 1) * CHUNK_LATENTS)
        found = {"moved": float((without - full)[:, after].norm() / full[:, after].norm())}
        for name, settings in (("", self.settings()), ("uncorrected ", dropped)):
            report = self.switched(stream, settings).absorber.report()
            found |= {f"{name}chosen": report["layers"], f"{name}sensitivity": sensitivities(report)}
        return found

    def open_loop(self, stream: int) -> dict[str, Any]:
        """By layer, errors by chunk, each chunk made by itself with the full history's past."""
        solution = self._solved(stream, self.settings())
        # no switch comes until the end, and with a solution given nothing is collected
        waits = replace(self.settings(), warmup_frames=self.roller.length + CHUNK_LATENTS)
        roll = partial(self.roller.rollout, self.row, self.scenes[stream], stream, waits, solution=solution)
        full, errors = roll(self.warm(stream, self.settings()).state), {way: [] for way in WAYS}
        collected(full, self.first * CHUNK_LATENTS, [])
        for chunk in range(self.first, self.chunks):
            state, end = full.snapshot(), (chunk + 1) * CHUNK_LATENTS
            frames = [range(chunk * CHUNK_LATENTS, end)]
            kept = collected(full, end, frames)[0]
            for way, absorb in WAYS.items():
                tried = []
                for layer in range(self.layers):
                    rollout, correction = roll(state), solution.fits[layer].correction if absorb else None
                    rollout.absorber.corrections.trial = Trial(layer, correction)
                    tried.append(float((collected(rollout, end, frames)[0] - kept).square().mean()))
                errors[way].append(tried)
        return {f"open {way}": [list(each) for each in zip(*errors[way], strict=True)] for way in WAYS}

    def closed_loop(self, stream: int) -> dict[str, Any]:
        """By layer, errors by chunk and recall with the layer alone from the switch on."""
        full, found = self.full(stream), {}
        found["recall"] = self.recall(full, full)
        for way, absorb in WAYS.items():
            alone = self.alone(stream, self.settings(absorb))
            found[way] = [self.errors(one, full) for one in alone]
            found[f"{way}, recall"] = [self.recall(one, full) for one in alone]
        return found

    def _solved(self, stream: int, settings: AbsorptionSettings) -> Solution:
        """The corrections of all layers that the stream itself gives."""
        return self.switched(stream, replace(settings, ratio=1.0)).absorber.solution

    def alone(self, stream: int, settings: AbsorptionSettings) -> list[torch.Tensor]:
        """By layer, latents [16, T, h, w] of the stream with it alone switched."""
        solved, one = self._solved(stream, settings).fits, replace(settings, ratio=1 / self.layers)
        return [self.gone_on(stream, one, Solution((layer,), solved)) for layer in range(self.layers)]

    def errors(self, latents: torch.Tensor, full: torch.Tensor) -> list[float]:
        """The mean squared difference of each chunk behind the switch."""
        after = (latents - full)[:, self.first * CHUNK_LATENTS :]
        return after.square().unflatten(1, (-1, CHUNK_LATENTS)).mean((0, 2, 3, 4)).tolist()

    def recall(self, latents: torch.Tensor, full: torch.Tensor) -> float | None:
        """The share of returns behind the switch in the colour that the stream had before it."""
        if self.judge is None:
            return None
        own = colours_of(self.judge, full, [c for c in self.shown if c < self.first])[-1]
        came = colours_of(self.judge, latents, [c for c in self.shown if c >= self.first])
        return sum(colour == own for colour in came) / len(came)


def ranks(values: list[float]) -> torch.Tensor:
    """The places of values in their order, from 0."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of values without ties."""
    a, b = (each - each.mean() for each in (ranks(one), ranks(other)))
    return float((a @ b) / (a.norm() * b.norm()))


def smallest(values: list[float], count: int) -> list[int]:
    """The places of the `count` smallest values, in order."""
    return sorted(ranks(values).argsort()[:count].tolist())
