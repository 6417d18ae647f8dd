"""Wan 2.1 text to video: the few-step causal models that are distilled from it, and the host's own class for them."""

from __future__ import annotations

from ..geometry import WAN21
from .family import Family

WAN21_TEXT = Family(
    name="Wan 2.1 text to video",
    space=WAN21,
    # the host's own autoregressive class has the same weights; only the attention's forward differs, which a rollout replaces
    model_classes=("WAN21_T2V", "WAN21_CausalAR_T2V"),
    vae_classes={"full": "WanVAE", "tiny": "TAEHV"},
    vae_examples="load wan_2.1_vae, the demo's, or a tiny one (taew2_1, lighttaew2_1)",
)
