"""A LoRA's file on the host's MODEL: the host's own loader makes the patches, and what it leaves is counted.

The host skips what it does not know, and what does not fit, with a line in its log; here both is said or refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import comfy.lora
import comfy.weight_adapter
import torch

from ...adastate_core.families.known import family_of
from ...adastate_core.weights.file_kind import shown_name
from ...adastate_core.weights.lora_file import HOSTS_PREFIX, LoraFile, hosts_name, is_text_encoders, open_lora, targets
from ...adastate_core.weights.presets import PRESETS, recognised
from ...adastate_core.weights.wan_weights import counted
from .checkpoint_wishes import LORAS, checkpoint_path
from .refusals import NOTES_KEY

log = logging.getLogger("adastate")
_OF_A_BIAS = ("diff_b", "b_norm")


class _Read(dict):
    """Weights by name that notes which of them were taken."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        super().__init__(weights)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def with_lora(patcher: Any, file: str, strength: float) -> tuple[Any, list[str]]:
    """(a clone of a MODEL with a LoRA's update at this strength, a sentence each about what of the file it does without).

    ValueError for a file that is none, another model's, or of which the host can use nothing.
    """
    lora = open_lora(checkpoint_path(file, LORAS))
    weights = {name: weight.shape for name, weight in patcher.model.diffusion_model.state_dict().items()}
    lora.check({name: tuple(shape) for name, shape in weights.items()})
    held = _Read(lora.tensors())
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = _patches(file, held, names)
    for target, patch in patches.items():
        name = _key(target)
        _check_fits(file, name, patch, weights.get(name.removeprefix(HOSTS_PREFIX)))
    clone, own = patcher.clone(), _own_scale(patcher, file, lora)
    added = set(clone.add_patches(patches, strength * own))
    if not added:
        raise ValueError(
            f"{file} holds {len(held)} weights and the host has no use for any of them, such as {shown_name(next(iter(held)))}"
        )
    patched = {_key(target).removeprefix(HOSTS_PREFIX) for target in added}
    notes = _notes(file, lora, held, targets(weights), patched, own)
    if notes:
        clone.model_options[NOTES_KEY] = [*clone.model_options.get(NOTES_KEY, ()), *notes]
    for note in notes:
        log.warning(note)
    return clone, notes


def _patches(file: str, held: _Read, names: dict[str, Any]) -> dict[Any, Any]:
    """The host's patches of these weights; ValueError naming the module of which a part is missing."""
    try:
        return comfy.lora.load_lora(held, names, log_missing=False)
    except Exception as error:  # a part that is missing shows in whatever the host does without it
        for name, target in names.items():
            try:
                comfy.lora.load_lora(held, {name: target}, log_missing=False)
            except Exception:  # noqa: BLE001
                raise ValueError(f"{file} is incomplete: parts of {shown_name(name)} are missing") from error
        raise


def _own_scale(patcher: Any, file: str, lora: LoraFile) -> float:
    """What a LoRA that says no alpha where the host looks is applied with, by the preset that its name speaks for; else 1."""
    if any("alpha" in parts for parts in lora.modules.values()):
        return 1.0
    family = family_of(type(patcher.model.model_config).__name__)
    if family is None:
        return 1.0
    name = recognised(file, space=family.space, driven_by_sound=family.driven_by_sound)
    return PRESETS[name].lora_scale if name else 1.0


def _key(target: Any) -> str:
    """The model's weight that a patch is for; the host's key may hold a part of it too."""
    return target[0] if isinstance(target, tuple) else target


def _check_fits(file: str, target: str, patch: Any, shape: torch.Size | None) -> None:
    """ValueError for an update whose size is another than its weight's: the host would log it and leave it out.

    The host's own code is tried where it costs nothing: on tensors without numbers, or, for the kinds that read a number, on
    one column. `shape`: the weight's; None where the model has no such weight.
    """
    if shape is None or not isinstance(patch, comfy.weight_adapter.WeightAdapterBase) or patch.name == "lora":
        return
    reads_numbers = patch.name in ("oft", "boft")
    bare = torch.empty(shape, device="meta") if not reads_numbers else torch.zeros(shape[0], *(1 for _ in shape[1:]))
    reached: list[torch.Size] = []

    def function(update: torch.Tensor) -> torch.Tensor:
        reached.append(update.shape)
        return update

    with suppress(Exception):  # the host catches some of what does not fit, not all
        patch.calculate_weight(bare, target, 1.0, 1.0, None, function)
    if reached != [bare.shape]:
        raise ValueError(
            f"{file} is a LoRA of another model: {target.removeprefix(HOSTS_PREFIX)} is {list(shape)} here and its update "
            f"({patch.name}) has another size"
        )


def _notes(
    file: str, lora: LoraFile, held: _Read, known: dict[str, str], patched: set[str], own_scale: float
) -> list[str]:
    """What of the file the model does without: weights of text encoders, of modules it has not, and of unknown parts.

    `known`: the model's weights by the names of modules; `patched`: those that got an update; `own_scale`: what the update is
    applied with at strength 1.
    """
    text, absent, unknown = [], [], []
    for module, part in ((module, part) for module, parts in lora.modules.items() for part in parts):
        target = known.get(module, "")
        if part in _OF_A_BIAS:
            target = f"{target.removesuffix('.weight')}.bias"
        if is_text_encoders(module):
            text.append(module)
        elif module not in known and not any(name.startswith(f"{module}.") for name in known):
            absent.append(module)
        elif hosts_name(module, part) not in held.taken or target not in patched:
            unknown.append(part)
    said = []
    if absent:
        said.append(f"{len(absent)} of modules that this model has not ({counted(absent)})")
    if unknown:
        said.append(f"{len(unknown)} that the host has no use for ({counted(unknown)})")
    if text:
        said.append(f"{len(text)} of a text encoder, which Load Causal LoRA leaves as it is")
    notes = [f"{file}: of its {len(held)} weights these are left out: {', '.join(said)}"] if said else []
    if doubled := lora.doubled():
        notes.append(
            f"{file} holds more than one update of {len(doubled)} of its modules, such as {shown_name(doubled[0])}; the host uses "
            "the last of them"
        )
    if own_scale != 1.0:
        notes.append(
            f"{file} says no alpha where the host looks, and is applied with {own_scale:g} times the strength, as it was trained"
        )
    elif scale := lora.unread_scale():
        ranks = ", ".join(map(str, lora.ranks))
        notes.append(
            f"{file} says {scale} for rank {ranks} where the host does not look for it, so the update has the scale 1: if its "
            "trainer divides alpha by the rank, give the quotient as strength"
        )
    return notes
