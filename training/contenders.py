"""What is compared: weights with an anchor and a window, and their long rollouts by the product's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import anchor_from
from adastate_core.geometry import WAN21
from adastate_core.prompts.demo_words import prompt
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule

from .bare_model import BareModel, load_denoiser
from .lora import apply_lora
from .student import Student
from .world import CHUNK_LATENTS, SIZE, Scene


@dataclass(frozen=True)
class Contender:
    """One entry of the comparison, as the config names it. `lora` is put on `weights` if there is one."""

    name: str
    weights: str
    anchor: dict[str, Any]
    window_frames: int
    positions: str = "fixed"
    lora: str = ""
    steps: int = 4
    shift: float = 5.0
    absorption: dict[str, Any] | None = None

    @property
    def frames(self) -> int:
        """A + W + F: the latent frames whose keys a pass reads, but for the state's own."""
        return anchor_from(self.anchor).frames + self.window_frames + CHUNK_LATENTS

    @property
    def schedule(self) -> Schedule:
        return Schedule.shifted(self.steps, self.shift)

    def model(self) -> nn.Module:
        model = load_denoiser(self.weights)
        if self.lora:
            apply_lora(model, self.lora)
        return model

    def student(self) -> Student:
        """The same for the recall test, without gradients."""
        config = {
            "anchor": self.anchor, "window_frames": self.window_frames, "positions": self.positions,
            "window_gradient": False, "state_gradient": 0,
        }  # fmt: skip
        return Student(self.model(), config)

    def rollout(self, scenes: list[Scene], seed: int) -> Rollout:
        """One stream a scene. The content's noise depends on `seed` and the place in the list alone, so contenders can be
        compared in pairs."""
        bare = BareModel(self.model(), torch.cat([prompt(scene.words(0)) for scene in scenes]))
        side = SIZE // WAN21.stride
        spec = RolloutSpec(
            bare.geometry, len(scenes), side, side, CHUNK_LATENTS, self.window_frames, anchor_from(self.anchor),
            self.positions, torch.float32,
            absorption=None if self.absorption is None else AbsorptionSettings(**self.absorption),
        )  # fmt: skip
        return Rollout(bare, spec, Settings(seed, self.schedule))

    @torch.no_grad()
    def rolled_out(self, scenes: list[Scene], seed: int, length: int, keep: list[range]) -> list[torch.Tensor]:
        """Content latents [N, 16, n, h, w] of the frames in each of `keep`, `length` frames in all."""
        return collected(self.rollout(scenes, seed), length, keep)


@torch.no_grad()
def collected(rollout: Rollout, length: int, keep: list[range]) -> list[torch.Tensor]:
    """Roll on to `length` latent frames; the latents [N, 16, n, h, w] of the frames in each of `keep`."""
    kept: list[list[torch.Tensor]] = [[] for _ in keep]
    for chunk in rollout.chunks(length):
        for wanted, parts in zip(keep, kept, strict=True):
            inside = [i for i in range(chunk.latents.shape[2]) if chunk.first_frame + i in wanted]
            parts.append(chunk.latents[:, :, inside])
    return [torch.cat(parts, 2) for parts in kept]
