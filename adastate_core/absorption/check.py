"""Checks an absorption that comes from a file or is part of a state: it has to be whole, and fit the settings that it names."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch

from ..anchors import Anchor
from ..cache.byte_plan import CachePlan
from ..files.header_check import Damage, Fields, Tensors, number, shown, whole
from .absorbed_phases import small_layer, watched_of
from .collector import KINDS
from .moments import FIELDS
from .settings import BEFORE, PHASES, AbsorptionSettings, blocks_of

PARTS = ("constant", "matrix", "left", "right")
# what a solution holds beside them
NUMBERS = ("chosen", "fits", "items", "changes", "towards")


def settings_of(described: Fields) -> AbsorptionSettings:
    """The settings that `AbsorptionSettings.describe` described. Those that an earlier version did not have get their defaults."""
    takes = {"int": lambda n: described.whole(n, -1), "float": described.number, "bool": described.yes_no}
    takes |= {"tuple[int, ...]": lambda n: tuple(described.wholes(n))}
    takes |= {"str": described.text, "float | None": lambda n: _ridge_of(described, n)}
    found = {f.name: takes[str(f.type)](f.name) for f in fields(AbsorptionSettings) if described.has(f.name)}
    described.done()
    found = BEFORE | found
    if found["switch"] == "memory" and not found["budget_gib"]:
        raise Damage(f"{described.path('budget_gib')} is missing, and memory asks by it")
    try:
        return AbsorptionSettings(**found)
    except ValueError as error:
        raise Damage(f"{described.where} does not go together ({error})") from error


def _ridge_of(described: Fields, name: str) -> float | None:
    return None if described.any(name) is None else _ridge(described.path(name), described.any(name))


def _ridge(path: str, value: Any) -> float:
    """A ridge as a text, "inf" among them."""
    try:
        ridge = float(value) if isinstance(value, str) and len(value) < 40 else math.nan
    except ValueError:
        ridge = math.nan
    if not ridge >= 0:
        raise Damage(f"{path} is {shown(value)}, not the text of a number of at least 0")
    return ridge


def check_absorption(
    state: Fields, tensors: Tensors, settings: AbsorptionSettings | None, plan: CachePlan, anchor: Anchor
) -> tuple[tuple[int, ...], int]:
    """Damage unless a rollout of this `plan` (before any switch) can go on from the absorption in `state`.

    The absorption's tensors are `absorption.NAME` of `tensors`. Returns the layers that are switched, and how many frames of the
    window they pin.
    """
    if settings is None:
        state.done()
        return (), 0
    phase = state.text("phase", PHASES)
    pinned, count = state.whole("pinned") if state.has("pinned") else 0, len(plan.layers)
    items = state.whole("items", 1, plan.batch) if state.has("items") else 1
    if items not in (1, plan.batch):
        raise Damage(f"{state.path('items')} is {items}, neither the batch, {plan.batch}, nor 1")
    chosen: tuple[int, ...] = ()
    collected: Any = range(count) if phase == PHASES[0] else ()
    if phase == PHASES[1]:
        most = settings.sink_frames if anchor.state_frames == 0 else settings.pinned(anchor.frames)
        if pinned > most:
            raise Damage(f"{state.path('pinned')} is {pinned}, more than the {most} of the settings")
        chosen = check_solution(state, "solution.", tensors, settings, count, plan.width, plan.heads, plan.batch)
        collected = watched_of(chosen, settings)
        state.whole("chunks_since")
        state.number("seconds", 0)
        state.inner("solved_for")
        if state.has("due"):
            state.yes_no("due")
        if state.has("switched_at"):
            state.whole("switched_at")
        for text in ("why", "how"):
            if state.has(text):
                state.text(text)
        _check_watched(state, count, items)
        for i in collected:
            _check_history(state, tensors, i, settings, plan, pinned)
    elif pinned:
        raise Damage(f"{state.path('pinned')} is {pinned}, although no layer is switched")
    _check_warm_up(state, phase)
    if phase != PHASES[2] and (phase == PHASES[0] or state.has("collector.chunks")):
        chunks, blocks = state.whole("collector.chunks"), blocks_of(settings, plan.heads)
        lies_between = settings.apart and chunks > 2
        for kind in KINDS if chunks else ():
            for i in collected if kind != "between" or lies_between else ():
                _check_moments(tensors, f"{state.where}.collector.{kind}.{i}", plan.width, blocks, items)
    state.done()
    return chosen, pinned


def _check_warm_up(state: Fields, phase: str) -> None:
    """How a warm-up learns, and while it lasts whose run it is."""
    for i, pair in enumerate(state.listed("learned")) if phase != PHASES[2] and state.has("learned") else ():
        path = f"{state.path('learned')}[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damage(f"{path} is {shown(pair)}, not a frame and the share that is left")
        whole(f"{path}[0]", pair[0])
        number(f"{path}[1]", pair[1], 0)
    if phase == PHASES[0] and state.has("origin"):
        origin = state.inner("origin")
        origin.text("prompt")
        origin.whole("seed", 0, 2**64 - 1)
        origin.done()


def check_solution(
    state: Fields, prefix: str, tensors: Tensors, settings: AbsorptionSettings, layers: int, width: int, heads: int,
    batch: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Damage unless the entries under `prefix` are a solution for a model of these sizes and this batch. Returns the chosen
    layers."""
    chosen, wanted, items = check_numbers(state, prefix), settings.layers(layers), items_of(state, prefix)
    if any(count != batch for count in items.values()):
        raise Damage(f"{state.path(prefix)}items are of a batch of {max(items.values())}, not of {batch}")
    if len(chosen) != wanted or any(i >= layers for i in chosen):
        raise Damage(f"{state.path(prefix)}chosen is {shown(list(chosen))}, not {wanted} of {layers} layers")
    blocks = blocks_of(settings, heads)
    size = width // blocks
    for i in chosen:
        path = f"{state.where}.{prefix}fit.{i}." if state.where else f"{prefix}fit.{i}."
        first = (items[i],) if i in items else ()
        tensors.take(f"{path}constant", (*first, width), torch.float32)
        low = settings.scope == "lowrank" and settings.rank < size and not tensors.has(f"{path}matrix")
        if low:
            tensors.take(f"{path}left", (*first, 1, size, settings.rank), torch.float32)
            tensors.take(f"{path}right", (*first, 1, settings.rank, size), torch.float32)
        else:
            tensors.take(f"{path}matrix", (*first, blocks, size, size), torch.float32)
    return chosen


