"""The 5B line (Wan 2.2 TI2V 5B): plain text to video, and pictures into video inside the first chunk (LongLive 2.0)."""

from __future__ import annotations

from ..geometry import WAN22
from .family import Family
from .wan21 import WAN21_TEXT

WAN22_5B = Family(
    name="Wan 2.2 5B",
    space=WAN22,
    model_classes=("WAN22_T2V",),
    vae_classes={"full": "WanVAE", "tiny": "TAEHV"},
    vae_examples="load wan2.2_vae, or a tiny one (taew2_2, lighttaew2_2)",
    refused_conditions=WAN21_TEXT.refused_conditions,
)
