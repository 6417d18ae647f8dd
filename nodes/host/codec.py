"""The host's loaded VAE as a streaming decoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ...adastate_core.vae_stream import VaeStream, cache_bytes


def check_vae(vae: Any) -> None:
    """ValueError, naming what was given, unless `vae` is a causal Wan 2.1 VAE with 16 channels."""
    module = getattr(vae, "first_stage_model", None)
    name = type(module).__name__
    if name != "WanVAE" or getattr(vae, "latent_channels", 0) != 16:
        raise ValueError(
            f"the vae is a {name}; streaming decode needs a Wan 2.1 VAE (16 channels): load wan_2.1_vae or the demo's"
        )


class HostDecoder:
    """One stream of latents to pictures through the host's VAE, in its dtype, on its device."""

    def __init__(self, vae: Any, frames_per_call: int = 1) -> None:
        check_vae(vae)
        self.vae = vae
        self.stream = VaeStream(vae.first_stage_model, frames_per_call)

    @property
    def patcher(self) -> Any:
        """The model patcher to load beside others."""
        return self.vae.patcher

    def cache_bytes(self, batch: int, height: int, width: int) -> int:
        """Bytes that the carried cache will take, for latents [batch, 16, t, height, width]."""
        return cache_bytes(_width(self.vae), height, width, batch, self.vae.vae_dtype)

    def working_bytes(self, batch: int, height: int, width: int) -> int:
        """What a chunk's decode takes beside the cache: the host's reckoning for each item, and the cache before it."""
        one = int(self.vae.memory_used_decode((1, 16, 1, height, width), self.vae.vae_dtype))
        return batch * one + self.cache_bytes(batch, height, width)

    def load(self, shape: torch.Size) -> None:
        """Bring the VAE to its device, with room for its cache. `shape` is that of the latents."""
        batch, height, width = shape[0], shape[3], shape[4]
        needed = self.cache_bytes(batch, height, width) + self.working_bytes(batch, height, width)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, n, h, w] in VAE space to pictures [B, t, H, W, 3] float32 in 0..1 on the host's output device."""
        moved = latents.to(self.vae.vae_dtype).to(self.vae.device)
        return self.vae.process_output(self.stream.step(moved).to(self.vae.output_device).float())

    def mark(self) -> Any:
        return self.stream.mark()

    def rewind(self, mark: Any) -> None:
        self.stream.rewind(mark)

    def snapshot(self) -> dict[str, Any]:
        return self.stream.snapshot()

    def restore(self, saved: dict[str, Any]) -> None:
        self.stream.restore(saved, self.vae.device, self.vae.vae_dtype)


def _width(vae: Any) -> int:
    return int(vae.first_stage_model.decoder.head[0].gamma.shape[0])
