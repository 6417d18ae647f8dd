"""The host's full Wan VAE decoding the fast way: stand-ins for its decoder's layers, on a clone's object patches.

The VAE that the user loaded is not changed: the host takes a clone's patches off before it runs another one of the same model.
A decoder that holds anything unknown, or that somebody else has patched, goes the plain way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as modules
import comfy.ldm.wan.vae as wan
import comfy.ldm.wan.vae2_2 as wan2
import comfy.ops
import torch
from torch import nn

from ...adastate_core.decode.fast_parts import Attention, Conv, Norm, Nothing, Residual, UpBlock, Upsample
from ...adastate_core.decode.norm_silu import FUNCTIONS
from ...adastate_core.decode.wan_makes import WanMake
from ...adastate_core.decode.wan_vae import VaeStream
from ...adastate_core.fused import COMPILED, Fused, compiler_for
from .fusing import cache_folder

Told = Callable[[int, int], None]

_CONV2D = comfy.ops.disable_weight_init.Conv2d
# the VAEs that are known, with their decoders
_CODECS = {wan.WanVAE: wan.Decoder3d, wan2.WanVAE: wan2.Decoder3d}
# what both makes have, each in a class of its own
_RESIDUALS, _RESAMPLES = (wan.ResidualBlock, wan2.ResidualBlock), (wan.Resample, wan2.Resample)
# a module of exactly one of these is known; what none of it has to be is patched
_KNOWN = (
    *_CODECS.values(), *_RESIDUALS, *_RESAMPLES, wan2.Up_ResidualBlock, wan2.DupUp3D, wan.AttentionBlock, wan.CausalConv3d,
    wan.RMS_norm, _CONV2D, nn.Sequential, nn.SiLU, nn.Dropout, nn.Upsample, nn.Identity,
)  # fmt: skip
_STAND_INS = (Conv, Norm, Nothing, Residual, UpBlock, Upsample)
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def why_not(vae: Any) -> str:
    """Why a full VAE cannot decode the fast way, or "". What only a compiler can say is not asked."""
    codec, device, dtype = vae.first_stage_model, vae.device.type, vae.vae_dtype
    if dtype not in _DTYPES.get(device, ()):
        return f"the VAE runs in {str(dtype).removeprefix('torch.')} on {device}"
    if device == "cpu" and (reason := _no_onednn()):
        return reason
    if device == "cuda" and (reason := compiler_for(vae.device)[1]):
        return reason
    if type(getattr(codec, "decoder", None)) is not _CODECS.get(type(codec)):
        return "the VAE is of a class that is not known"
    patched = {name.rpartition(".")[0] for name in vae.patcher.object_patches}
    for name, module in _layers(codec):
        if type(module) not in _KNOWN:
            return f"the VAE's {name} is a {type(module).__name__}, which is not known"
        if name in patched or not _own(module):
            return f"the VAE's {name} is patched"
        if reason := _other(module):
            return f"the VAE's {name} {reason}"
    return ""


class FastVae:
    """A clone of a VAE's patcher whose decoder is stood in for, layer by layer. `load` it, then `ready`.

    Two of them on one VAE do not go together: the one that was loaded last is in place.
    """

    def __init__(self, vae: Any, make: WanMake) -> None:
        """`why_not(vae)` is "" """
        self._make = make
        self._codec, self._device, self._dtype = vae.first_stage_model, vae.device, vae.vae_dtype
        self._fused = Fused(FUNCTIONS, *compiler_for(vae.device), cache_folder())
        self._compiles = self._fused.way == COMPILED
        self._parts = dict(_parts(self._codec, self._fused))
        self.patcher = vae.patcher.clone()
        for name, part in self._parts.items():
            self.patcher.add_object_patch(name, part)
            if isinstance(part, Conv):
                self.patcher.add_object_patch(name.replace(".forward", ".padding"), part.padding)
        self._is_ready = False
        weakref.finalize(self, _undo, self.patcher, self._codec, self._parts).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes that lie beside the VAE's own weights while this one is used."""
        return sum(part.nbytes for part in self._parts.values() if isinstance(part, Conv))

    @property
    def in_place(self) -> bool:
        """Whether the host has loaded this one last, and `ready` has been called."""
        return self._is_ready and self._codec.conv2.forward is self._parts["conv2.forward"]

    @property
    def failed(self) -> str:
        """Why nothing could be compiled where that is needed, or ""; then only the plain way goes."""
        return self._fused.why if self._compiles and self._fused.way != COMPILED else ""

    def ready(self, batch: int, height: int, width: int, frames_per_call: int, told: Told | None = None) -> None:
        """Take the weights, after the host has loaded them. On CUDA, compile what a decode of latents [batch, C, n, height, width]
        calls, by decoding zeros; see `failed`. `told` hears (done, of how many) on the way and may raise."""
        for part in self._parts.values():
            if isinstance(part, Conv | Norm):
                part.ready()
        self._is_ready = True
        if self._compiles:
            self._compile(batch, height, width, frames_per_call, told or (lambda done, total: None))

    def _compile(self, batch: int, height: int, width: int, frames_per_call: int, told: Told) -> None:
        norms = [part for part in self._parts.values() if isinstance(part, Norm)]
        channels = self._codec.conv2.weight.shape[1]
        stream, counts = VaeStream(self._codec, frames_per_call, self._make), (1, *range(1, frames_per_call + 1))
        called: list[int] = []

        def preparing() -> None:
            called.append(1)
            total = len(norms) * len(counts)
            told(min(len(called), total), total)

        try:
            for norm in norms:
                norm.preparing = preparing
            for frames in counts:
                if not self.failed:
                    size = (batch, channels, frames, height, width)
                    stream.step(torch.zeros(size, device=self._device, dtype=self._dtype))
        finally:
            for norm in norms:
                norm.preparing = None