def check_numbers(state: Fields, prefix: str = "") -> tuple[int, ...]:
    """Damage unless `chosen` lists layers in their order and `fits` holds a solution's numbers. Returns the chosen layers."""
    chosen, name = tuple(state.wholes(f"{prefix}chosen")), state.path(f"{prefix}fits")
    if list(chosen) != sorted(set(chosen)):
        raise Damage(f"{state.path(prefix)}chosen is {shown(list(chosen))}, not layers in their order, each once")
    seen = []
    for i, one in enumerate(state.listed(f"{prefix}fits")):
        if not isinstance(one, list | tuple) or len(one) != 4:
            raise Damage(f"{name}[{i}] is {shown(one)}, not layer, ridge and two residuals")
        seen.append(whole(f"{name}[{i}][0]", one[0]))
        _ridge(f"{name}[{i}][1]", one[1])
        for j in (2, 3):
            number(f"{name}[{i}][{j}]", one[j], 0)
    towards = state.wholes(f"{prefix}towards") if state.has(f"{prefix}towards") else []
    if not set(towards) <= set(seen):
        raise Damage(f"{state.path(prefix)}towards is {shown(towards)}, not some of the layers of {name}")
    if len(seen) != len(set(seen)) or not set(chosen) <= set(seen):
        raise Damage(f"{name} are of layers {shown(seen)}, not each once and all of chosen, {shown(list(chosen))}")
    for i, pair in enumerate(state.listed(f"{prefix}changes")) if state.has(f"{prefix}changes") else ():
        layer, change = _pair(f"{state.path(prefix)}changes[{i}]", pair, "a layer and what the picture changes")
        whole(f"{state.path(prefix)}changes[{i}][0]", layer, 0, max(seen, default=0))
        number(f"{state.path(prefix)}changes[{i}][1]", change, 0)
    if set(items_of(state, prefix)) - set(seen):
        raise Damage(f"{state.path(prefix)}items are of other layers than {name}")
    return chosen


