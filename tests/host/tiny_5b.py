"""The 5B line in small: files of random weights in the exact formats of its model, its VAE and its tiny VAE.

with narrow_vae_class():  # the host's loader fixes the VAE's width, so a narrower class stands in the place of its own
    vae = comfy.sd.VAE(sd=vae_state())
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.taesd.taehv
import torch
from adastate_pack.adastate_core.geometry import WAN22
from adastate_pack.nodes.host.made_models import Shape, _drawn, random_weights
from safetensors.torch import save_file

SHAPE = Shape(128, 64, 2, WAN22)
WIDTH = 4  # of the encoder, and of the decoder
_VAE_CLASS = comfy.ldm.wan.vae2_2.WanVAE


def model_state(seed: int = 0, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The state dict of a plain transformer of 48 channels, which the host takes for WAN22_T2V."""
    return random_weights(shape, dtype, seed)


def vae_state(seed: int = 0, width: int = WIDTH, dec_width: int | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a Wan 2.2 VAE, by the names of the real file (that one: width 160, dec_width 256)."""
    with torch.device("meta"):
        names = _module(width, dec_width or width).state_dict()
    return _drawn({name: torch.empty(value.shape) for name, value in names.items()}, seed)


def tiny_vae_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a TAEHV for 48 channels, as taew2_2 and lighttaew2_2 are."""
    state = _drawn(comfy.taesd.taehv.TAEHV(latent_channels=WAN22.channels).state_dict(), seed)
    state["decoder.22.weight"] *= 0.3
    state["decoder.22.bias"] = torch.linspace(0.3, 0.7, 12)
    return state


@contextmanager
def narrow_vae_class(width: int = WIDTH, dec_width: int | None = None) -> Iterator[None]:
    """Within it the host's loader makes Wan 2.2 VAEs of this width."""
    with mock.patch.object(comfy.ldm.wan.vae2_2, "WanVAE", lambda **_: _module(width, dec_width or width)):
        yield


def loaded_model(state: dict[str, torch.Tensor] | None = None) -> Any:
    """A MODEL as Load Diffusion Model gives it."""
    return comfy.sd.load_diffusion_model_state_dict(dict(model_state() if state is None else state))


def loaded_vae(seed: int = 0, width: int = WIDTH, dec_width: int | None = None) -> Any:
    """A VAE as Load VAE gives it, but narrow."""
    with narrow_vae_class(width, dec_width):
        return comfy.sd.VAE(sd=vae_state(seed, width, dec_width))


def loaded_tiny_vae(seed: int = 0) -> Any:
    """A tiny VAE as Load VAE gives it."""
    vae = comfy.sd.VAE(sd=tiny_vae_state(seed))
    vae.first_stage_model.show_progress_bar = False
    return vae


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """The files of a model (bf16), a VAE and a tiny VAE in a folder; the VAE's is for the host within `narrow_vae_class`."""
    paths = tuple(folder / f"{name}.safetensors" for name in ("tiny_5b", "tiny_5b_vae", "tiny_5b_taehv"))
    for path, state in zip(paths, (model_state(dtype=torch.bfloat16), vae_state(), tiny_vae_state()), strict=True):
        save_file(state, path)
    return paths


def _module(width: int, dec_width: int) -> torch.nn.Module:
    return _VAE_CLASS(
        dim=width, dec_dim=dec_width, z_dim=WAN22.channels, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
