"""An absorption as flat tensors and JSON-able values: part of a rollout's state, and a file of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .absorber import PHASES, Absorber, blocks_of
from .settings import AbsorptionSettings, settings_from
from .solve import Correction, Fit, Solution

FORMAT, VERSION = "adastate.absorption", 1
PARTS = ("constant", "matrix", "left", "right")


def solution_state(solution: Solution) -> dict[str, Any]:
    """`chosen`, the fits' numbers, and the chosen layers' corrections as tensors `fit.LAYER.PART`."""
    state: dict[str, Any] = {
        "chosen": list(solution.chosen),
        "fits": [[i, str(f.ridge), f.residual, f.discrepancy] for i, f in sorted(solution.fits.items())],
    }
    for i in solution.chosen:
        for name, tensor in zip(PARTS, solution.fits[i].correction.parts(), strict=True):
            if tensor is not None:
                state[f"fit.{i}.{name}"] = tensor.cpu().clone()
    return state


def solution_from(state: dict[str, Any], settings: AbsorptionSettings, layers: int, width: int, heads: int) -> Solution:
    """What `solution_state` gave; ValueError if it does not fit this model and these settings."""
    chosen, blocks = tuple(state["chosen"]), blocks_of(settings, heads)
    known = len(chosen) == settings.layers(layers) and list(chosen) == sorted(set(chosen))
    if not known or not all(type(i) is int and 0 <= i < layers for i in chosen):
        raise ValueError(f"it switches layers {list(chosen)}, which do not fit {settings.layers(layers)} of {layers}")
    size = width // blocks
    shapes = {"constant": (width,), "matrix": (blocks, size, size)}
    if settings.scope == "lowrank" and settings.rank < size:
        rank = settings.rank
        pair = {"constant": (width,), "left": (1, size, rank), "right": (1, rank, size)}
    else:
        pair = shapes
    fits = {int(i): Fit(None, float(ridge), float(a), float(b)) for i, ridge, a, b in state["fits"]}
    for i in chosen:
        parts = {name: state.get(f"fit.{i}.{name}") for name in PARTS}
        held = {name: tuple(t.shape) for name, t in parts.items() if isinstance(t, torch.Tensor)}
        if held not in (shapes, pair) or any(t is not None and t.dtype != torch.float32 for t in parts.values()):
            raise ValueError(f"its correction of layer {i} does not have the shape that scope {settings.scope} gives")
        numbers = fits[i]
        fits[i] = Fit(Correction(**parts), numbers.ridge, numbers.residual, numbers.discrepancy)
    if any(not math.isfinite(f.residual) or not math.isfinite(f.discrepancy) for f in fits.values()):
        raise ValueError("its residuals are not numbers")
    return Solution(chosen, fits)


def absorber_state(absorber: Absorber) -> dict[str, Any]:
    """Everything that a resumed run needs, as of the last whole chunk."""
    state: dict[str, Any] = {"phase": absorber.phase, "pinned": 0}
    if absorber.phase == PHASES[0]:
        return state | {f"collector.{k}": v for k, v in absorber.collector.state().items()}
    if absorber.phase == PHASES[1]:
        first = absorber.solution.chosen[0]
        state["pinned"] = absorber.cache.plan.layers[first].pinned_frames
        state |= {"chunks_since": absorber.chunks_since, "watched": [dict(entry) for entry in absorber.watched]}
        state |= {"seconds": absorber.seconds, "solved_for": dict(absorber.solved_for), "due": absorber.due}
        state["first_residuals"] = sorted(absorber.first_residuals.items())
        state |= {f"collector.{k}": v for k, v in absorber.collector.state().items()}
        state |= {f"solution.{k}": v for k, v in solution_state(absorber.solution).items()}
        for i, history in absorber.histories.items():
            state |= history.state(f"history.{i}")
    return state


def restore_absorber(absorber: Absorber, state: dict[str, Any]) -> None:
    """Go on from what `absorber_state` gave: before the cache is restored, whose plan changes here."""
    try:
        if state["phase"] not in PHASES:
            raise ValueError(f"its phase {state['phase']!r} is not known")
        if state["phase"] == PHASES[0]:
            absorber.collector.restore(under("collector.", state))
        elif state["phase"] == PHASES[2]:
            absorber.phase = PHASES[2]
        else:
            plan = absorber.cache.plan
            saved = under("solution.", state)
            absorber.solution = solution_from(
                saved, absorber.settings, len(plan.layers), plan.width, absorber.cache.heads
            )
            absorber.resume_switched(int(state["pinned"]), int(state["chunks_since"]), list(state["watched"]))
            absorber.seconds, absorber.solved_for = float(state["seconds"]), dict(state["solved_for"])
            absorber.due = bool(state.get("due", False))
            absorber.first_residuals = {int(i): float(one) for i, one in state.get("first_residuals", [])}
            absorber.collector.restore({"chunks": 0} | under("collector.", state))
            for i, history in absorber.histories.items():
                history.restore(state, f"history.{i}", (plan.batch, plan.tokens, plan.width), plan.dtype)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the state's absorption is damaged: {error}") from error


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a flat state whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def save_solution(
    solution: Solution, settings: AbsorptionSettings, belongs_to: dict[str, Any], path: Path | str
) -> Path:
    """Write a solved correction with what it belongs to (JSON-able: model, sizes, prompt, seed)."""
    path = Path(path)
    state = solution_state(solution)
    tensors = {name: t.contiguous() for name, t in state.items() if isinstance(t, torch.Tensor)}
    header = {name: value for name, value in state.items() if name not in tensors}
    header |= {"settings": settings.describe(), "belongs_to": belongs_to}
    metadata = {"format": FORMAT, "version": str(VERSION), "absorption": json.dumps(header)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_solution(path: Path | str) -> tuple[AbsorptionSettings, dict[str, Any], dict[str, Any]]:
    """(settings, what it belongs to, the state for `solution_from`). ValueError, naming the file, for anything else."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                raise ValueError("it is not an absorption of this pack's format version 1")
            header = json.loads(metadata["absorption"])
            state = {name: file.get_tensor(name) for name in file.keys()}
        settings = settings_from(header["settings"])
        return settings, dict(header["belongs_to"]), state | {"chosen": header["chosen"], "fits": header["fits"]}
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as a saved absorption: {error}") from error
