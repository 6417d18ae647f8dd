"""What is asked of the recall of a lantern: rows that differ in one thing, and their rollouts by the product's own code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.absorption.solve import Solution
from adastate_core.anchors import anchor_from
from adastate_core.geometry import WAN21
from adastate_core.rollout import Rollout, RolloutSpec, RolloutState, Settings
from adastate_core.schedules.schedule import Schedule

from .bare_model import BareModel
from .contenders import collected
from .returning_lantern import plan_of
from .world import CHUNK_LATENTS, SIZE, Scene


@dataclass(frozen=True)
class Row:
    """One row of the table, as the config names it. `absorption`: what differs from the config's own; None: there is none.

    `shown` names the chunks with a lantern. `donor` names a row: its correction of another stream, whose lantern has another
    colour, is put in instead of the stream's own. `streams`: so many of the first ones alone; 0: all.
    """

    name: str
    absorption: dict[str, Any] | None = None
    anchor: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    window_frames: int = 0
    shown: str = "returning"
    eight_bits: bool = False
    donor: str = ""
    streams: int = 0

    def settings(self, config: dict[str, Any]) -> AbsorptionSettings | None:
        if self.absorption is None:
            return None
        asked = config["absorption"] | self.absorption
        return AbsorptionSettings(**(asked | {"saved_layers": tuple(asked.get("saved_layers", ()))}))

    def warmup(self, config: dict[str, Any]) -> int:
        """Latent frames until the switch; of rows without one, until the others'."""
        return (config["absorption"] | (self.absorption or {}))["warmup_frames"]


@dataclass(frozen=True)
class Warm:
    """A stream until one chunk before the switch: its latents [16, T, h, w], and the state that rows go on from."""

    latents: torch.Tensor
    state: RolloutState


class Roller:
    """Rolls one stream out by the config's rules, by any row's. Rows with the same warm-up share it: a state is immutable."""

    def __init__(self, model: BareModel, config: dict[str, Any], seed: int, chunks: int) -> None:
        self.model, self.config, self.seed, self.chunks = model, config, seed, chunks
        self.schedule = Schedule.shifted(config["sampler_steps"], config["shift"])

    @property
    def length(self) -> int:
        return self.chunks * CHUNK_LATENTS

    def rollout(
        self,
        row: Row,
        scene: Scene,
        stream: int,
        settings: AbsorptionSettings | None,
        state: RolloutState | None = None,
        solution: Solution | None = None,
    ) -> Rollout:
        """One stream in float32, from `state` on if there is one, whose absorption then is what `settings` say."""
        side = SIZE // WAN21.stride
        window = row.window_frames or self.config["window_frames"]
        spec = RolloutSpec(
            self.model.geometry, 1, side, side, CHUNK_LATENTS, window, anchor_from(row.anchor),
            self.config.get("positions", "packed"), torch.float32, absorption=settings,
        )  # fmt: skip
        if state is not None:
            described = state.spec | {"absorption": spec.describe()["absorption"]}
            state = replace(state, spec=described, absorption={} if settings is None else state.absorption)
        return Rollout(
            self.model, spec, Settings(self.seed + stream, self.schedule), state, solution=solution,
            prompts=plan_of(scene, self.chunks), length=self.length,
        )  # fmt: skip

    def warmed(self, row: Row, scene: Scene, stream: int, settings: AbsorptionSettings) -> Warm:
        """The stream until one chunk before `settings` switch. What is collected does not depend on which layers will be."""
        frames = settings.warmup_frames - CHUNK_LATENTS
        rollout = self.rollout(row, scene, stream, settings)
        latents = collected(rollout, frames, [range(frames)])[0][0]
        return Warm(latents, rollout.snapshot())

    def gone_on(
        self,
        row: Row,
        scene: Scene,
        stream: int,
        settings: AbsorptionSettings | None,
        warm: Warm | None = None,
        solution: Solution | None = None,
    ) -> tuple[torch.Tensor, Rollout]:
        """(latents [16, T, h, w] of the whole stream, the rollout at its end)."""
        rollout = self.rollout(row, scene, stream, settings, None if warm is None else warm.state, solution)
        if warm is None:
            return collected(rollout, self.length, [range(self.length)])[0][0], rollout
        frames = warm.latents.shape[1]
        rest = collected(rollout, self.length, [range(frames, self.length)])[0][0]
        return torch.cat([warm.latents, rest], 1), rollout