def items_of(state: Fields, prefix: str = "") -> dict[int, int]:
    """By layer, of how many items a solution holds numbers, if it holds each item's own. Damage unless they are numbers."""
    if not state.has(f"{prefix}items"):
        return {}
    found, name = {}, state.path(f"{prefix}items")
    for i, pair in enumerate(state.listed(f"{prefix}items")):
        layer, each = _pair(f"{name}[{i}]", pair, "a layer and its items' numbers")
        layer = whole(f"{name}[{i}][0]", layer)
        if not isinstance(each, list | tuple) or len(each) < 2:
            raise Damage(f"{name}[{i}][1] is {shown(each)}, not the numbers of two items or more")
        for j, one in enumerate(each):
            path = f"{name}[{i}][1][{j}]"
            if not isinstance(one, list | tuple) or len(one) != 3:
                raise Damage(f"{path} is {shown(one)}, not a ridge and two residuals")
            _ridge(f"{path}[0]", one[0])
            for k in (1, 2):
                number(f"{path}[{k}]", one[k], 0)
        found[layer] = len(each)
    return found


def _pair(path: str, pair: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise Damage(f"{path} is {shown(pair)}, not {what}")
    return pair[0], pair[1]


def _check_watched(state: Fields, layers: int, items: int) -> None:
    """What the monitor has measured, of so many `items`, for reports and for drift."""
    for i, entry in enumerate(state.listed("watched")):
        one = Fields(entry, f"{state.path('watched')}[{i}]")
        one.whole("frame")
        one.whole("layer", 0, layers - 1)
        one.number("residual", 0)
        for name in ("solved_at", "discrepancy"):
            if one.has(name):
                one.number(name, 0)
        if one.has("refreshed"):
            one.yes_no("refreshed")
        if one.has("items"):
            _check_each(one.path("items"), one.listed("items"), items)
        one.done()
    for i, pair in enumerate(state.listed("first_residuals")) if state.has("first_residuals") else ():
        path = f"{state.path('first_residuals')}[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damage(f"{path} is {shown(pair)}, not a layer and its residual")
        whole(f"{path}[0]", pair[0], 0, layers - 1)
        _check_each(f"{path}[1]", [pair[1]] if items == 1 else pair[1], items)


def _check_each(path: str, values: Any, items: int) -> None:
    """Damage unless there is a number of at least 0 of each item."""
    if not isinstance(values, list | tuple) or len(values) != items:
        raise Damage(f"{path} is {shown(values)}, not a number of each of {items} items")
    for i, value in enumerate(values):
        number(path if items == 1 else f"{path}[{i}]", value, 0)


def _check_history(
    state: Fields, tensors: Tensors, layer: int, settings: AbsorptionSettings, plan: CachePlan, pinned: int
) -> None:
    """Damage unless a watched layer's history holds as many keys and values [B, n, P, width] as its list of frames says."""
    name = f"history.{layer}"
    frames, path = state.listed(f"{name}.frames"), state.path(f"{name}.frames")
    for i, pair in enumerate(frames):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damage(f"{path}[{i}] is {shown(pair)}, not a frame and its position")
        whole(f"{path}[{i}][0]", pair[0])
        if pair[1] is not None:
            number(f"{path}[{i}][1]", pair[1])
    most = max(one.window_frames for one in plan.layers) - small_layer(plan.layers[layer], settings, pinned).ring_frames
    if len(frames) > max(0, most):
        raise Damage(f"{path} are {len(frames)}, more than the {max(0, most)} that the settings keep")
    for kind in ("keys", "values") if frames else ():
        shape = (plan.batch, len(frames), plan.tokens, plan.width)
        tensors.take(f"{state.path(name)}.{kind}", shape, plan.dtype)


def _check_moments(tensors: Tensors, path: str, width: int, blocks: int, items: int) -> None:
    """Damage unless these are one layer's statistics (moments.py): sums over rows, of each item if there are several. Energies and
    count are not below 0."""
    size, first = width // blocks, (items,) if items > 1 else ()
    shapes = ((), (width,), (width,), (blocks, size, size), (blocks, size, size), (), ())
    for name, shape in zip(FIELDS, shapes, strict=True):
        tensor = tensors.take(f"{path}.{name}", (*first, *shape), torch.float32)
        if not shape and float(tensor.min()) < 0:
            raise Damage(f"{path}.{name} is {float(tensor.min()):g}, not at least 0")
