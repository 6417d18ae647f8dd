"""The talking demo, 6: one safetensors file in the layout of public S2V files with scaled fp8, for the host's standard loader.

    python3 run.py train talking_export --config training/configs/talking_export.toml

Linears are float8 with a scale each, as ComfyUI's fp8_scaled files have them; injectors of blocks that the model has not are
left out.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .export import LOADED_AS, fingerprint, write_weights
from .run import Run
from .talking_model import build_talking, sizes_of

FP8 = torch.float8_e4m3fn
# the largest number of FP8
_MOST = 448.0
# Convolutions whose output goes straight into a layer norm: their weights may have any size, so plain FP8 of a good size does.
# (Scales are for linears alone.) The far motion's weights are zero.
_BEFORE_NORM = ("casual_audio_encoder.encoder.conv1_local.conv", "casual_audio_encoder.encoder.conv1_global.conv")
_ZERO = "frame_packer.proj_4x.weight"
# the mark by which the host knows scaled files; of two elements: weights alone are FP8, the arithmetic is not
_MARK = "scaled_fp8"


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """[] float32: what a weight is divided by, so that its largest value is FP8's."""
    return (weight.abs().amax().float() / _MOST).clamp(min=1e-12)


def _factor(weight: torch.Tensor) -> float:
    """The power of two that brings a weight's largest value to between 224 and 448."""
    return 2.0 ** math.floor(math.log2(_MOST / float(weight.abs().amax().clamp(min=1e-12))))


def rounded(weight: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The nearest that FP8 has, with the gradient of no rounding."""
    near = (weight.detach() / scale).clamp(-_MOST, _MOST).to(FP8).to(weight.dtype) * scale
    return weight + (near - weight.detach())


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else rounded(module.bias)
    return F.linear(x, rounded(module.weight, _scale(module.weight.detach())), bias)


def _convolution(module: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x, rounded(module.weight, 1 / _factor(module.weight.detach())), module.bias, module.stride)


def round_as_exported(model: nn.Module) -> None:
    """From now on the model computes with its weights as its file will hold them; gradients pass as if they were not rounded."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_linear, module)
        elif name in _BEFORE_NORM:
            module.forward = partial(_convolution, module)


def scaled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights as the file holds them. The host has the biases of scaled linears in FP8; they are rounded here, so that
    every host has the same."""
    layers, dim, feed_forward = sizes_of(weights)
    model = build_talking(weights, layers, dim, feed_forward)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    out = {_MARK: torch.zeros(2, dtype=FP8)}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module in linears and kind == "weight":
            scale = _scale(value)
            out[name], out[f"{module}.scale_weight"] = (value / scale).clamp(-_MOST, _MOST).to(FP8), scale
        elif module in linears:
            out[name] = value.clamp(-_MOST, _MOST).to(FP8).to(torch.bfloat16)
        elif module in _BEFORE_NORM:
            factor = _factor(weights[f"{module}.weight"])
            out[name] = (value * factor).to(FP8 if kind == "weight" else torch.bfloat16)
        elif name == _ZERO and not value.any():
            out[name] = value.to(FP8)
        else:
            out[name] = value.to(torch.bfloat16)
    return {name: value.contiguous() for name, value in out.items()}


def main() -> None:
    run = Run.from_arguments("Export the talking demo.")
    config = run.config
    tensors = scaled(torch.load(config["weights"], weights_only=True))
    halves = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    prints = [fingerprint(halves, dtype) for dtype in LOADED_AS]
    metadata = {"format": "pt", "adastate": json.dumps(config["rollout"] | {"fingerprints": prints})}
    target = Path(config["folder"]) / config["file"]
    write_weights(target, tensors, metadata)


if __name__ == "__main__":
    main()
