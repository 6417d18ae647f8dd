"""What is combined, and the rollout that a combination stands for."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny_model import TinyModel
from tiny_talking import spoken

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import (
    EXAMPLES,
    Anchor,
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
)
from adastate_core.history import LAST_LEVEL, OWN_LEVEL, check_recaches
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.reference import ReferenceRule
from adastate_core.rollout import RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.shot_check import check_shots

from .others import others
from .pairs import Value, pairwise

FRAMES, BLOCKS, WINDOW, LONG_WINDOW = 3, 3, 6, 24
LEVELS = "two levels"
# a recache in one pass that makes the sink again, and one after the sink has gone out of its reach
ONE_PASS, SINK_STAYS = "in one pass", "in one pass behind the sink"
# start latents stand in the chunk whose operations fail, which then is the first one
STARTING = "with frames given inside"
# a shot began three chunks before: its first chunk stays in the window, and the frames between have left
BEHIND = "behind a shot"
# driven by a sound, with a picture to look like; and so, and what its noisy passes made is the past: that of the same step or the
# last one's, while the picture is drawn about and is another from the chunk on whose operations fail
SPEAKS = "with sound and a picture"
TALKS = ("", SPEAKS, OWN_LEVEL, LAST_LEVEL)
DIMENSIONS = {
    "anchor": ("none", "static", "ema", "memory", "replay", "adaptive", "changed adaptive", "deep", *others()),
    "storage": ("model", "8 bits", "host", "int8 host"),
    "absorption": ("none or warming", "switching", "switched"),
    "transition": ("none", "cut", "recache", "flush", "rope cut", "soft", "shot", "restart"),
    "blocks": ("1", "several"),
}
ADAPTIVE = ("adaptive", "changed adaptive")
# a part of each side that a refusal has to name
WORDS = {
    "deep": ("deep anchor",),
    "8 bits": ("fp8", "int8"),
    "host": ("host memory",),
    "int8 host": ("int8", "host memory"),
    "switching": ("absorption",),
    "switched": ("absorption",),
    "several": ("chunks denoised together",),
    "adaptive": ("adaptive",),
    "changed adaptive": ("adaptive",),
    "shot": ("a shot",),
}


def refused(a: Value, b: Value) -> bool:
    """Whether a spec takes no rollout with both values."""
    pair = {a[1]: a[0], b[1]: b[0]}
    if pair.get("deep") == "anchor":
        return any(pair.get(v) == "storage" for v in DIMENSIONS["storage"][1:]) or bool(
            {"switching", "switched", "several", "shot"} & set(pair)
        )
    return "several" in pair and bool({"switching", "switched", "shot", *ADAPTIVE} & set(pair))


@dataclass(frozen=True)
class Combination:
    """One of each dimension's values; with `levels` the last noisy step keeps a past of its own beside the clean one.

    `variant` numbers what a value leaves open (which 8 bits, which adaptive anchor).
    """

    anchor: str = "none"
    storage: str = "model"
    absorption: str = "none or warming"
    transition: str = "none"
    blocks: str = "1"
    levels: str = ""
    recache: str = ""
    starting: str = ""
    behind: str = ""
    talks: str = ""

    @property
    def name(self) -> str:
        """Unique, readable, usable as a file's name."""
        values = (self.anchor, self.storage, self.absorption, self.transition, self.blocks)
        words = [f"{value} {name}" if value in ("none", "1", "several") else value
                 for name, value in zip(DIMENSIONS, values, strict=True)]  # fmt: skip
        return ", ".join(
            [*words, *(one for one in (self.levels, self.recache, self.starting, self.behind, self.talks) if one)]
        )

    @property
    def variant(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def chunk(self) -> int:
        """The generated chunk whose operations fail."""
        if self.starting:
            return 0
        return 5 if self.absorption == "switched" or self.recache == SINK_STAYS else 4

    @property
    def window(self) -> int:
        """Where layers switch in the chunk, the others' windows grow in it, but for some combinations."""
        return LONG_WINDOW if self.absorption == "switching" and self.variant % 3 else WINDOW

    def policy(self) -> Anchor:
        if self.anchor in others():
            return EXAMPLES[self.anchor][self.variant % len(EXAMPLES[self.anchor])]
        changed = ({"strength": 0.5}, {"strength": 0.5, "freeze_frame": 12}, {"strength": 0.5, "reset_frames": 7})
        return {
            "none": Anchor(),
            "static": AnchorStatic(3),
            "ema": AnchorEMA(3, 0.6),
            "memory": AnchorMemory(2),
            "replay": AnchorReplay(9),
            "adaptive": AnchorAdaptive(1 + self.variant % 2),
            "changed adaptive": AnchorAdaptive(1, **changed[self.variant % 3]),
            "deep": AnchorDeep(3, 4, 8),
        }[self.anchor]

    def absorbed(self) -> AbsorptionSettings | None:
        """Warming: it collects in the chunk. Switching: it solves and switches in its commit. Switched: it is measured and
        solved anew."""
        others = self.levels, self.recache, self.starting, self.behind, self.talks
        bare = self.anchor == "deep" or self.blocks != "1" or any(others)
        warming = not bare and self.variant % 2 == 1
        if self.absorption == "none or warming" and not warming:
            return None
        ridge = None if self.variant % 4 == 0 else 0.3  # each of seven that are tried is a solve of every layer
        common = dict(local_window_frames=2, sink_frames=1, ratio=0.5, ridge=ridge, select="residual")
        if self.absorption == "switched":
            return AbsorptionSettings(warmup_frames=12, monitor_layers=-1, monitor_chunks=2, refresh="always", **common)
        return AbsorptionSettings(
            warmup_frames=15 if self.absorption == "switching" else 30, monitor_layers=-1, monitor_chunks=2, **common
        )

    def windows(self, frames: int, may_share: bool = True) -> dict[str, Any]:
        """Several chunks at once share the window's room where they can and the variant says so."""
        anchor = self.policy()
        if self.blocks == "1" or anchor.state_frames or anchor.selects or not may_share or self.variant % 2:
            return dict(window_frames=frames)
        return dict(shares_window=True, window_frames=frames + anchor.frames)

    def spec(self, model: TinyModel) -> RolloutSpec:
        """ValueError where the values do not go together."""
        absorption, eight = self.absorbed(), ("int8", "fp8")[self.variant % 2]
        dtype, device = {
            "model": ("model", "gpu"),
            "8 bits": (eight, "gpu"),
            "host": ("model", "host memory"),
            "int8 host": ("int8", "host memory"),
        }[self.storage]
        spec = RolloutSpec(
            geometry=model.geometry, batch=1, height=self.size[0], width=self.size[1], chunk_frames=FRAMES,
            anchor=self.policy(), **self.windows(self.window, may_share=self.transition != "restart"),
            positions=self.places() or ("fixed" if self.variant % 3 == 0 and self.anchor != "deep" else "packed"),
            dtype=torch.float32,
            absorption=absorption, blocks=BLOCKS if self.blocks == "several" else 1,
            cache_dtype=dtype, cache_device=device, one_pass_recache=bool(self.recache),
            **({"restart_frames": self.chunk * FRAMES, "overlap_frames": 5} if self.transition == "restart" else {}),
            **self.talking(),
        )  # fmt: skip
        self.check_plan(spec)
        return spec

    def check_plan(self, spec: RolloutSpec) -> None:
        """ValueError if the prompt cannot change as it does."""
        prompts = self.prompts()
        check_shots(spec, prompts)
        check_recaches(spec.history, prompts is not None and prompts.recaches)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a latent; a picture's tokens are of at least 8x8."""
        return (8, 8) if self.talks in TALKS[1:] else (4, 6)

    def talking(self) -> dict[str, Any]:
        """What a spec says of its reference and its history."""
        if self.talks not in TALKS[1:]:
            return {}
        if self.talks == SPEAKS:
            return {"reference": ReferenceRule()}
        rule = ReferenceRule(self.chunk * FRAMES, drawn=True)
        return {"reference": rule, "history": self.talks, "windows": 2 if self.talks == OWN_LEVEL else 1}

    def picture(self, model: TinyModel) -> torch.Tensor | None:
        """The latent of the reference, of every item its own."""
        if self.talks not in TALKS[1:]:
            return None
        shape = (self.items, model.geometry.channels, 1, *self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def places(self) -> str:
        """Frames of shots stand at their own times where the anchor allows it; "" elsewhere."""
        return "absolute" if (self.behind or self.transition == "shot") and not self.policy().relative_only else ""

    def settings(self) -> Settings:
        schedule = Schedule.shifted(BLOCKS if self.blocks == "several" else 2, 5.0)
        if self.starting or self.behind:  # LongLive 2.0's are with a solver that remembers its last step
            schedule = replace(schedule, sampler="unipc")
        sound = spoken(alignment="host" if self.talks == SPEAKS else "chunk") if self.talks in TALKS[1:] else None
        return Settings(7, replace(schedule, kept=(1,)) if self.levels else schedule, sound=sound)

    def start_latents(self, model: TinyModel) -> torch.Tensor | None:
        """Two frames for the first chunk, or none."""
        shape = (1, model.geometry.channels, 2, *self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(3)) if self.starting else None

    def prompts(self) -> PromptPlan | None:
        """The prompt changes with the chunk whose operations fail."""
        return self.changes(self.chunk * FRAMES)

    def changes(self, start: int) -> PromptPlan | None:
        """The change with the chunk from latent frame `start` on, and a shot three chunks before where one is asked for."""
        if self.transition in ("none", "restart") and not self.behind:
            return None
        texts = [
            torch.randn(self.items, 3, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 2)
        ]
        found = [PromptChange(0, texts[0])]
        if self.behind or self.transition == "shot":
            found.append(PromptChange(start - 3 * FRAMES, texts[1], "shot"))
        if self.transition not in ("none", "restart"):
            found.append(PromptChange(start, texts[1], self.transition, 2))
        return PromptPlan(found, FRAMES)

    @property
    def items(self) -> int:
        """Items of the batch."""
        return 1


def combinations() -> list[Combination]:
    """Every allowed pair of values, in as few as a greedy choice finds, and some with a past at two noise levels."""
    pairs = [Combination(**values) for values in pairwise(DIMENSIONS, refused)]
    two = (("ema", "model", "none"), ("changed adaptive", "int8 host", "flush"), ("memory", "8 bits", "cut"),
           ("adaptive", "model", "recache"))  # fmt: skip
    whole = (("static", "model", ONE_PASS), ("static", "int8 host", ONE_PASS), ("static", "model", SINK_STAYS),
             ("none", "host", SINK_STAYS))  # fmt: skip
    inside = (("static", "model"), ("adaptive", "int8 host"))
    shots = (("static", "model", "rope cut"), ("ema", "int8 host", "recache"), ("memory", "8 bits", "flush"))
    whole_past = "none or warming"
    talking = (
        ("adaptive", "int8 host", whole_past, "recache", SPEAKS),
        ("static", "model", "switching", "none", SPEAKS),
        ("none", "model", whole_past, "soft", OWN_LEVEL),
        ("ema", "8 bits", whole_past, "shot", OWN_LEVEL),
        ("static", "host", whole_past, "flush", OWN_LEVEL),
        ("none", "8 bits", whole_past, "cut", LAST_LEVEL),
    )
    return [
        *pairs,
        *(Combination(a, storage, transition=t, levels=LEVELS) for a, storage, t in two),
        *(Combination(a, storage, transition="recache", recache=how) for a, storage, how in whole),
        *(Combination(a, storage, starting=STARTING) for a, storage in inside),
        Combination("ema", "model", levels=LEVELS, starting=STARTING),
        *(Combination(a, storage, transition=t, behind=BEHIND) for a, storage, t in shots),
        *(Combination(a, storage, phase, t, talks=how) for a, storage, phase, t, how in talking),
        Combination("static", "model", "switched", "none", behind=BEHIND),
        Combination("static", "model", transition="recache", recache=ONE_PASS, behind=BEHIND),
    ]


def refusals() -> list[tuple[Combination, tuple[str, str]]]:
    """Every pair of values that is refused, alone, and the two values."""
    values = [(name, value) for name, options in DIMENSIONS.items() for value in options]
    pairs = [(a, b) for a, b in itertools.combinations(values, 2) if a[0] != b[0] and refused(a, b)]
    return [(Combination(**dict(pair)), (pair[0][1], pair[1][1])) for pair in pairs]
