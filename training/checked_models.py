"""The models on which the choice of layers is checked (layer_check.py): the teacher, one with random weights, the shipped demo."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adastate_core.absorption.settings import RIDGES, AbsorptionSettings

from .bare_model import load_denoiser
from .host_models import build_denoiser
from .kept_streams import ENDING, Kept
from .layer_check import LayerCheck
from .recall import ColourJudge
from .recall_rows import Row

log = logging.getLogger("adastate.training")
SPREAD = 0.03


@dataclass(frozen=True)
class CheckedModel:
    """An entry of `check.models` in the config. Of the first `closed_streams` the closed loop is made too. Without `weights` it is
    the teacher; with `sharpened` a random model of the same sizes by `seed`. `config`: what differs from the config's own.
    `lanterns`: whether it makes some, so that colours tell."""

    name: str
    streams: int
    closed_streams: int
    weights: str = ""
    seed: int = 0
    sharpened: dict[str, float] = field(default_factory=dict)
    anchor: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    config: dict[str, Any] = field(default_factory=dict)
    lanterns: bool = True


def random_like(model: nn.Module, seed: int) -> nn.Module:
    """A random model of the same sizes; nothing is at the zero that trainers start from."""
    torch.manual_seed(seed)
    made = build_denoiser(model.dim, model.ffn_dim, len(model.blocks))
    for parameter in made.parameters():
        parameter.data += SPREAD * torch.randn_like(parameter)
    return made


@torch.no_grad()
def sharpened(model: nn.Module, norms: float, output: float, uneven: float = 1.0, seed: int = 0) -> nn.Module:
    """`model` with attention that matters: random layers look everywhere alike and add next to nothing, so that no history moves
    what they make. The norms of queries and keys are scaled by `norms` each, the output projections by `output`, and these also
    by a factor of each layer's own, drawn by `seed` between 1 / `uneven` and `uneven`: trained layers are not alike either."""
    drawn = torch.rand(len(model.blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    for block, u in zip(model.blocks, drawn, strict=True):
        block.self_attn.norm_q.weight *= norms
        block.self_attn.norm_k.weight *= norms
        block.self_attn.o.weight *= output * uneven ** (2 * u - 1)
    return model


def built(one: CheckedModel, teacher: Path) -> nn.Module:
    """The model, in float32."""
    if one.sharpened:
        return sharpened(random_like(load_denoiser(str(teacher)), one.seed), **one.sharpened, seed=one.seed)
    return load_denoiser(one.weights or str(teacher))


def rules_of(one: CheckedModel, config: dict[str, Any], teacher: str) -> dict[str, Any]:
    """By what a model is checked, JSON-able; `teacher` is the digest of the teacher's file."""
    settings = AbsorptionSettings(**config["absorption"])
    rules = {k: config[k] for k in ("sampler_steps", "shift", "window_frames", "judge_streams", "scenes_seed")} | {
        "check": {k: config["check"][k] for k in ("scenes_seed", "seed", "chunks")},
        "model": teacher,
        "absorption": settings.describe() | {"ridges": list(map(str, RIDGES))},
    }
    if one.sharpened:
        rules |= {"model": one.seed, "sharpened": one.sharpened}
    if one.weights:
        rules |= {"model": hashlib.sha256(Path(one.weights).read_bytes()).hexdigest()}
    return rules | one.config | ({} if one.anchor["kind"] == "none" else {"anchor": one.anchor})


def check(
    one: CheckedModel,
    config: dict[str, Any],
    teacher: Path,
    digest: str,
    judge: Callable[[], ColourJudge],
    folder: Path,
) -> list[dict[str, Any]]:
    """What is known of a model's streams, kept in `folder` part by part; what is not there is measured."""
    config = config | one.config
    kept = Kept(folder / f"check_{one.name.replace(' ', '_')}{ENDING}", rules_of(one, config, digest))
    numbers = [str(stream) for stream in range(one.streams)]
    wanted = {part: numbers for part in LayerCheck.PARTS} | {LayerCheck.CLOSED: numbers[: one.closed_streams]}
    missing = [(p, n) for p, each in wanted.items() for n in each if p not in kept.streams.get(n, {})]
    layers = None
    if missing:
        row = Row("", anchor=one.anchor)
        layers = LayerCheck(built(one, teacher), config, one.streams, judge() if one.lanterns else None, row)
    for part, number in missing:
        kept.keep(int(number), layers.part(part, int(number)))
        log.info("check, %s, stream %s, %s", one.name, number, part)
    return [kept.streams[number] for number in numbers]
