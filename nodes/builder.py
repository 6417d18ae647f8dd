"""One way from what is asked for to a rollout's spec, plan, checks and warnings, whichever node asks.

Rollout, Sampler, Plan, Inspect and Attention Share ask here, so that none of them can forget a field: what a checkpoint or a
preset wishes reaches all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adastate_core.absorption.settings import AbsorptionSettings
from ..adastate_core.anchors import Anchor
from ..adastate_core.cache.byte_plan import CachePlan
from ..adastate_core.families.family import Family
from ..adastate_core.families.wan21 import WAN21_TEXT
from ..adastate_core.geometry import LatentSpace, ModelGeometry
from ..adastate_core.rollout import RolloutSpec, RolloutState
from ..adastate_core.schedules.schedule import Schedule
from .absorption_nodes import AbsorptionRequest
from .anchor_nodes import anchor_at
from .defaults import Resolved, resolve
from .host import model as host_model
from .host.checkpoint_wishes import rollout_defaults
from .stream_settings import StreamSettings


@dataclass(frozen=True, kw_only=True)
class Request:
    """A rollout as the node's inputs ask for it."""

    model: Any = field(repr=False)
    positive: Any = field(repr=False)
    width: int
    height: int
    length: int
    batch_size: int = 1
    seed: int = 0
    steps: int = 0
    shift: float = 0.0
    chunk_frames: int = 0
    window_frames: int = -1
    positions: str = "auto"
    anchor: Anchor | None = None
    sigmas: Sequence[float] | None = None
    start_latent: dict[str, Any] | None = field(default=None, repr=False)
    resume: RolloutState | None = None
    stream: StreamSettings | None = None
    keep_latents: bool = True
    absorption: AbsorptionRequest | None = None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    max_seconds: float = 0.0

    @property
    def fps(self) -> float:
        """The stream's rate; without one that of the latent space."""
        return self.stream.fps if self.stream else host_model.space_of(self.model).fps

    def asked(self, space: LatentSpace) -> Asked:
        """Its numbers, in latent frames and pixels of the model's space."""
        return Asked(
            batch=self.batch_size,
            height=self.height // space.stride,
            width=self.width // space.stride,
            fps=self.fps,
            absorption=self.absorption.settings if self.absorption else None,
            resumed=self.resume and self.resume.spec,
            **{name: getattr(self, name) for name in _SHARED},
        )


# what a Request and an Asked have under one name
_SHARED = (
    "steps", "shift", "chunk_frames", "window_frames", "positions", "anchor", "sigmas", "cache_dtype", "cache_device",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The numbers of a rollout, whoever asks. 0 steps, shift and chunk frames, -1 window frames, "auto" positions and no anchor
    leave them to the checkpoint, its preset or the fallback. `height` and `width` are in latent pixels;
    `resumed` is the spec of the state that is gone on from."""

    batch: int = 1
    height: int
    width: int
    steps: int = 0
    shift: float = 0.0
    chunk_frames: int = 0
    window_frames: int = -1
    positions: str = "auto"
    anchor: Anchor | None = None
    sigmas: Sequence[float] | torch.Tensor | None = None
    absorption: AbsorptionSettings | None = None
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    fps: float
    resumed: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is rolled out: a model's geometry and compute dtype, what its file wishes, and which weights they are."""

    geometry: ModelGeometry
    dtype: torch.dtype
    wishes: dict[str, Any] | None
    family: Family = WAN21_TEXT
    fingerprint: str = ""

    @staticmethod
    def of(patcher: Any, identified: bool = True) -> Subject:
        """A MODEL of the host. `identified`: for a state to name the weights."""
        return Subject(
            geometry=host_model.geometry_of(patcher),
            dtype=host_model.compute_dtype(patcher),
            wishes=rollout_defaults(patcher),
            family=host_model.family_of_model(patcher),
            fingerprint=host_model.fingerprint(patcher) if identified else "",
        )


@dataclass(frozen=True)
class Built:
    """A rollout with nothing left open. `told` is what may surprise about its anchor, a sentence each; `sigmas_warnings` what may
    about the noise levels that were given."""

    resolved: Resolved
    schedule: Schedule
    spec: RolloutSpec
    told: list[str]
    sigmas_warnings: list[str]

    def plan(self, text_tokens: int, vae_bytes: int = 0) -> CachePlan:
        """Its bytes, with a prompt of so many tokens and a decoder's own cache."""
        return self.spec.plan(text_tokens, vae_bytes)


def build(subject: Subject, asked: Asked) -> Built:
    """What is asked for, of a model. ValueError, in a sentence, where it does not go together."""
    anchor, told = anchor_at(asked.anchor, asked.fps, asked.resumed)
    numbers = {
        "steps": asked.steps or None,
        "shift": asked.shift or None,
        "chunk_frames": asked.chunk_frames or None,
        "window_frames": None if asked.window_frames < 0 else asked.window_frames,
        "positions": None if asked.positions == "auto" else asked.positions,
    }
    resolved = resolve(subject.wishes, numbers, anchor)
    given = asked.sigmas is not None
    schedule = resolved.given_schedule(asked.sigmas) if given else resolved.schedule
    if subject.family.samplers and schedule.sampler not in subject.family.samplers:
        raise ValueError(
            f"the sampler is {schedule.sampler}, and {subject.family.name} takes {', '.join(subject.family.samplers)}; choose "
            "another preset in Model Preset"
        )
    spec = RolloutSpec(
        geometry=subject.geometry,
        batch=asked.batch,
        height=asked.height,
        width=asked.width,
        chunk_frames=resolved.numbers["chunk_frames"],
        window_frames=resolved.numbers["window_frames"],
        anchor=resolved.anchor,
        positions=resolved.numbers["positions"],
        dtype=subject.dtype,
        model=subject.fingerprint,
        absorption=asked.absorption,
        cache_dtype=asked.cache_dtype,
        cache_device=asked.cache_device,
        **resolved.spec_options(len(schedule.sigmas)),
    )
    sigmas_warnings = resolved.sigmas_warnings(schedule) if given else []
    return Built(resolved, schedule, spec, told, sigmas_warnings)