def stood_in(vae: Any) -> bool:
    """Whether the fast way of anyone is in place in a VAE."""
    return isinstance(getattr(vae.first_stage_model, "conv2", nn.Identity()).forward, Conv)


@cache
def _no_onednn() -> str:
    """Why oneDNN's convolution cannot be called, or ""."""
    backend = torch.backends.mkldnn
    if not backend.is_available() or not getattr(backend, "enabled", True) or not hasattr(torch, "mkldnn_convolution"):
        return "torch has no oneDNN here"
    try:
        x, weight = torch.ones(1, 2, 1, 3, 3), torch.ones(2, 2, 1, 3, 3)
        torch.mkldnn_convolution(x, weight, torch.zeros(2), (0, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    except RuntimeError as error:
        return f"oneDNN's convolution fails here ({str(error).splitlines()[0]})"
    return ""


def _layers(codec: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a decode runs through, by name."""
    yield "conv2", codec.conv2
    yield from codec.decoder.named_modules(prefix="decoder")


def _own(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, or one of ours."""
    forward = module.forward
    return isinstance(forward, _STAND_INS) or getattr(forward, "__func__", None) is type(module).forward


def _other(module: nn.Module) -> str:
    """What a module of a known class is or has that its stand-in would not do, or ""."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if not plain or set(module.stride) | set(module.dilation) != {1}:
            return "is a convolution with groups, strides, holes or padding of another kind"
        if isinstance(module, wan.CausalConv3d) and not _keeps_size(module):
            return "is a causal convolution that pads otherwise"
        if getattr(module, "weight_function", ()) or getattr(module, "bias_function", ()):
            return "has weights that are patched as it runs"
    if isinstance(module, wan.RMS_norm) and (module.bias is not None or not module.channel_first):
        return "is a norm with a bias or with its channels last"
    if isinstance(module, nn.Sequential):
        kinds = [type(layer) for layer in module]
        for i, kind in enumerate(kinds):
            if kind is wan.RMS_norm and kinds[i + 1 : i + 2] != [nn.SiLU]:
                return "has a norm without SiLU behind it"
    if isinstance(module, _RESAMPLES) and module.mode not in ("upsample2d", "upsample3d"):
        return f"is a Resample of mode {module.mode}"
    return ""


def _parts(codec: nn.Module, fused: Fused) -> Iterator[tuple[str, Any]]:
    """What stands in for what of each layer, by its name."""
    for name, module in _layers(codec):
        if isinstance(module, wan.CausalConv3d | _CONV2D):
            yield f"{name}.forward", Conv(module, _padding(module), _casts, comfy.ops.run_every_op)
        elif isinstance(module, _RESIDUALS):
            yield f"{name}.forward", Residual(module)
        elif isinstance(module, _RESAMPLES):
            yield f"{name}.forward", Upsample(module)
        elif isinstance(module, wan2.Up_ResidualBlock):
            yield f"{name}.forward", UpBlock(module)
        elif isinstance(module, wan.AttentionBlock):
            yield f"{name}.norm.forward", Norm(module.norm, fused, "norm")
            if module.optimized_attention is modules.pytorch_attention:
                yield f"{name}.optimized_attention", Attention(_kernel, modules.pytorch_attention)
        elif isinstance(module, nn.Sequential):
            for i, layer in enumerate(module):
                if isinstance(layer, wan.RMS_norm):
                    yield f"{name}.{i}.forward", Norm(layer, fused, "norm_silu")
                    yield f"{name}.{i + 1}.forward", Nothing()


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The host's own, looked up at every call."""
    return comfy.ops.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)


def _padding(module: nn.Module) -> tuple[int, ...]:
    """(rows, columns) of a convolution of pictures; (frames before, rows, columns) of a causal one that keeps its size."""
    kernel = module.kernel_size
    return tuple(module.padding) if len(kernel) == 2 else (kernel[0] - 1, kernel[1] // 2, kernel[2] // 2)


def _keeps_size(module: nn.Module) -> bool:
    """Whether a causal convolution pads as `_padding` says. Older hosts have all of it in `_padding`, newer ones the frames."""
    past, rows, columns = _padding(module)
    return module._padding in ((columns, columns, rows, rows, past, 0), past)


def _casts(module: nn.Module) -> bool:
    return bool(getattr(module, "comfy_cast_weights", False))


def _undo(patcher: Any, codec: nn.Module, parts: dict[str, Any]) -> None:
    """Leave the VAE as its class made it, if these parts are the ones in place."""
    if codec.conv2.forward is parts["conv2.forward"]:
        patcher.unpatch_model(unpatch_weights=False)
