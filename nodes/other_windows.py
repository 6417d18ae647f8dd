"""What a rollout with a window for each step would take in ways that take less, by name."""

from __future__ import annotations

from dataclasses import replace

from ..adastate_core.absorption.settings import AbsorptionSettings
from ..adastate_core.cache.byte_plan import CACHE_DEVICES, CachePlan
from ..adastate_core.history import LAST_LEVEL, OWN_LEVEL
from ..adastate_core.spec import RolloutSpec
from .builder import Built


def other_windows(built: Built, text_tokens: int, vae_bytes: int, latents: int | None) -> dict[str, CachePlan]:
    """Plans by name, for a video of so many latent frames (None: of any length); none where there is one window anyway."""
    if built.spec.history != OWN_LEVEL:
        return {}
    found = {name: replace(built, spec=spec) for name, spec in _specs(built.spec).items()}
    return {name: one.plan(text_tokens, vae_bytes, latents) for name, one in found.items()}


def _specs(spec: RolloutSpec) -> dict[str, RolloutSpec]:
    one = replace(spec, history=LAST_LEVEL, windows=1)
    absorption = replace(AbsorptionSettings(), local_window_frames=spec.chunk_frames)
    return {
        "one window for all steps (preset liveavatar_one_window)": one,
        "the windows in 8 bits (cache_dtype int8)": replace(spec, cache_dtype="int8"),
        "the windows in host memory (cache_device)": replace(spec, cache_device=CACHE_DEVICES[1]),
        f"one window, and absorption of {absorption.ratio:.0%} of the layers (ISPA)": replace(
            one, absorption=absorption
        ),
    }
