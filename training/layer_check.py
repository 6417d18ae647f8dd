"""Does the choice of layers leave those alone that a video needs? Held against leaving each layer alone without its history.

On streams of their own, in every pass of many chunks: dropped (the layer sees its local part alone) and corrected (as absorption
leaves it). The error is that of the latents, against the full history of the same stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.absorption.solve import Solution
from adastate_core.prompts.demo_words import prompt

from .bare_model import BareModel
from .contenders import collected
from .host_models import build_denoiser
from .recall import ColourJudge
from .recall_rows import Roller, Row, Warm
from .returning_lantern import colours_of, returning_scenes
from .world import CHUNK_LATENTS, Scene

SPREAD = 0.03


def random_like(model: nn.Module, seed: int) -> nn.Module:
    """A random model of the same sizes; nothing is at the zero that trainers start from."""
    torch.manual_seed(seed)
    made = build_denoiser(model.dim, model.ffn_dim, len(model.blocks))
    for parameter in made.parameters():
        parameter.data += SPREAD * torch.randn_like(parameter)
    return made


def sensitivities(report: dict[str, Any]) -> list[float]:
    """By layer, what the choice went by: small ones are switched first."""
    return [entry["change"] for entry in report["residuals"]]


class LayerCheck:
    """One model's streams. `judge`: of a model that makes lanterns; None: colours are not looked at."""

    def __init__(self, model: nn.Module, config: dict[str, Any], streams: int, judge: ColourJudge | None) -> None:
        check, self.config, self.judge = config["check"], config, judge
        self.first = config["absorption"]["warmup_frames"] // CHUNK_LATENTS
        chunks = self.first + check["chunks"]
        shown = self.shown = range(1, chunks, 3)
        self.scenes = returning_scenes(streams, check["scenes_seed"], chunks, shown)
        bare = BareModel(model, prompt(self.scenes[0].words(0)))
        self.roller = Roller(bare, config, check["seed"], chunks)
        self.layers = bare.geometry.layers

    def measured(self, stream: int) -> dict[str, Any]:
        """JSON-able: the layers that were chosen, by what figures, and by layer with it alone local errors by chunk, and recall."""
        scene, settings = self.scenes[stream], AbsorptionSettings(**self.config["absorption"])
        warm = self.roller.warmed(Row(""), scene, stream, settings)
        chosen = self._switched(scene, stream, settings, warm)
        full = self.roller.gone_on(Row(""), scene, stream, None, warm)[0]
        found = {"chosen": chosen["layers"], "sensitivity": sensitivities(chosen), "recall": self.recall(full, full)}
        for name, absorb in (("dropped", False), ("corrected", True)):
            alone = self.alone(scene, stream, replace(settings, absorb=absorb))
            found[name] = [self.errors(one, full) for one in alone]
            found[f"{name}, recall"] = [self.recall(one, full) for one in alone]
        return found

    def _switched(self, scene: Scene, stream: int, settings: AbsorptionSettings, warm: Warm) -> dict[str, Any]:
        """The report of a rollout that has just switched."""
        rollout = self.roller.rollout(Row(""), scene, stream, settings, warm.state)
        collected(rollout, settings.warmup_frames, [])
        return rollout.absorber.report()

    def alone(self, scene: Scene, stream: int, settings: AbsorptionSettings) -> list[torch.Tensor]:
        """By layer, latents [16, T, h, w] of the stream with it alone switched, by the correction that the stream itself gives."""
        warm = self.roller.warmed(Row(""), scene, stream, settings)
        every = self.roller.rollout(Row(""), scene, stream, replace(settings, ratio=1.0), warm.state)
        collected(every, settings.warmup_frames, [])
        solved, one = every.absorber.solution.fits, replace(settings, ratio=1 / self.layers)
        solutions = [Solution((layer,), solved) for layer in range(self.layers)]
        return [self.roller.gone_on(Row(""), scene, stream, one, warm, each)[0] for each in solutions]

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
