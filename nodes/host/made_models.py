"""Models made on the spot, to try a card with: random ones in the host's formats, the demo's, and a plain twin on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.model
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.taesd.taehv import TAEHV

from ...adastate_core.attention.cached import CachedAttention
from ...adastate_core.attention.wan import SESSION, TEXT_KEY, cross_attention_forward, self_attention_forward
from ...adastate_core.geometry import WAN21, LatentSpace, ModelGeometry
from ...adastate_core.schedules.schedule import timesteps
from .output_files import PACK

DEMO = PACK / "models" / "diffusion_models" / "adastate_demo.safetensors"
DEMO_VAE = PACK / "models" / "vae" / "adastate_demo_vae.safetensors"


@dataclass(frozen=True)
class Shape:
    """A Wan text-to-video transformer: its width, that of its feed-forward part, how many blocks it has, and whose latents it
    takes."""

    width: int
    feed_forward: int
    layers: int
    space: LatentSpace = WAN21

    def module(self, device: str, dtype: torch.dtype) -> Any:
        """The host's module of this shape, its weights not set."""
        return comfy.ldm.wan.model.WanModel(
            model_type="t2v", dim=self.width, ffn_dim=self.feed_forward, num_heads=self.width // 128,
            num_layers=self.layers, in_dim=self.space.channels, out_dim=self.space.channels,
            operations=comfy.ops.disable_weight_init, device=device, dtype=dtype,
        )  # fmt: skip


TINY = Shape(128, 64, 2)
# one of the 30 blocks of Wan 2.1 1.3B (Wan 2.1, configs/wan_t2v_1_3B.py)
ONE_BLOCK = Shape(1536, 8960, 1)

# what the random models' queries and keys, and what their attention adds, are multiplied with
SHARPNESS, LOUDNESS = 2.0, 4.0


def random_weights(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a random model in the public layout, the same at every call; values of a size that keeps activations near
    one, and attention that picks among its keys, as trained models do: what is read of the past then shows."""
    with torch.device("meta"):
        names = shape.module("meta", dtype).state_dict()
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, value in names.items():
        drawn = torch.randn(value.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            sharp = SHARPNESS if name.endswith(("norm_q.weight", "norm_k.weight")) else 1.0
            weights[name] = (sharp * (1 + 0.1 * drawn)).to(dtype)
        elif name == "casual_audio_encoder.weights":  # an S2V model's, which it divides by the sum of
            weights[name] = (1 + 0.5 * drawn).to(dtype)
        else:
            fan = value[0].numel() if value.ndim > 1 else 100
            loud = LOUDNESS if ".self_attn.o." in name else 1.0
            weights[name] = (loud * drawn / fan**0.5).to(dtype)
    return weights


def loaded(weights: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Any:
    """A MODEL of a state dict through the host's own loader; `dtype` None leaves it to the host."""
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def demo_weights() -> dict[str, torch.Tensor]:
    """The shipped demo model's state dict."""
    return comfy.utils.load_torch_file(str(DEMO), safe_load=True)


def demo_vae() -> Any:
    """The shipped VAE through the host's own loader."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(DEMO_VAE), safe_load=True))


def random_vae(seed: int = 0, width: int = 4) -> Any:
    """A random full Wan 2.1 VAE, as narrow as `width`."""
    made = WanVAE(dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=_drawn(made.state_dict(), seed))


def random_tiny_vae(seed: int = 0) -> Any:
    """A random tiny VAE (TAEHV) for Wan 2.1's latents."""
    weights = _drawn(TAEHV(latent_channels=16).state_dict(), seed)
    weights["decoder.22.weight"] *= 0.3
    weights["decoder.22.bias"] = torch.tensor([0.4, 0.5, 0.6])
    made = comfy.sd.VAE(sd=weights)
    made.first_stage_model.show_progress_bar = False
    return made


def _drawn(names: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, value in names.items():
        fan = value[0].numel() if value.ndim > 1 else 100
        drawn = torch.randn(value.shape, generator=generator) / fan**0.5
        weights[name] = torch.ones_like(value) if name.endswith("gamma") else drawn
    return weights


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of [B, tokens, heads * d] as its formula says, in float64 on the CPU; back in q's dtype, on the CPU."""
    wide = (t.detach().cpu().double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    queries, keys, values = wide
    weights = (queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2).to(q.dtype)


class PlainWan:
    """A CausalModel that asks nothing of the card: the host's transformer in float32 on the CPU, its attention `written_out`."""

    def __init__(self, shape: Shape, weights: dict[str, torch.Tensor], context: torch.Tensor) -> None:
        self.module, self.device, self.kernel = shape.module("cpu", torch.float32), torch.device("cpu"), written_out
        self.module.load_state_dict({name: value.float() for name, value in weights.items()})
        space, patch = shape.space, self.module.patch_size[1]
        self.geometry = ModelGeometry(space.channels, shape.layers, shape.width // 128, 128, patch, space)
        self._context = context.float()
        for i, block in enumerate(self.module.blocks):
            for part, make in ((block.self_attn, self_attention_forward), (block.cross_attn, cross_attention_forward)):
                part.forward = make(part, i, part.forward)

    def set_context(self, context: torch.Tensor) -> None:
        """The text embeddings [1, n, c] of the passes that follow."""
        self._context = context.float()

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        """One forward of [1, C, frames, h, w]."""
        own = {SESSION: attention, TEXT_KEY: id(self._context)}
        times = timesteps(timestep, x)
        return self.module.forward_orig(x, times, self._context, freqs=None, transformer_options=own)
