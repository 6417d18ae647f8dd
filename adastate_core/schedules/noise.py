"""The noise of a rollout, by (seed, chunk, step) alone (docs/semantics.md, Noise)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise(seed: int, chunk: int, step: int, shape: Sequence[int], state: bool = False) -> torch.Tensor:
    """Standard normal float32 of `shape` on the CPU, from SHA-256 of "seed/chunk/step" (or ".../state").

    The same on every device, in any order of calls, after a resume, and for every anchor.
    """
    text = f"{seed}/{chunk}/{step}" + ("/state" if state else "")
    digest = hashlib.sha256(text.encode("ascii")).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(list(shape), generator=generator, dtype=torch.float32)
