"""A random Wan transformer and a random Wan 2.1 VAE, small enough for exhaustive tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from training.host_models import build_codec, build_denoiser


def tiny_denoiser(seed: int = 3) -> nn.Module:
    """2 layers of one head; nothing is at the zero that trainers start from."""
    torch.manual_seed(seed)
    model = build_denoiser(128, 64, 2)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model


@cache
def tiny_codec_file() -> str:
    """A file of a codec of width 4, whose decoder takes a small part of the demo's time; what it shows is noise."""
    torch.manual_seed(4)
    codec = build_codec(4)
    for parameter in codec.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    path = Path(tempfile.mkdtemp(prefix="tiny_codec")) / "codec.safetensors"
    save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, path)
    return str(path)
