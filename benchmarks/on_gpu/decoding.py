"""Decoding 3 latents: full and tiny VAE, both ways, layouts, 1 and 3 latents a call."""

from __future__ import annotations

from typing import Any

import torch
from host import demo_vae

from on_gpu.bench import Bench, NotOffered, Section, either, median_of, ms

WAN_VAE = {
    "dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}


def random_vae() -> Any:
    """The host's VAE of Wan 2.1's geometry with random weights."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = WanVAE(**WAN_VAE).state_dict()
    return comfy.sd.VAE(sd={name: _drawn(name, value, generator) for name, value in shapes.items()})


def random_tiny_vae() -> Any:
    """The host's tiny VAE (TAEHV) for 16 channels with random weights."""
    import comfy.sd
    from comfy.taesd.taehv import TAEHV

    generator = torch.Generator().manual_seed(0)
    vae = comfy.sd.VAE(sd={n: _drawn(n, v, generator) for n, v in TAEHV(latent_channels=16).state_dict().items()})
    vae.first_stage_model.show_progress_bar = False
    return vae


def _drawn(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("gamma"):
        return torch.ones(value.shape)
    fan = value[0].numel() if value.ndim > 1 else 100
    return torch.randn(value.shape, generator=generator) / fan**0.5


def vae_of(bench: Bench, kind: str) -> Any:
    """A VAE of the exact geometry, or the demo's where the model is the demo's; made once."""
    made = bench.__dict__.setdefault("vaes", {})
    if kind not in made:
        small = bench.size.model == "demo"
        made[kind] = random_tiny_vae() if kind == "tiny" else demo_vae() if small else random_vae()
    return made[kind]


def decoder_of(bench: Bench, kind: str, fast: bool, latents: int = 1) -> Any:
    """A loaded decoder. NotOffered if it cannot go the fast way."""
    from adastate_pack.nodes.host.codec import HostDecoder

    decoder = HostDecoder(vae_of(bench, kind), latents, fast=fast)
    decoder.load(torch.Size((1, 16, 3, bench.size.height // 8, bench.size.width // 8)))
    if fast and decoder.way == "plain":
        raise NotOffered(decoder.why_plain)
    return decoder


def decoding(bench: Bench) -> Section:
    """Milliseconds of 12 pictures once the decoder's cache is full."""
    section = Section("Decoding 3 latents", ["VAE", "way", "latents a call", "ms", "pictures a second"])
    for kind in ("full", "tiny"):
        for way, latents in (("plain", 1), ("plain", 3), ("channels last", 1), ("fast", 1), ("fast", 3)):
            if kind == "tiny" and way == "channels last":
                continue
            took: list[float] = []
            cell = either(
                lambda kind=kind, way=way, latents=latents, took=took: _timed(bench, kind, way, latents, took)
            )
            section.rows.append([kind, way, str(latents), cell, f"{12 / took[0]:.1f}" if took else ""])
    section.notes.append(
        "Channels last: the plain way with the weights and latents in that layout, nothing else. "
        "Pictures end as bytes on the device."
    )
    return section


def _timed(bench: Bench, kind: str, way: str, latents: int, took: list[float]) -> str:
    decoder = decoder_of(bench, kind, way == "fast", latents)
    x = torch.randn(1, 16, 3, bench.size.height // 8, bench.size.width // 8)
    model = decoder.vae.first_stage_model
    if way == "channels last":
        # the layout alone, on the loaded VAE's own modules; put back below
        decoder.stream.layout = torch.channels_last_3d
        _lay_out(model, torch.channels_last_3d)
    try:
        decoder.step(x[:, :, :1], "bytes")
        took.append(median_of(lambda: decoder.step(x, "bytes"), bench.size.rounds))
    finally:
        if way == "channels last":
            _lay_out(model, torch.contiguous_format)
    return ms(took[0])


def _lay_out(model: torch.nn.Module, layout: torch.memory_format) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
