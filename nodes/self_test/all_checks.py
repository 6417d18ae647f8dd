"""Which checks there are, in the order in which they run: the small ones that name a fault first."""

from __future__ import annotations

from functools import partial

import torch

from ...adastate_core.weights.presets import OWN_PRESETS
from ..host import made_models as made
from . import kernel_checks, other_checks, rollout_checks
from .outcome import Check


def all_checks(speed: bool = True) -> list[Check]:
    """Every check; without `speed` none that is only timed."""
    found = [
        Check(f"attention in {str(dtype).removeprefix('torch.')}", partial(kernel_checks.attention_kernel, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    found.append(Check("rotation", kernel_checks.rotation))
    found += [
        Check(f"numbers in {kind}", partial(kernel_checks.eight_bits, cache_dtype=kind)) for kind in ("int8", "fp8")
    ]
    found.append(Check("demo model", rollout_checks.demo))
    found += [Check(f"preset {name}", partial(rollout_checks.preset, name=name)) for name in OWN_PRESETS]
    found += [
        Check(f"interrupt, {name}", partial(rollout_checks.interrupt, name=name)) for name in ("longlive", "adastate")
    ]
    for kind, device in (("int8", "gpu"), ("fp8", "gpu"), ("model", "host memory"), ("int8", "host memory")):
        words = " in ".join(word for word in (kind if kind != "model" else "past", device) if word != "gpu")
        run = partial(rollout_checks.storage, cache_dtype=kind, cache_device=device)
        found.append(Check(f"past in {kind}" if device == "gpu" else words, run))
    found.append(Check("absorption", rollout_checks.absorption))
    for name, make in (
        ("demo's VAE", made.demo_vae),
        ("full VAE", made.random_vae),
        ("tiny VAE", made.random_tiny_vae),
    ):
        found.append(Check(f"decode, {name}", partial(other_checks.decode, make=make)))
    return found + ([Check("one block of 1.3B", other_checks.block_of_1_3b)] if speed else [])
