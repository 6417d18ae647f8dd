"""An absorption as flat tensors and JSON-able values: part of a rollout's state, and a file of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..files.header_check import Damage, Fields, Tensors, Unreadable, refusal
from ..files.tensor_file import TensorFile, parsed, write_tensors
from .absorber import Absorber
from .check import NUMBERS, PARTS, check_absorption, check_numbers, check_solution, settings_of
from .settings import PHASES, AbsorptionSettings
from .solve import Correction, Fit, Solution

# version 2 has checksums and is refused without them; version 1, of earlier packs, is read with all other checks
FORMAT, VERSION, BEFORE = "adastate.absorption", 2, 1


def solution_state(solution: Solution) -> dict[str, Any]:
    """`chosen`, the fits' numbers, and the chosen layers' corrections as tensors `fit.LAYER.PART`; `changes`, by which layers were
    chosen, and where each item of a batch has its own the numbers of each, as `items`."""
    fits = sorted(solution.fits.items())
    state: dict[str, Any] = {
        "chosen": list(solution.chosen),
        "fits": [[i, str(f.ridge), f.residual, f.discrepancy] for i, f in fits],
    }
    if items := [[i, [[str(ridge), a, b] for ridge, a, b in f.items]] for i, f in fits if f.items]:
        state["items"] = items
    if solution.changes:
        state["changes"] = sorted(solution.changes.items())
    towards = sorted(i for i, f in solution.fits.items() if f.towards)
    state |= {"towards": towards} if towards else {}
    for i in solution.chosen:
        for name, tensor in zip(PARTS, solution.fits[i].correction.parts(), strict=True):
            if tensor is not None:
                state[f"fit.{i}.{name}"] = tensor.cpu().clone()
    return state


def solution_from(
    state: dict[str, Any], settings: AbsorptionSettings, layers: int, width: int, heads: int, batch: int = 1
) -> Solution:
    """The solution that `solution_state` described, of as many items as `batch`, or the same for all of them. ValueError, naming
    the field, if it does not fit model and settings."""
    fields, tensors = _parts(state)
    chosen = check_solution(fields, "", tensors, settings, layers, width, heads, batch)
    items = {i: tuple((float(ridge), float(a), float(b)) for ridge, a, b in each) for i, each in state.get("items", ())}
    towards = set(state.get("towards", ()))
    fits = {
        i: Fit(None, float(ridge), float(a), float(b), items.get(i, ()), i in towards)
        for i, ridge, a, b in state["fits"]
    }
    for i in chosen:
        parts = {name: state.get(f"fit.{i}.{name}") for name in PARTS}
        fits[i] = replace(fits[i], correction=Correction(**parts))
    return Solution(chosen, fits, {i: float(change) for i, change in state.get("changes", ())})


def _parts(state: dict[str, Any], where: str = "") -> tuple[Fields, Tensors]:
    """A flat state's values and tensors, to be checked; the tensors are named with `where`."""
    prefix = f"{where}." if where else ""
    tensors = {f"{prefix}{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return Fields({n: v for n, v in state.items() if not isinstance(v, torch.Tensor)}, where), Tensors(tensors)


def absorber_state(absorber: Absorber) -> dict[str, Any]:
    """Everything that a resumed run needs, as of the last whole chunk."""
    state: dict[str, Any] = {"phase": absorber.phase, "pinned": 0}
    state |= {"items": absorber.items} if absorber.items > 1 else {}
    if absorber.phase == PHASES[0]:
        state |= {"learned": [list(one) for one in absorber.learning.curve]} if absorber.learning.curve else {}
        state |= {"origin": dict(absorber.origin)} if absorber.origin else {}
        return state | {f"collector.{k}": v for k, v in absorber.collector.state().items()}
    if absorber.phase == PHASES[1]:
        first = absorber.solution.chosen[0]
        state["pinned"] = absorber.cache.phase.layers[first].pinned_frames
        state |= {"chunks_since": absorber.chunks_since, "watched": [dict(entry) for entry in absorber.watched]}
        state |= {"seconds": absorber.seconds, "solved_for": dict(absorber.solved_for), "due": absorber.due}
        state |= {"switched_at": absorber.switched_at} if absorber.switched_at is not None else {}
        state |= {"why": absorber.why, "how": absorber.how} if absorber.why else {}
        state |= {"learned": [list(one) for one in absorber.learning.curve]} if absorber.learning.curve else {}
        firsts = sorted(absorber.first_residuals.items())
        state["first_residuals"] = [(i, each[0] if absorber.items == 1 else list(each)) for i, each in firsts]
        state |= {f"collector.{k}": v for k, v in absorber.collector.state().items()}
        state |= {f"solution.{k}": v for k, v in solution_state(absorber.solution).items()}
        for i, history in absorber.histories.items():
            state |= history.state(f"history.{i}")
    return state


def restore_absorber(absorber: Absorber, state: dict[str, Any]) -> None:
    """Go on from what `absorber_state` gave. Call this before the cache is restored, because it may change the cache's layers.

    ValueError if the state does not fit; nothing has been changed then.
    """
    plan, settings = absorber.cache.plan, absorber.settings
    fields, tensors = _parts(state, "absorption")
    try:
        check_absorption(fields, tensors, settings, plan, absorber.anchor)
        tensors.done()
    except Damage as error:
        raise ValueError(f"the state's absorption is damaged: {error}; use another state, or make it again") from error
    absorber.learning.curve = [(frame, float(left)) for frame, left in state.get("learned", [])]
    items = state.get("items", 1)
    if state["phase"] == PHASES[0]:
        absorber.resume_collecting(items, under("collector.", state))
    elif state["phase"] == PHASES[2]:
        absorber.find_nothing()
    else:
        saved = under("solution.", state)
        heads, absorber.items = absorber.cache.heads, items
        absorber.solution = solution_from(saved, settings, len(plan.layers), plan.width, heads, plan.batch)
        watched = [dict(entry) for entry in state["watched"]]
        absorber.resume_switched(state.get("pinned", 0), state["chunks_since"], watched)
        absorber.seconds, absorber.solved_for = float(state["seconds"]), dict(state["solved_for"])
        absorber.due = state.get("due", False)
        absorber.switched_at = state.get("switched_at")
        absorber.why, absorber.how = state.get("why", ""), state.get("how", "")
        firsts = state.get("first_residuals", [])
        absorber.first_residuals = {
            i: tuple(one) if isinstance(one, list | tuple) else (float(one),) for i, one in firsts
        }
        absorber.collector.restore({"chunks": 0} | under("collector.", state))
        for i, history in absorber.histories.items():
            history.restore(state, f"history.{i}", (plan.batch, plan.tokens, plan.width), plan.dtype)


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a flat state whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def save_solution(
    solution: Solution,
    settings: AbsorptionSettings,
    belongs_to: dict[str, Any],
    path: Path | str,
    new: bool = False,
) -> Path:
    """Write a solved correction with what it belongs to (JSON-able: model, sizes, prompt, seed).

    `new`: FileExistsError if there is a file already.
    """
    state = solution_state(solution)
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    header = {name: value for name, value in state.items() if name not in tensors}
    header |= {"settings": settings.describe(), "belongs_to": belongs_to}
    texts = {"format": FORMAT, "version": str(VERSION), "absorption": json.dumps(header, allow_nan=False)}
    return write_tensors(path, tensors, texts, new)


def load_solution(path: Path | str) -> tuple[AbsorptionSettings, dict[str, Any], dict[str, Any]]:
    """(settings, what it belongs to, the state for `solution_from`). ValueError, naming file and field, for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            opened = TensorFile(file)
            texts, version = Fields(opened.texts, "metadata"), str(opened.texts.get("version"))
            if opened.texts.get("format") != FORMAT or version not in (str(VERSION), str(BEFORE)):
                raise Unreadable(f"it is not an absorption of this pack's format version {BEFORE} or {VERSION}")
            for name in ("format", "version", *(("checksums",) if version == str(VERSION) else ())):
                texts.text(name)
            header = Fields(parsed(texts.text("absorption")))
            texts.done()
            state = opened.read(checked=version == str(VERSION))
    except (OSError, MemoryError, Damage) as error:
        raise refusal(path.name, error, "saved absorption") from error
    try:
        settings, belongs_to = settings_of(header.inner("settings")), header.inner("belongs_to")
        if belongs_to.has("solved_for"):
            belongs_to.inner("solved_for")
        _check_alone(check_numbers(header), Tensors(state))
        header.done()
    except Damage as error:
        raise refusal(path.name, error, "saved absorption") from error
    numbers = {name: header.values[name] for name in NUMBERS if name in header.values}
    return settings, belongs_to.values, state | numbers


def _check_alone(chosen: tuple[int, ...], tensors: Tensors) -> None:
    """Damage unless a solution's tensors are those of the chosen layers alone. More cannot be checked without the model."""
    for i in chosen:
        for name in (f"fit.{i}.{part}" for part in PARTS):
            if tensors.has(name):
                tensors.take(name, tuple(tensors.tensors[name].shape), torch.float32)
    tensors.done()
