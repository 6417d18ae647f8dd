"""Wan 2.2 S2V: video that is driven by sound and shows the picture of a reference (LiveAvatar's base)."""

from __future__ import annotations

from ..decode.wan_makes import VAE_2_1
from ..geometry import WAN21
from .family import Family
from .wan21 import WAN21_TEXT

WAN22_S2V = Family(
    name="Wan 2.2 S2V",
    space=WAN21,
    model_classes=("WAN22_S2V",),
    vae_classes=WAN21_TEXT.vae_classes,
    full_vae=VAE_2_1,
    full_examples=WAN21_TEXT.full_examples,
    vae_examples=WAN21_TEXT.vae_examples,
    empty_latent=WAN21_TEXT.empty_latent,
    refused_conditions=WAN21_TEXT.refused_conditions
    | {
        "audio_embed": "audio, which a rollout takes at its own audio input (AdaState Audio)",
        "reference_latents": "reference latents, which a rollout takes at its own reference input",
    },
    driven_by_sound=True,
)
