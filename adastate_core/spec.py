"""What a rollout is, before anything is allocated: the model's geometry, sizes, window, anchor, positions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .absorption.settings import AbsorptionSettings, absorption_bytes
from .anchors import Anchor, anchor_from
from .cache.byte_plan import CACHE_DEVICES, CACHE_DTYPES, CachePlan, LayerSpec
from .cache.specs import describe_layer, described_alike, layer_spec, stored
from .geometry import ModelGeometry
from .rope import POSITION_MODES
from .schedules.schedule import Schedule

# what states that do not mention it were made with
_NEUTRAL = {"blocks": 1, "restart_frames": 0, "overlap_frames": 0, "cache_dtype": "model"}


@dataclass(frozen=True)
class RolloutSpec:
    """Everything that has to match for a rollout to go on; knows its cache's bytes before anything is allocated.

    `height` and `width` are in latent pixels; `model` identifies the weights; `layers` overrides the plan of single
    layers (default: the same for all); `absorption` lets some forget their history later on. `blocks` chunks are denoised
    together (Rolling Forcing); every `restart_frames` latent frames the video starts afresh over its last
    `overlap_frames` (CausVid; 0: never). `cache_dtype` is how anchor and window are stored, `cache_device` where; only the
    latter may change from run to run.
    """

    geometry: ModelGeometry
    batch: int
    height: int
    width: int
    chunk_frames: int
    window_frames: int
    anchor: Anchor
    positions: str
    dtype: torch.dtype
    model: str = ""
    layers: tuple[LayerSpec, ...] | None = None
    absorption: AbsorptionSettings | None = None
    blocks: int = 1
    restart_frames: int = 0
    overlap_frames: int = 0
    cache_dtype: str = "model"
    cache_device: str = "gpu"

    def __post_init__(self) -> None:
        checks = {
            "batch": (self.batch, 1),
            "chunk_frames": (self.chunk_frames, 1),
            "window_frames": (self.window_frames, 0),
            "height": (self.height, 1),
            "width": (self.width, 1),
            "blocks": (self.blocks, 1),
        }
        for name, (value, least) in checks.items():
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.height % self.geometry.patch or self.width % self.geometry.patch:
            raise ValueError(
                f"the latent is {self.width}x{self.height}; both sides must be multiples of {self.geometry.patch}"
            )
        known = {"positions": POSITION_MODES, "cache_dtype": CACHE_DTYPES, "cache_device": CACHE_DEVICES}
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(options)}")
        if self.positions == "absolute" and self.anchor.relative_only:
            raise ValueError(
                f"positions is 'absolute' with the {self.anchor.kind} anchor, whose slots stand for no single frame; "
                "choose 'packed' or 'fixed'"
            )
        self._check_schedule()
        self.anchor.check(self)

    def _check_schedule(self) -> None:
        """What several blocks at once and restarts ask for."""
        if self.blocks > 1 and self.anchor.state_frames:
            raise ValueError(
                f"{self.blocks} chunks denoised together have no single hidden state; use another anchor than the adaptive one"
            )
        if self.blocks > 1 and self.absorption is not None:
            raise ValueError(
                f"absorption does not go with {self.blocks} chunks denoised together; remove one of the two"
            )
        if self.restart_frames:
            if not 0 < self.overlap_frames < self.restart_frames:
                raise ValueError(
                    f"overlap_frames is {self.overlap_frames}; it must be above 0 and below restart_frames, {self.restart_frames}"
                )
            if self.positions == "absolute":
                raise ValueError("restarts count time from 0 again, so positions must be packed or fixed, not absolute")

    def clip(self, frame: int) -> int:
        """Which clip a frame belongs to: 0, and one more after every restart."""
        if not self.restart_frames or frame < self.restart_frames:
            return 0
        return 1 + (frame - self.restart_frames) // (self.restart_frames - self.overlap_frames)

    @property
    def recent_frames(self) -> int:
        """Newest latents that a rollout holds on to, to commit them again under another prompt or after a restart."""
        return max(self.anchor.frames + self.window_frames + self.chunk_frames, self.overlap_frames)

    @property
    def tokens(self) -> int:
        """Tokens a latent frame."""
        return (self.height // self.geometry.patch) * (self.width // self.geometry.patch)

    def plan(self, text_tokens: int = 0, vae_bytes: int = 0) -> CachePlan:
        """The cache plan; its `bytes()` is what a run will use."""
        layer = layer_spec(self.anchor, self.window_frames, self.chunk_frames, self.positions)
        plan = CachePlan(
            batch=self.batch,
            tokens=self.tokens,
            width=self.geometry.heads * self.geometry.head_dim,
            state_frames=self.anchor.state_frames,
            chunk_frames=self.chunk_frames * self.blocks,
            dtype=self.dtype,
            layers=self.layers or (layer,) * self.geometry.layers,
            text_tokens=text_tokens,
            vae_bytes=vae_bytes,
            heads=self.geometry.heads,
            cache_dtype=self.cache_dtype,
            cache_device=self.cache_device,
        )
        if plan.expands:  # what is stored is raw itself
            plan = replace(plan, layers=tuple(stored(one) for one in plan.layers))
        if self.absorption is None:
            return plan
        return replace(plan, absorption_bytes=absorption_bytes(self.absorption, plan, self.geometry.heads))

    def describe(self) -> dict[str, Any]:
        """What has to match, by name, JSON-able."""
        return {
            "model": self.model,
            "geometry": self.geometry.describe(),
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "chunk_frames": self.chunk_frames,
            "window_frames": self.window_frames,
            "anchor": self.anchor.describe(),
            "positions": self.positions,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": None if self.layers is None else [describe_layer(layer) for layer in self.layers],
            "absorption": None if self.absorption is None else self.absorption.describe(),
            "blocks": self.blocks,
            "restart_frames": self.restart_frames,
            "overlap_frames": self.overlap_frames,
            "cache_dtype": self.cache_dtype,
        }

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a state's description differs from this spec, a phrase each; empty if it can go on."""
        mine, stride = self.describe(), self.geometry.space.stride
        other = _NEUTRAL | other
        try:
            other["anchor"] = anchor_from(other["anchor"]).describe()
        except (KeyError, TypeError, ValueError):
            pass  # then it differs, and is told as it stands
        try:
            other["layers"] = other["layers"] and [described_alike(one) for one in other["layers"]]
        except (KeyError, TypeError):
            pass
        phrases = []
        for name, value in mine.items():
            theirs = other.get(name)
            if theirs == value:
                continue
            if name == "model":
                phrases.append("model is another checkpoint, or the same one loaded in another weight dtype")
            elif name in ("width", "height") and isinstance(theirs, int):
                phrases.append(f"{name} is {stride * theirs} in the state and {stride * value} here")
            else:
                phrases.append(f"{name} is {theirs} in the state and {value} here")
        return phrases


@dataclass(frozen=True)
class Settings:
    """What may change from run to run: the seed, the schedule, and whose noise generated frames start from.

    `first_noise` [B, C, T, h, w] float32 on the CPU: the content's noise at the first step, counted from the first
    generated frame; None, and frames beyond its end, mean the seed's. The state and later steps have the seed's.
    `ramp_down`: with several blocks at once, none enters that begins beyond the length asked for, as in Rolling Forcing's
    own loop. Without it a shorter video is an exact prefix of a longer one.
    """

    seed: int
    schedule: Schedule
    ramp_down: bool = False
    first_noise: torch.Tensor | None = field(default=None, compare=False, repr=False)
