"""The host's own Wan classes, built bare for training: what is trained is exactly what is run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

# Wan 2.1's latent statistics (comfy/latent_formats.py, class Wan21): model space = (z - mean) / std per channel.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def use_host() -> None:
    """Make `comfy` importable from COMFYUI_PATH (run.py sets it); raises SystemExit with what to do without one."""
    path = os.environ.get("COMFYUI_PATH", "")
    if not (Path(path) / "comfy").is_dir():
        raise SystemExit(
            "training needs the host's classes: run it as `python3 run.py train ...`, or set COMFYUI_PATH."
        )
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()


def build_codec(dim: int) -> nn.Module:
    """A causal Wan 2.1 VAE of the given width (the real one has 96), initialised for image-first training.

    Every causal convolution starts with only its newest time slice non-zero, and the temporal resamplers start as
    "keep the newest" and "repeat", so that a codec trained on single pictures is already a video codec.
    """
    use_host()
    from comfy.ldm.wan.vae import CausalConv3d, WanVAE

    codec = WanVAE(dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    for name, module in codec.named_modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            newest = module.weight[:, :, -1] if isinstance(module, CausalConv3d) else module.weight
            with torch.no_grad():
                if name.endswith("time_conv"):
                    identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                    newest.copy_(identity[:, :, None, None])
                else:
                    gain = 0.3 if name.endswith(("residual.6", "proj")) else 1.0
                    newest.copy_(nn.init.kaiming_normal_(torch.empty_like(newest), nonlinearity="linear") * gain)
        elif hasattr(module, "gamma"):
            nn.init.ones_(module.gamma)
    with torch.no_grad():
        codec.conv1.bias[16:] = -4.0
    return codec


def build_denoiser(dim: int, ffn_dim: int, layers: int) -> nn.Module:
    """A Wan 2.1 t2v transformer (heads of 128 channels, text_dim 4096), initialised as DiTs are: gates at zero."""
    use_host()
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v", dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=layers, in_dim=16, out_dim=16,
        operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("modulation"):
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    nn.init.normal_(model.text_embedding[0].weight, std=0.02)
    nn.init.normal_(model.time_embedding[0].weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    return model
