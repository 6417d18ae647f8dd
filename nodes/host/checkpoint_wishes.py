"""What a checkpoint's file says about how it wants to be rolled out.

The host's loaders do not pass a file's metadata on, so it is found again by the weights' fingerprint.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch

from ...adastate_core.weights.checkpoints import FORMAT_KEY, Checkpoint, open_checkpoint, own_metadata
from ...adastate_core.weights.presets import PRESETS, recognised
from ...adastate_core.weights.presets import preset as named_preset
from ...adastate_core.weights.wan_weights import EXTRA_STATE, QUANTIZATION_KEY
from .model import fingerprint
from .refusals import NOTES_KEY, check_model

log = logging.getLogger("adastate")
DEFAULTS_KEY = "adastate_defaults"
KIND, LORAS = "diffusion_models", "loras"
_WANTED = {KIND: "causal Wan checkpoint", LORAS: "LoRA"}
# what the host's own loader offers, by its words
WEIGHT_DTYPES = {
    "default": {},
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def rollout_defaults(patcher: Any) -> dict[str, Any] | None:
    """The rollout settings in the metadata of the file that `patcher` was loaded from, or None.

    Keys: steps, shift, chunk_frames, window_frames, positions, fps, sampler, start, state_frames, state_after_past, ending,
    keep_first_frame (each optional), and fingerprints: one for each dtype that the host may load the file in. `preset` names one of
    weights/presets.py. What a node of this pack put on the model wins; empty, it means that nothing of the file's is to be
    followed.
    """
    if DEFAULTS_KEY in patcher.model_options:
        return patcher.model_options[DEFAULTS_KEY] or None
    wanted = fingerprint(patcher)
    for name in folder_paths.get_filename_list("diffusion_models"):
        path = folder_paths.get_full_path("diffusion_models", name)
        if path is None or not name.endswith((".safetensors", ".sft")):
            continue
        settings = _settings(path, Path(path).stat().st_mtime_ns)
        if settings is not None and wanted in settings.get("fingerprints", ()):
            return settings
    return None


@lru_cache(maxsize=512)
def _settings(path: str, changed: int) -> dict[str, Any] | None:
    """The metadata of one file (its header only is read); `changed` keys the cache."""
    try:
        return own_metadata(open_checkpoint(path)) or None
    except ValueError:
        return None


def checkpoint_files(kind: str = KIND) -> list[str]:
    """Files that may hold weights, by the host's lists; `kind` is one of its model folders."""
    known = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(known)]


def checkpoint_path(file: str, kind: str = KIND) -> Path:
    """Where a listed file is; ValueError for any other name."""
    wanted = _WANTED[kind]
    if not file:
        raise ValueError(f"no file is chosen; put a {wanted} into models/{kind} and refresh the page")
    if file not in checkpoint_files(kind):
        raise ValueError(
            f"{file!r} is not among the files in models/{kind}; put the {wanted.split()[-1]} there, or refresh the page to see "
            "new files"
        )
    return Path(folder_paths.get_full_path_or_raise(kind, file))


def file_fingerprint(file: str | None, kind: str = KIND) -> str:
    """Changes when the file does; empty for a name that is not (yet) known."""
    try:
        return str(checkpoint_path(file, kind).stat().st_mtime_ns) if file else ""
    except (ValueError, OSError):
        return ""


def wished(file: str, checkpoint: Checkpoint, asked: str) -> dict[str, Any]:
    """The rollout defaults of a file for the preset `asked` ("auto": its own metadata, else by its name)."""
    if asked == "none":
        return {}
    if asked == "auto":
        own = own_metadata(checkpoint)
        found, written_as = checkpoint.geometry, checkpoint.metadata.get(FORMAT_KEY, "")
        name = recognised(file, checkpoint.part, found.space, written_as, found.driven_by_sound)
        return own or (named_preset(name).settings() if name else {})
    return named_preset(asked).settings()


def load_causal(file: str, weight_dtype: str, asked: str) -> Any:
    """The host's MODEL of a checkpoint in any public layout, with its defaults on it. ValueError for what is none."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}; it must be one of {', '.join(WEIGHT_DTYPES)}")
    checkpoint = open_checkpoint(checkpoint_path(file))
    _ = checkpoint.geometry
    defaults = wished(file, checkpoint, asked)
    # an entry that names the host's own autoregressive class is left behind, since a rollout needs the plain one
    metadata = {name: text for name, text in checkpoint.metadata.items() if name == QUANTIZATION_KEY}
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            {name: weight for name, weight in checkpoint.tensors() if not name.endswith(EXTRA_STATE)},
            model_options=dict(WEIGHT_DTYPES[weight_dtype]),
            metadata=metadata,
        )
    except Exception as error:  # what weights of odd sizes raise there has no bounds
        if isinstance(
            error, (torch.OutOfMemoryError, MemoryError, comfy.model_management.InterruptProcessingException)
        ):
            raise
        # a RuntimeError names the weight; the others speak of the host's code
        reason = " ".join(str(error).split())[:300] if isinstance(error, RuntimeError) else "see the log for why"
        raise ValueError(f"{file} is laid out like a Wan transformer but the host cannot load it: {reason}") from error
    if patcher is None:
        raise ValueError(
            f"{file} is laid out like a Wan transformer but the host does not recognise it; update ComfyUI"
        )
    check_model(patcher)
    if defaults or asked == "none":
        patcher.model_options[DEFAULTS_KEY] = defaults
    if unused := checkpoint.unused():
        patcher.model_options[NOTES_KEY] = [unused]
        log.warning(unused)
    return patcher


def notes_of(patcher: Any) -> list[str]:
    """A sentence each about what of a MODEL's files it does without, as its loaders found it."""
    return list(patcher.model_options.get(NOTES_KEY, ()))


def with_preset(patcher: Any, name: str, ending: str, keep_first_frame: bool = False, sampler: str = "") -> Any:
    """A clone of a MODEL that is to be rolled out by the preset's rules, to end so (one of spec.ENDINGS), with a past that begins
    with the first frame if `keep_first_frame`, and by `sampler` (empty: the preset's own). ValueError for what does not go with the
    preset."""
    preset = named_preset(name)
    preset.check_sampler(sampler or preset.sampler)
    if keep_first_frame and not preset.remade:
        others = ", ".join(other.name for other in PRESETS.values() if other.remade)
        together = "denoises chunks together and " if preset.blocks > 1 else ""
        raise ValueError(
            f"keep_first_frame is on, and {preset.title} {together}caches its past from chunk to chunk; turn it off, connect "
            f"Anchor: Static for the first frame, or choose {others}"
        )
    clone = patcher.clone()
    clone.model_options[DEFAULTS_KEY] = preset.settings() | {"ending": ending}
    if keep_first_frame:
        clone.model_options[DEFAULTS_KEY]["keep_first_frame"] = True
    if sampler:
        clone.model_options[DEFAULTS_KEY]["sampler"] = sampler
    return clone
