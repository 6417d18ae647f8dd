"""The 5B line (Wan 2.2 TI2V 5B): plain text to video, and pictures into video inside the first chunk (LongLive 2.0)."""

from __future__ import annotations

from ..decode.wan_makes import VAE_2_2
from ..geometry import WAN22
from .family import Family
from .wan21 import WAN21_TEXT

WAN22_5B = Family(
    name="Wan 2.2 5B",
    space=WAN22,
    model_classes=("WAN22_T2V",),
    vae_classes={"full": "WanVAE", "tiny": "TAEHV"},
    full_vae=VAE_2_2,
    full_examples="load wan2.2_vae",
    vae_examples="load wan2.2_vae, or a tiny one (taew2_2, lighttaew2_2)",
    empty_latent="Wan22ImageToVideoLatent",
    refused_conditions=WAN21_TEXT.refused_conditions,
)
