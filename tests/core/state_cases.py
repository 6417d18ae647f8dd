"""States of every anchor, storage and absorption phase, of several chunks at once, and with a decoder's cache."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from test_rollout import W_PIXELS, H, spec_for
from tiny_model import TinyModel
from tiny_talking import TinyTalking, spoken

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import (
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
)
from adastate_core.history import LAST_LEVEL, OWN_LEVEL
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.reference import ReferenceRule
from adastate_core.rollout import Rollout, RolloutSpec, RolloutState, Settings
from adastate_core.schedules.schedule import Schedule

WARM = {"warmup_frames": 12, "local_window_frames": 3, "sink_frames": 1}
WATCHED = WARM | {"monitor_layers": -1, "monitor_chunks": 2, "refresh": "always", "ratio": 1.0}


TALKS = {"height": 8, "width": 8}


def _absorbed(**settings: Any) -> dict[str, Any]:
    return {"W": 100, "absorption": AbsorptionSettings(**settings)}


# what differs from a plain rollout: of the spec, and how far it is rolled out
CASES: dict[str, dict[str, Any]] = {
    "none": {"W": 6},
    "static": {"anchor": AnchorStatic(2), "W": 3, "batch": 2},
    "static_absolute": {"anchor": AnchorStatic(1), "W": 6, "positions": "absolute"},
    "ema": {"anchor": AnchorEMA(2, 0.9), "W": 6, "dtype": torch.bfloat16},
    "memory": {"anchor": AnchorMemory(1), "W": 3},
    "replay": {"anchor": AnchorReplay(6), "W": 9},
    "adaptive": {"anchor": AnchorAdaptive(2, strength=0.5), "W": 4},
    "deep": {"anchor": AnchorDeep(2, 4, 8), "W": 6, "length": 19},
    "host_memory": {"anchor": AnchorEMA(2, 0.9), "W": 6, "cache_device": "host memory"},
    "fp8": {"anchor": AnchorStatic(2), "W": 6, "cache_dtype": "fp8"},
    "int8": {"anchor": AnchorAdaptive(1, strength=0.5), "cache_dtype": "int8", "cache_device": "host memory"},
    "rolling": {"blocks": 3, "W": 6, "length": 7},
    "warming": _absorbed(**WARM) | {"length": 9},
    "switched": _absorbed(**WARM) | {"length": 16},
    "lowrank": _absorbed(**WARM, scope="lowrank", rank=2) | {"anchor": AnchorAdaptive(1), "length": 16},
    "watched": _absorbed(**WATCHED) | {"length": 24},
    "nothing_absorbed": _absorbed(**(WARM | {"warmup_frames": 3})) | {"length": 9},
    "given": {"W": 6, "given": 8, "stop": 2},
    "inside": {"W": 6, "given": 2, "stop": 1, "start": "inside"},
    "full_vae": {"stream": "full"},
    "tiny_vae": {"stream": "tiny"},
    "remade": {"remade": "newest", "length": 9, "stream": "pictures"},
    "speaks": TALKS | {"W": 6, "reference": ReferenceRule()},
    "own_level": TALKS
    | {"W": 6, "reference": ReferenceRule(6, drawn=True), "history": OWN_LEVEL, "windows": 2, "cache_dtype": "int8"},
    "last_level": TALKS | {"W": 3, "reference": ReferenceRule(12, drawn=True), "history": LAST_LEVEL, "batch": 2},
    "shots": {"anchor": AnchorStatic(2), "W": 6, "positions": "absolute", "length": 16, "shots": (3, 9)},
}


# what is said of a spec once it is there
_LATE = (
    "absorption",
    "cache_dtype",
    "cache_device",
    "blocks",
    "remade",
    "height",
    "width",
    "reference",
    "history",
    "windows",
)


@cache
def made(name: str) -> tuple[RolloutSpec, RolloutState]:
    """A case's spec, and its state after a cut within a chunk."""
    one = dict(CASES[name])
    length, stream = one.pop("length", 10), one.pop("stream", "")
    late = {key: one.pop(key) for key in _LATE if key in one}
    given, stop, start = one.pop("given", 0), one.pop("stop", 0), one.pop("start", "before")
    shots = one.pop("shots", ())
    spec = replace(spec_for(TinyModel(), **one), **late)
    rollout = go_on(spec)
    if shots:
        words = torch.zeros(1, 1, TinyModel.TEXT_WIDTH)
        changes = [PromptChange(0, words), *(PromptChange(frame, words, "shot") for frame in shots)]
        rollout.steer(PromptPlan(changes, spec.chunk_frames))
    if not given:
        list(rollout.chunks(length))
        return spec, rollout.snapshot(carried(stream, length))
    rollout.on_step, passes = lambda *_: passes.append(1) or len(passes) <= stop or _end(), []
    with contextlib.suppress(KeyboardInterrupt):
        list(rollout.chunks(length, torch.randn(1, 4, given, H, W_PIXELS), start))
    return spec, rollout.snapshot()


def _end() -> None:
    raise KeyboardInterrupt


def go_on(spec: RolloutSpec, state: RolloutState | None = None) -> Rollout:
    """A rollout of a case, from its state."""
    schedule, talks = Schedule.shifted(max(2, spec.blocks), 5.0), spec.reference is not None
    picture = None
    if talks and state is None:
        shape = (spec.batch, spec.geometry.channels, 1, spec.height, spec.width)
        picture = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    settings = Settings(7, schedule, sound=spoken() if talks else None)
    return Rollout(TinyTalking(), spec, settings, state=state, keep_latents=True, reference=picture)


def carried(kind: str, seen: int) -> dict[str, Any]:
    """What a state keeps of a stream whose decoder has seen `seen` latents, with small random tensors for its layers."""
    if not kind:
        return {}
    if kind == "pictures":
        pictures = torch.rand(1, 1, 8 * H, 8 * W_PIXELS, 3, generator=torch.Generator().manual_seed(1))
        return {"renewed_frames": [seen - 3], "renewed_pictures": pictures}
    files = {"frames_written": 4 * seen - 3, "file_frames": [4 * seen - 3], "files": ["a.mp4"], "run_id": "ab"}
    torch.manual_seed(1)
    if kind == "full":
        sizes = {0: (3, 2, 1), 2: (4, 2, 2), 3: (4, 1, 4), 4: (2, 2, 8)}
        named = {f"vae_feature_{i}": torch.randn(1, c, t, H * s, W_PIXELS * s) for i, (c, t, s) in sizes.items()}
        return files | {"vae_latents_seen": seen, "vae_markers": [1]} | named
    memories = [torch.randn(1, 3, H * s, W_PIXELS * s).half() for s in (1, 2, 4)]
    return (
        files
        | {"vae_latents_seen": seen, "vae_kind": "taehv"}
        | {f"taehv_memory_{i}": t for i, t in enumerate(memories)}
    )
