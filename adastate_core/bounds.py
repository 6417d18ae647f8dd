"""How far the numbers of a rollout may go: nodes' inputs, a checkpoint's metadata and presets all hold to these."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import WAN21


@dataclass(frozen=True)
class Bound:
    """From `least` to `most`; `auto` is what an input says for "what the checkpoint wants" (of a size: what the picture has, of a
    length: until it is stopped), where it may; `step` is what the number is a multiple of, or counts in."""

    least: float
    most: float
    auto: float | None = None
    step: float | None = None

    def holds(self, value: object) -> bool:
        """Whether a value from a file is a number within it; a whole one where the bound is."""
        whole = isinstance(self.least, int)
        sound = type(value) is int or (not whole and type(value) is float)
        return sound and self.least <= value <= self.most


_SIZE = Bound(WAN21.multiple, 8192, auto=0, step=WAN21.multiple)
BOUNDS: dict[str, Bound] = {
    "width": _SIZE,
    "height": _SIZE,
    "length": Bound(1, 2**24, auto=0, step=WAN21.temporal_stride),
    "batch_size": Bound(1, 64),
    "seed": Bound(0, 2**64 - 1),
    "steps": Bound(1, 100, auto=0),
    "shift": Bound(1e-6, 100.0, auto=0.0),
    "chunk_frames": Bound(1, 64, auto=0),
    "window_frames": Bound(0, 4096, auto=-1),
    "blocks": Bound(1, 64),
    "restart_frames": Bound(0, 10**6),
    "overlap_frames": Bound(0, 4096),
    "trained_frames": Bound(1, 10**6),
    "max_seconds": Bound(0.0, 31_536_000.0),  # a year
    "fps": Bound(1.0, 240.0, auto=0.0),
}
