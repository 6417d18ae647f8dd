"""What may come through a node's sockets: the host compares the types of links alone, so a number in a prompt's JSON passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...adastate_core.anchors import Anchor
from ...adastate_core.audio.track import AudioTrack
from ...adastate_core.prompts.values import Prompts
from ...adastate_core.rollout_state import RolloutState


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_conditioning(value: Any) -> bool:
    """A list of [embeddings, options]; how many of them is for the node to say."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[1], Mapping) and hasattr(one[0], "shape")
        for one in value
    )


def _is_audio(value: Any) -> bool:
    """A mapping, perhaps one that reads its file when it is asked."""
    return isinstance(value, Mapping) and "waveform" in value and "sample_rate" in value


def _is_encoded_audio(value: Any) -> bool:
    return isinstance(value, Mapping) and "encoded_audio_all_layers" in value


def _is_latent(value: Any) -> bool:
    return isinstance(value, Mapping) and hasattr(value.get("samples"), "is_nested")


# by type of link: what it is, whether a value is one, and where it comes from
_KINDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "MODEL": ("a MODEL", _has("model_options", "clone"), "Load Causal Video Model"),
    "CLIP": ("a CLIP", _has("tokenize"), "Load CLIP"),
    "VAE": ("a VAE", _has("first_stage_model"), "Load VAE"),
    "CONDITIONING": ("a CONDITIONING", _is_conditioning, "CLIP Text Encode"),
    "LATENT": ("a LATENT", _is_latent, "a node that makes one"),
    "IMAGE": ("an IMAGE", _of(torch.Tensor), "Load Image"),
    "AUDIO": ("an AUDIO", _is_audio, "Load Audio"),
    "AUDIO_ENCODER_OUTPUT": ("an AUDIO_ENCODER_OUTPUT", _is_encoded_audio, "Audio Encoder Encode"),
    "VIDEO": ("a VIDEO", _has("get_components"), "Load Video"),
    "SIGMAS": ("SIGMAS", _of(torch.Tensor), "a scheduler"),
    "UPSCALE_MODEL": ("an UPSCALE_MODEL", _has("model", "scale"), "Load Upscale Model"),
    "INTERP_MODEL": (
        "an INTERP_MODEL",
        _has("model", "load_device", "model_dtype"),
        "Load Frame Interpolation Model",
    ),
    "STRING": ("a text", _of(str), "a node that makes one"),
    "ADASTATE_ANCHOR": ("an ANCHOR", _of(Anchor), "one of the Anchor nodes"),
    "ADASTATE_AUDIO": ("an AUDIO TRACK", _of(AudioTrack), "AdaState Audio"),
    "ADASTATE_PROMPTS": ("PROMPTS", _of(Prompts), "Prompt Timeline or Prompt At"),
    "ADASTATE_STATE": ("a STATE", _of(RolloutState), "a rollout or Load Rollout State"),
    "ADASTATE_ABSORPTION": ("an ABSORPTION", _has("settings", "solution"), "ISPA Cache Absorption or Load Absorption"),
    "ADASTATE_STREAM": ("a STREAM", _has("filename_prefix", "fps"), "Stream To Video"),
}


def socket_fault(types: str, value: Any) -> str | None:
    """What a socket of these types (as the host writes them, "A" or "A,B") takes, in words, if `value` is none of it."""
    kinds = [_KINDS[name] for name in types.split(",") if name in _KINDS]
    if not kinds or any(is_one(value) for _, is_one, _ in kinds):
        return None
    names, sources = (" or ".join(kind[i] for kind in kinds) for i in (0, 2))
    return f"it must be {names}: connect {sources}"
