"""The noise of a rollout, by (seed, chunk, step) alone (docs/semantics.md, Noise)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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


class NoiseAhead:
    """The noise of chunks, of which the next one's may be drawn before its turn: while the device is busy, the CPU has time.

    `draw(chunk, steps)` gives all noise of a chunk, always the same.
    """

    def __init__(self, draw: Callable[[int, int], torch.Tensor]) -> None:
        self.draw = draw
        self._held: tuple[tuple[int, int], torch.Tensor] | None = None

    def prepare(self, chunk: int, steps: int) -> None:
        """Draw a chunk's noise and hold it until it is taken. If this fails, nothing is held."""
        self._held = None
        self._held = (chunk, steps), self.draw(chunk, steps)

    def take(self, chunk: int, steps: int) -> torch.Tensor:
        """A chunk's noise: what is held if it is this chunk's, else drawn now. Nothing is held afterwards."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] == (chunk, steps) else self.draw(chunk, steps)
