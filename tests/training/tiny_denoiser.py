"""A random Wan transformer, small enough for exhaustive tests."""

from __future__ import annotations

import torch
from torch import nn

from training.host_models import build_denoiser


def tiny_denoiser(seed: int = 3) -> nn.Module:
    """2 layers of one head; nothing is at the zero that trainers start from."""
    torch.manual_seed(seed)
    model = build_denoiser(128, 64, 2)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model
