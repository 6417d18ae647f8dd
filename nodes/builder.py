"""One way from what is asked for to a rollout's spec, plan, checks and warnings, whichever node asks.

Rollout, Sampler, Plan, Inspect and Attention Share ask here, so that none of them can forget a field: what a checkpoint or a
preset wishes reaches all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..adastate_core.absorption.settings import AbsorptionSettings, as_in_state
from ..adastate_core.absorption.solve import Solution
from ..adastate_core.anchors import Anchor
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.cache.byte_plan import CachePlan
from ..adastate_core.families.family import Family
from ..adastate_core.families.wan21 import WAN21_TEXT
from ..adastate_core.geometry import LatentSpace, ModelGeometry
from ..adastate_core.given import BEFORE, INSIDE
from ..adastate_core.history import CLEAN
from ..adastate_core.reference import ReferenceRule
from ..adastate_core.rollout import RolloutSpec, RolloutState
from ..adastate_core.schedules.schedule import Schedule
from .absorption_advice import beforehand
from .absorption_request import AbsorptionRequest
from .anchor_nodes import anchor_at
from .defaults import Resolved, as_before, cached_instead, model_fps, resolve
from .driven import rate_of
from .host import model as host_model
from .host.checkpoint_wishes import rollout_defaults
from .inputs import require_multiples
from .stream_settings import StreamSettings

# the words of start_mode for where given latents stand; "auto" is what the model's preset says
START_MODES = {"auto": "auto", BEFORE: "before the first chunk", INSIDE: "inside the first chunk"}
ON_DEMAND = frozenset(("LATENT", "STATE"))  # large, and made only where they are linked; VIDEO is no more than a path


@dataclass(frozen=True, kw_only=True)
class Request:
    """A rollout as the node's inputs ask for it; `linked` are those of the outputs ON_DEMAND that somebody takes."""

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
    start: str = "auto"  # where these stand: one of START_MODES
    resume: RolloutState | None = None
    stream: StreamSettings | None = None
    keep_latents: bool = True
    absorption: AbsorptionRequest | None = None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    max_seconds: float = 0.0
    linked: frozenset[str] = ON_DEMAND
    ends_open: bool = False  # as a run without an end does, of which this makes a part
    audio: AudioTrack | None = None
    reference: Any = field(default=None, repr=False)  # a picture's IMAGE, or its LATENT

    @property
    def endless(self) -> bool:
        """Whether it rolls until it is stopped."""
        return self.length == 0

    def sized(self, space: LatentSpace) -> Request:
        """The same with the size of what it starts from where a side is 0. ValueError where there is none to take it from, and for
        a size that models of `space` do not take."""
        width, height = size_of_start(self.width, self.height, space, self.start_latent, self.resume)
        require_multiples(space, width, height)
        return replace(self, width=width, height=height)

    def at_rate(self, fps: float) -> Request:
        """The same with a stream of so many frames a second, if it has one."""
        return self if self.stream is None else replace(self, stream=replace(self.stream, fps=fps))

    def asked(self, space: LatentSpace) -> Asked:
        """Its numbers, in latent frames and pixels of the model's space."""
        return Asked(
            batch=self.batch_size,
            height=self.height // space.stride,
            width=self.width // space.stride,
            fps=rate_of(self.audio, self.stream.fps if self.stream else 0.0),
            absorption=self.absorption.asked if self.absorption else None,
            resumed=self.resume and self.resume.spec,
            ends_open=self.endless or self.ends_open,
            **{name: getattr(self, name) for name in _SHARED},
        )


def size_of_start(
    width: int,
    height: int,
    space: LatentSpace,
    start_latent: dict[str, Any] | None = None,
    resume: RolloutState | None = None,
) -> tuple[int, int]:
    """(width, height) in pixels; a side of 0 is that of the state that is gone on from, or else of `start_latent`."""
    if width and height:
        return width, height
    if resume is not None:
        found = (resume.spec["width"] * space.stride, resume.spec["height"] * space.stride)
    elif start_latent is not None:
        found = tuple(space.stride * int(side) for side in start_latent["samples"].shape[:-3:-1])
    else:
        name = "height" if width else "width"
        raise ValueError(
            f"{name} is 0, which stands for that of the picture in start_latent, and nothing is connected there: connect a picture "
            f"through Continue Video, or give {name}"
        )
    if resume is None and (len(found) < 2 or any(side % space.multiple for side in found)):
        raise ValueError(
            f"start_latent is {'x'.join(map(str, found))}, and the sides of a video are multiples of {space.multiple}: encode the "
            "picture with Continue Video, which brings it to such a size"
        )
    return width or found[0], height or found[1]


