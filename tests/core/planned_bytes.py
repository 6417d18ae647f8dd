"""What a rollout plans and what it takes, at a real model's shapes: every live byte of CUDA's stand-in is counted, chunk by chunk.

The model's own forward is not in it: its queries, keys and values, its attention kernel and its output are the host's, and a line
of its own in what is asked for before loading. All else that lives on the device is the pack's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fake_cuda import fake_cuda
from live_bytes import LiveBytes

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.audio.driving import DrivingSound
from adastate_core.geometry import WAN22, ModelGeometry
from adastate_core.history import CLEAN, LAST_LEVEL, OWN_LEVEL
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.reference import ReferenceRule
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule

MODELS = {
    "1.3B": ModelGeometry(16, 30, 12, 128),
    "14B": ModelGeometry(16, 40, 40, 128),
    "5B": ModelGeometry(48, 30, 24, 128, space=WAN22),
    "S2V": ModelGeometry(16, 40, 40, 128),
}
SIZES = {"5B": (44, 80), "S2V": (48, 88)}  # of a latent, where it is not 60x104
TEXT = 512
# so many chunks at the end are denoised; those before are given, which fills a window with one pass a chunk
GENERATED = 3
ABSORBED = AbsorptionSettings(warmup_frames=24, local_window_frames=3)
LONGLIVE_2 = {"anchor": AnchorStatic(8), "chunk_frames": 8, "window_frames": 16, "positions": "absolute", "model": "5B"}
# of S2V at 704x384: a picture's tokens beside every pass, and a window for each of four steps, or one for all
TALKS = {
    "anchor": Anchor(),
    "positions": "absolute",
    "model": "S2V",
    "reference": ReferenceRule(12, drawn=True),
    "sampler": "euler",
}
LIVEAVATAR = TALKS | {"window_frames": 9, "history": OWN_LEVEL, "windows": 4}
# what differs from F = 3, W = 3, packed positions at 832x480 (of the 5B: 1280x704), and how many chunks are made
CASES: dict[str, dict[str, Any]] = {
    "adaptive": {"anchor": AnchorAdaptive(1), "chunks": 5},
    "none": {"anchor": Anchor(), "chunks": 5},
    "unipc": {"anchor": Anchor(), "chunks": 5, "sampler": "unipc"},
    "ema": {"anchor": AnchorEMA(3), "window_frames": 6, "chunks": 7},
    "int8": {"anchor": AnchorAdaptive(1), "window_frames": 18, "cache_dtype": "int8", "chunks": 8},
    "host memory": {"anchor": AnchorEMA(2), "window_frames": 9, "cache_device": "host memory", "chunks": 7},
    "packed 18": {"anchor": AnchorStatic(3), "window_frames": 18, "chunks": 10},
    "rolling": {"anchor": AnchorStatic(3), "window_frames": 18, "blocks": 5, "chunks": 8},
    "rolling forcing": {
        "anchor": AnchorStatic(3),
        "window_frames": 18,
        "blocks": 5,
        "shares_window": True,
        "ending": "as published",
        "chunks": 12,
    },
    "absorption 24": {"anchor": AnchorStatic(1), "window_frames": 24, "absorption": ABSORBED, "chunks": 12},
    "absorption 120": {"anchor": AnchorStatic(1), "window_frames": 120, "absorption": ABSORBED, "chunks": 43},
    "recache": {"anchor": AnchorAdaptive(1), "window_frames": 18, "chunks": 9, "recache": 8},
    "longlive, recache": {
        "anchor": AnchorStatic(3),
        "window_frames": 6,
        "one_pass_recache": True,
        "chunks": 6,
        "recache": 4,
    },
    "longlive, late recache, int8": {
        "anchor": AnchorStatic(3),
        "window_frames": 6,
        "one_pass_recache": True,
        "cache_dtype": "int8",
        "chunks": 8,
        "recache": 6,
    },
    "longlive 2": LONGLIVE_2 | {"chunks": 5},
    "longlive 2, fp8": LONGLIVE_2 | {"cache_dtype": "fp8", "chunks": 5},
    "liveavatar": LIVEAVATAR | {"chunks": 6},
    "liveavatar, one window": LIVEAVATAR | {"history": LAST_LEVEL, "windows": 1, "chunks": 6},
    "liveavatar, int8": LIVEAVATAR | {"cache_dtype": "int8", "chunks": 6},
    "liveavatar, host memory": LIVEAVATAR | {"cache_device": "host memory", "chunks": 6},
    "speaks, window 18": TALKS | {"window_frames": 18, "sampler": "renoising", "chunks": 9},
    "speaks, absorption": TALKS
    | {"anchor": AnchorStatic(1), "window_frames": 24, "absorption": ABSORBED, "sampler": "renoising", "chunks": 12},
}


class Shapes:
    """A model that is shapes alone: every layer attends with queries, keys and values of its own, which are the host's."""

    def __init__(self, geometry: ModelGeometry, device: torch.device, dtype: torch.dtype, live: LiveBytes) -> None:
        self.geometry, self.device, self.dtype, self.live = geometry, device, dtype, live
        self.context: torch.Tensor | None = None

    def set_context(self, context: torch.Tensor) -> None:
        self.context = context

    def kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        with self.live.aside():
            return torch.empty_like(q)

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: Any) -> torch.Tensor:
        width = self.geometry.heads * self.geometry.head_dim
        batch, _, frames, height, wide = x.shape
        tokens = frames * (height // self.geometry.patch) * (wide // self.geometry.patch)
        with self.live.aside():  # every layer has its own, but never two at once
            q, k, v = (torch.empty((batch, tokens, width), dtype=self.dtype, device=self.device) for _ in range(3))
        for layer in range(self.geometry.layers):
            attention.attend(layer, q, k, v)
            attention.text(layer, id(self.context), self._text(batch, width))
        return torch.empty_like(x)

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        """What the model keeps of a sound is its own."""

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: Any) -> None:
        width = self.geometry.heads * self.geometry.head_dim
        frame = picture.shape[3] // self.geometry.patch * (picture.shape[4] // self.geometry.patch)
        with self.live.aside():
            q, k, v = (
                torch.empty((len(picture), frame * 5 // 2, width), dtype=self.dtype, device=self.device)
                for _ in range(3)
            )
        for layer in range(self.geometry.layers):
            making.attend(layer, q, k, v)
            making.text(layer, id(self.context), self._text(len(picture), width))

    def _text(self, batch: int, width: int) -> Any:
        def make() -> tuple[torch.Tensor, torch.Tensor]:
            shape = (batch, TEXT, width)
            keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            return keys, values

        return make


@dataclass
class Counted:
    """Bytes: planned by name, and the most that lived on the device, in page-locked and in other host memory."""

    planned: dict[str, int]
    total: int
    locked: int
    peak: dict[str, int]
    marks: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Planned over counted."""
        return self.total / self.peak["cuda"]


def spec_of(case: str, model: str, layers: int | None = None) -> RolloutSpec:
    """A case's rollout, of all of a model's layers or of fewer."""
    given = {n: v for n, v in CASES[case].items() if n not in ("chunks", "recache", "sampler", "model")}
    numbers = {"window_frames": 3, "chunk_frames": 3, "positions": "packed"} | given
    geometry, (height, width) = MODELS[model], SIZES.get(model, (60, 104))
    if layers is not None:
        geometry = replace(geometry, layers=layers)
    return RolloutSpec(
        geometry=geometry, batch=1, height=height, width=width, dtype=torch.bfloat16, **numbers
    )  # fmt: skip


def cases_of(model: str) -> list[str]:
    """The cases that are counted at a model's shapes: those that are said to be its own, or those of nobody."""
    own = [case for case, numbers in CASES.items() if numbers.get("model") == model]
    return own or [case for case, numbers in CASES.items() if "model" not in numbers]


def settings_of(spec: RolloutSpec, sampler: str = "renoising") -> Settings:
    return Settings(7, replace(Schedule.shifted(spec.blocks if spec.blocks > 1 else 4, 5.0), sampler=sampler))


def counted(case: str, model: str, layers: int | None = None) -> Counted:
    """Plan a case, roll it out on the stand-in, take its state at the end, and count."""
    spec, chunks = spec_of(case, model, layers), CASES[case]["chunks"]
    settings = settings_of(spec, CASES[case].get("sampler", "renoising"))
    frames = spec.chunk_frames
    length = frames * chunks
    prompts, change = None, CASES[case].get("recache")
    plan = spec.plan(
        TEXT, length=length, steps=settings.schedule.noises(len(settings.schedule.sigmas)), recaches=bool(change)
    )
    with fake_cuda() as (device, _), LiveBytes() as live, torch.no_grad():
        if change:
            texts = [torch.empty(1, TEXT, 8) for _ in range(2)]
            prompts = PromptPlan(
                [PromptChange(0, texts[0]), PromptChange(frames * change, texts[1], "recache")], frames
            )
        shapes = Shapes(spec.geometry, device, spec.dtype, live)
        picture = (
            torch.empty(1, spec.geometry.channels, 1, spec.height, spec.width) if spec.reference is not None else None
        )
        rollout = Rollout(shapes, spec, settings, text_tokens=TEXT, prompts=prompts, length=length, reference=picture)
        marks = {"built": live.now["cuda"]}
        given = torch.empty(1, spec.geometry.channels, length - frames * GENERATED, spec.height, spec.width)
        for chunk in rollout.chunks(length, given if spec.history == CLEAN else None):
            marks[f"chunk {chunk.index}"] = live.peak["cuda"]
        marks["end"] = live.now["cuda"]
        rollout.snapshot()
        marks["snapshot"] = live.peak["cuda"]
        return Counted(plan.bytes(), plan.total_bytes, plan.locked_bytes, dict(live.peak), marks)
