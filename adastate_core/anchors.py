"""What the anchor slots of the cache hold. One small frozen class a policy, each with its paper.

A policy answers three questions when a chunk has been committed: does a content frame go to the anchor instead of
the window (`slot_of`), what happens with a frame that leaves the window (`evicted`), and what becomes of the
clean state (`state_committed`). They act on one layer's cache through its `set_anchor` and `blend_anchor`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from .layer_slots import LayerSlots


@dataclass(frozen=True)
class Anchor:
    """No anchor: what leaves the window is forgotten (Self-Forcing's rolling cache, arXiv 2506.08009)."""

    kind: ClassVar[str] = "none"
    state_frames: ClassVar[int] = 0
    relative_only: ClassVar[bool] = False
    blends: ClassVar[bool] = False
    state_after_past: ClassVar[bool] = False

    @property
    def frames(self) -> int:
        """A, the cache slots reserved for the anchor, in latent frames."""
        return 0

    def slot_of(self, frame: int) -> int | None:
        """The anchor slot that content frame `frame` goes to, or None if it enters the window."""
        return None

    def evicted(self, layer: LayerSlots, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Frame `frame` left the window of `layer`; raw key and value [B, P, heads * head_dim]."""

    def state_committed(self, layer: LayerSlots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The clean state's raw keys and values [B, S, P, heads * head_dim] are known."""

    def describe(self) -> dict[str, Any]:
        """Kind and numbers, JSON-able; equal descriptions mean equal behaviour."""
        return {"kind": self.kind} | asdict(self)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; an anchor needs at least 1 latent frame (use no anchor for 0)")


@dataclass(frozen=True)
class AnchorStatic(Anchor):
    """The first `sink_frames` content frames, kept for good (LongLive, arXiv 2509.22622; StreamingLLM's sink)."""

    kind: ClassVar[str] = "static"
    sink_frames: int = 3

    def __post_init__(self) -> None:
        _at_least_one("sink_frames", self.sink_frames)

    @property
    def frames(self) -> int:
        return self.sink_frames

    def slot_of(self, frame: int) -> int | None:
        return frame if frame < self.sink_frames else None


@dataclass(frozen=True)
class AnchorEMA(AnchorStatic):
    """A sink into which evicted frames are blended: slot f mod A becomes decay slot + (1 - decay) frame.

    Raw keys and values, kept in float32: in bfloat16 most updates vanish in rounding (Reward-Forcing's EMA sink).
    """

    kind: ClassVar[str] = "ema"
    relative_only: ClassVar[bool] = True
    blends: ClassVar[bool] = True
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie between 0 (replace) and 1 (keep for good)")

    def evicted(self, layer: LayerSlots, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        layer.blend_anchor(frame % self.sink_frames, key, value, 1.0 - self.decay)


@dataclass(frozen=True)
class AnchorAdaptive(Anchor):
    """A hidden state, denoised with every chunk and never shown, replaces slots 0..S-1 (AdaState, arXiv 2605.30349).

    While it is denoised it has the positions of its slots, or with `state_after_past` those behind the past: the
    paper leaves it open, and weights want what they were trained with.
    """

    kind: ClassVar[str] = "adaptive"
    relative_only: ClassVar[bool] = True
    state_frames: int = 1  # type: ignore[misc]
    state_after_past: bool = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        _at_least_one("state_frames", self.state_frames)

    @property
    def frames(self) -> int:
        return self.state_frames

    def state_committed(self, layer: LayerSlots, keys: torch.Tensor, values: torch.Tensor) -> None:
        for slot in range(self.state_frames):
            layer.set_anchor(slot, slot, keys[:, slot], values[:, slot])


KINDS: dict[str, type[Anchor]] = {cls.kind: cls for cls in (Anchor, AnchorStatic, AnchorEMA, AnchorAdaptive)}


def anchor_from(description: dict[str, Any]) -> Anchor:
    """The policy that `describe` described; ValueError for an unknown kind."""
    numbers = dict(description)
    kind = numbers.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"anchor kind {kind!r} is not known; known are {', '.join(KINDS)}")
    return KINDS[kind](**numbers)