# what a Request and an Asked have under one name
_SHARED = (
    "steps", "shift", "chunk_frames", "window_frames", "positions", "anchor", "sigmas", "cache_dtype", "cache_device",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The numbers of a rollout, whoever asks. 0 steps, shift and chunk frames, -1 window frames, "auto" positions and no anchor
    leave them to the checkpoint, its preset or the fallback. `height` and `width` are in latent pixels; `fps` is the stream's, 0
    for the model's own; `resumed` is the spec of the state that is gone on from. `ends_open`: nobody knows where the video ends."""

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
    fps: float = 0.0
    resumed: dict[str, Any] | None = None
    ends_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is rolled out: a model's geometry and compute dtype, what its file wishes, and which weights they are."""

    geometry: ModelGeometry
    dtype: torch.dtype
    wishes: dict[str, Any] | None
    family: Family = WAN21_TEXT
    fingerprint: str = ""

    @property
    def fps(self) -> float:
        """Frames a second that it makes."""
        return model_fps(self.wishes, self.family.space)

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
    """A rollout with nothing left open. `told` is what may surprise about it, a sentence each; `sigmas_warnings` what may about the
    noise levels that were given. `fps`: the video's frames a second, with which all that is said in seconds is counted."""

    resolved: Resolved
    schedule: Schedule
    spec: RolloutSpec
    told: list[str]
    sigmas_warnings: list[str]
    fps: float

    def plan(
        self,
        text_tokens: int,
        vae_bytes: int = 0,
        length: int | None = None,
        solution: Solution | None = None,
        resumed: RolloutState | None = None,
        recaches: bool = False,
    ) -> CachePlan:
        """Its bytes, with a prompt of so many tokens and a decoder's own cache, for a video of `length` latent frames (None: of any
        length), a correction that was solved before, and the state that is gone on from. `recaches`: prompts change by recaches."""
        steps = self.schedule.noises(len(self.schedule.sigmas))
        return self.spec.plan(text_tokens, vae_bytes, length, solution, resumed, steps, recaches)

    @property
    def recache_told(self) -> list[str]:
        """What may surprise about its recaches: that they are not the preset's, a sentence."""
        preset = self.resolved.preset
        if preset is None or not preset.one_pass_recache or self.spec.recaches_at_once:
            return []
        why = f"the {self.spec.anchor.kind} anchor" if self.spec.absorption is None else "an absorption"
        return [
            f"with {why} a recache makes the window again chunk after chunk, and not in the one pass that {preset.title} makes"
        ]


_NO_LAST_CHUNKS = (
    "nobody knows which chunks are the last ones of a video of length 0, so its ending is open and not as published"
)


def _other_rate(makes: float, asked: float) -> str:
    """That a stream shows a model's motion at another pace, a sentence; empty where it does not."""
    if not asked or math.isclose(asked, makes, rel_tol=2e-3):  # 23.976 is 24
        return ""
    how = "slowed to" if asked < makes else "sped up to"
    return (
        f"the model makes {makes:g} frames a second and the stream says {asked:g}: motion is {how} {asked / makes:.2g} of its "
        "pace; set fps 0 to follow the model"
    )


def build(subject: Subject, asked: Asked) -> Built:
    """What is asked for, of a model. ValueError, in a sentence, where it does not go together."""
    fps = asked.fps or subject.fps
    anchor, told = anchor_at(asked.anchor, fps, asked.resumed)
    other_rate = _other_rate(subject.fps, asked.fps)
    told += [other_rate] if other_rate else []
    numbers = {
        "steps": asked.steps or None,
        "shift": asked.shift or None,
        "chunk_frames": asked.chunk_frames or None,
        "window_frames": None if asked.window_frames < 0 else asked.window_frames,
        "positions": None if asked.positions == "auto" else asked.positions,
    }
    numbers, before = as_before(subject.wishes, numbers, asked.resumed)
    wishes, numbers, cached = cached_instead(
        subject.wishes, numbers, anchor, asked.absorption is not None, asked.resumed
    )
    told += [cached] if cached else []
    resolved = resolve(wishes, numbers, anchor, asked.resumed)
    hears = subject.family.driven_by_sound
    if resolved.preset is not None and resolved.preset.driven_by_sound and not hears:
        raise ValueError(
            f"{resolved.preset.title} is for models that are driven by sound, and this one is of {subject.family.name}; load a Wan "
            "2.2 S2V model, or choose another preset in Model Preset"
        )
    given = asked.sigmas is not None
    schedule = resolved.given_schedule(asked.sigmas) if given else resolved.schedule
    if subject.family.samplers and schedule.sampler not in subject.family.samplers:
        raise ValueError(
            f"the sampler is {schedule.sampler}, and {subject.family.name} takes {', '.join(subject.family.samplers)}; choose "
            "another preset in Model Preset"
        )
    if resolved.preset is not None:
        resolved.preset.check_sampler(schedule.sampler)
    options = resolved.spec_options(len(schedule.sigmas))
    if before:
        options, told = options | {"shares_window": False, "ending": "open"}, [*told, before]
    elif resolved.preset is not None and resolved.preset.shares_window and not options.get("shares_window"):
        told = [*told, resolved.not_shared(options["blocks"])]
    if asked.ends_open and options.get("ending", "open") != "open":
        options, told = options | {"ending": "open"}, [*told, _NO_LAST_CHUNKS]
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
        absorption=asked.absorption and as_in_state(asked.absorption, (asked.resumed or {}).get("absorption")),
        cache_dtype=asked.cache_dtype,
        cache_device=asked.cache_device,
        reference=ReferenceRule(resolved.reference_rolls, resolved.history != CLEAN) if hears else None,
        **options,
    )
    sigmas_warnings = resolved.sigmas_warnings(schedule) if given else []
    return Built(resolved, schedule, spec, [*told, *beforehand(spec)], sigmas_warnings, fps)
