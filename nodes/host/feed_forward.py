"""A Wan block's feed-forward with the GELU in the epilogue of the matrix product before it, where that is a plain one on CUDA."""

from __future__ import annotations

import comfy.ops
import torch
from torch import nn

from .fusing import is_plain

_LINEARS = (nn.Linear, comfy.ops.disable_weight_init.Linear)
_DTYPES = (torch.bfloat16, torch.float16)


def feed_forward(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`ffn(x)` of [B, N, width]; one kernel and one pass over its widest activations less where nothing hinders. That rounds once
    less, so the last bits differ."""
    if hindrance(ffn, x) is not None:
        return ffn(x)
    return ffn[2](gelu_linear(ffn[0], x))


def gelu_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """GELU of a linear's output [..., out_features] as one operation. On CUDA it is cublasLt's, which approximates with tanh as
    Wan does; on the CPU it is the exact function."""
    rows = torch.ops.aten._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


def hindrance(ffn: nn.Module, x: torch.Tensor) -> str | None:
    """Why the modules of a feed-forward of `x` are called one by one, or None."""
    if x.device.type != "cuda" or x.dtype not in _DTYPES:
        return f"{x.dtype} on {x.device.type} has no such epilogue"
    if type(ffn) is not nn.Sequential or len(ffn) != 3:
        return f"it is a {type(ffn).__name__}"
    linear, gelu, _ = ffn
    if type(gelu) is not nn.GELU or gelu.approximate != "tanh":
        return f"its second part is a {type(gelu).__name__} of another kind"
    if type(linear) not in _LINEARS or linear.bias is None:
        return f"its linear is a {type(linear).__name__} of another kind"
    for module in (ffn, linear, gelu):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return "it is patched or has hooks"
    if getattr(linear, "weight_function", None) or getattr(linear, "bias_function", None):
        return "its linear is patched (a LoRA that is not merged)"
    if getattr(linear, "comfy_cast_weights", False):
        return "its linear casts its weights"
    for tensor in (linear.weight, linear.bias):
        if not is_plain(tensor) or tensor.dtype != x.dtype or tensor.device != x.device:
            return f"its linear holds a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
    return None
