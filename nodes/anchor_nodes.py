"""Anchors: what the rollout keeps in the anchor slots of its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..adastate_core.anchors import (
    Anchor,
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
    anchor_from,
)
from ..adastate_core.geometry import WAN21
from .host import api
from .host.api import io, schema, widget
from .host.node import Node

CATEGORY = "AdaState/anchors"
_OUTPUT = "What the rollout looks back to beyond its window. Connect it to AdaState Rollout."
# what packs before counted with, whatever the video's rate, and what is counted with until that is known
FPS = WAN21.fps
LONGEST_SECONDS = 86400.0


def _sink_frames(systems: str) -> io.Input:
    return widget(
        io.Int,
        "sink_frames",
        default=3,
        min=1,
        max=64,
        tooltip=f"How many of the first latent frames are kept (1 latent frame = 4 video frames). {systems}",
    )


def _share(name: str, default: float, tooltip: str, **options: Any) -> io.Input:
    """A number between 0 and 1."""
    return widget(
        io.Float,
        name,
        **({"default": default, "min": 0.0, "max": 1.0, "step": 0.001, "round": 0.0001, "tooltip": tooltip} | options),
    )


def _seconds(name: str, tooltip: str) -> io.Input:
    """A time that becomes latent frames; 0 is never."""
    return widget(
        io.Float,
        name,
        default=0.0,
        min=0.0,
        max=LONGEST_SECONDS,
        step=0.25,
        round=0.001,
        optional=True,
        advanced=True,
        tooltip=f"{tooltip} Seconds of video at the stream's fps, the model's without a stream; 0 = never.",
    )


def latent_frames(seconds: float, fps: float = FPS) -> int:
    """The latent frame, of 4 pictures, at `seconds` of video, at least 1; 0 for 0. ValueError for what is no time."""
    if not 0 <= seconds <= LONGEST_SECONDS:
        raise ValueError(f"seconds is {seconds:g}; it must be between 0 (never) and {LONGEST_SECONDS:g}")
    return max(1, round(seconds * fps / 4)) if seconds else 0


@dataclass(frozen=True)
class TimedAdaptive(AnchorAdaptive):
    """An adaptive anchor that was given seconds: until the video's frames a second are known it counts 16."""

    freeze_seconds: float = 0.0
    reset_seconds: float = 0.0

    def at_rate(self, fps: float) -> AnchorAdaptive:
        frames = latent_frames(self.freeze_seconds, fps), latent_frames(self.reset_seconds, fps)
        return AnchorAdaptive(self.state_frames, self.state_after_past, self.strength, *frames)

    def describe(self) -> dict[str, Any]:
        return self.at_rate(FPS).describe()


def anchor_at(asked: Anchor | None, fps: float, resumed: dict[str, Any] | None) -> tuple[Anchor | None, list[str]]:
    """(the anchor asked for in a video of `fps` frames a second, what is to be told of it).

    `resumed` is the spec of a state to go on from: one of before may count its anchor's seconds at 16 fps, and goes on so.
    """
    if asked is None:
        return None, []
    anchor, before = asked.at_rate(fps), asked.at_rate(FPS)
    if resumed is None or anchor == before:
        return anchor, []
    try:
        kept = anchor_from(resumed["anchor"])
    except (KeyError, TypeError, ValueError):
        return anchor, []
    if kept != before:
        return anchor, []
    return before, [
        f"the state counts its anchor's seconds at {FPS:g} fps, not at this video's {fps:g}, and goes on so"
    ]


class AnchorNoneNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorNone",
            display_name="Anchor: None",
            category=CATEGORY,
            description="No anchor: what leaves the window is forgotten (Self-Forcing's rolling cache).",
            search_aliases=["sliding window", "rolling cache"],
            inputs=[],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(Anchor())


class AnchorStaticNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorStatic",
            display_name="Anchor: Static",
            category=CATEGORY,
            description="The first frames stay in the cache for good (attention sink, as in LongLive, arXiv 2509.22622, and "
            "Infinity-RoPE, arXiv 2511.20649). Steady, but scenes tend to freeze on them.",
            search_aliases=["sink", "attention sink", "LongLive", "Infinity-RoPE"],
            inputs=[_sink_frames("LongLive, arXiv 2509.22622, keeps 3; Infinity-RoPE, arXiv 2511.20649, keeps 1.")],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(cls, sink_frames: int | None = None) -> str | None:
        return _reason(lambda: AnchorStatic(sink_frames))

    @classmethod
    def execute(cls, sink_frames: int) -> io.NodeOutput:
        return io.NodeOutput(AnchorStatic(sink_frames))


class AnchorEMANode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorEMA",
            display_name="Anchor: EMA",
            category=CATEGORY,
            description="A sink into which frames that leave the window are blended, a little each (Reward Forcing, arXiv "
            "2512.04678).",
            search_aliases=["sink", "moving average", "Reward Forcing"],
            inputs=[
                _sink_frames("Reward Forcing, arXiv 2512.04678, keeps 3."),
                _share(
                    "decay",
                    0.999,
                    "How much of the sink stays when a frame is blended in: 1 never changes, 0 replaces; Reward Forcing has 0.999.",
                ),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(cls, sink_frames: int | None = None, decay: float | None = None) -> str | None:
        return _reason(lambda: AnchorEMA(sink_frames, decay))

    @classmethod
    def execute(cls, sink_frames: int, decay: float) -> io.NodeOutput:
        return io.NodeOutput(AnchorEMA(sink_frames, decay))


class AnchorMemoryNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorMemory",
            display_name="Anchor: Memory Frames",
            category=CATEGORY,
            description="The first frames and two memories of what left the window, a slow and a quick one (MemRoPE, Kim et "
            "al. 2026).",
            search_aliases=["sink", "MemRoPE", "memory"],
            inputs=[
                _sink_frames("MemRoPE, Kim et al. 2026, keeps 3, and two memory frames beside them."),
                _share(
                    "long_rate",
                    0.01,
                    "How far the long memory moves towards the mean of the frames that leave with a chunk: 0 never, 1 all the way.",
                    optional=True,
                ),
                _share("short_rate", 0.1, "The same for the short memory, which forgets sooner.", optional=True),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(
        cls, sink_frames: int | None = None, long_rate: float | None = 0.01, short_rate: float | None = 0.1
    ) -> str | None:
        return _reason(lambda: AnchorMemory(sink_frames, long_rate, short_rate))

    @classmethod
    def execute(cls, sink_frames: int, long_rate: float = 0.01, short_rate: float = 0.1) -> io.NodeOutput:
        return io.NodeOutput(AnchorMemory(sink_frames, long_rate, short_rate))


class AnchorReplayNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorReplay",
            display_name="Anchor: Rolling Replay",
            category=CATEGORY,
            description="The first frames are kept and put into the window again, a chunk at a time, to and fro (Rolling Sink, "
            "arXiv 2602.07775).",
            search_aliases=["sink", "Rolling Sink", "replay"],
            inputs=[
                widget(
                    io.Int,
                    "first_frames",
                    default=21,
                    min=1,
                    max=256,
                    tooltip="How many of the first latent frames are kept to be played again; Rolling Sink, arXiv 2602.07775, "
                    "keeps the 21 that the models were trained on. It starts when the window and these are full.",
                ),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(cls, first_frames: int | None = None) -> str | None:
        return _reason(lambda: AnchorReplay(first_frames))

    @classmethod
    def execute(cls, first_frames: int) -> io.NodeOutput:
        return io.NodeOutput(AnchorReplay(first_frames))


class AnchorAdaptiveNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorAdaptive",
            display_name="Anchor: Adaptive State",
            category=CATEGORY,
            description="A hidden latent state, denoised with every chunk and never shown, is what the video looks back "
            "to (AdaState, arXiv 2605.30349). Needs weights trained for it; on others it acts like one more frame.",
            search_aliases=["AdaState", "hidden state", "recurrence"],
            inputs=[
                widget(
                    io.Int,
                    "state_frames",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Latent frames of hidden state; the paper's page has 1.",
                ),
                widget(
                    io.Boolean,
                    "state_after_past",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Where the state stands in time while it is denoised: off, at its slot in front of the window; "
                    "on, between the past and the new frames. Weights want what they were trained with.",
                ),
                _share(
                    "strength",
                    1.0,
                    "How far the slot moves to each chunk's new state: 1 replaces it, as on the paper's page; less keeps some.",
                    min=0.01,
                    step=0.01,
                    optional=True,
                    advanced=True,
                ),
                _seconds("freeze_seconds", "From here on the state stays as it is, like a sink."),
                _seconds("reset_seconds", "How often the state is forgotten, so that the next chunk begins one."),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(cls, state_frames: int | None = None, strength: float | None = 1.0) -> str | None:
        return _reason(lambda: AnchorAdaptive(state_frames, strength=strength))

    @classmethod
    def execute(
        cls,
        state_frames: int,
        state_after_past: bool = False,
        strength: float = 1.0,
        freeze_seconds: float = 0.0,
        reset_seconds: float = 0.0,
    ) -> io.NodeOutput:
        if not (freeze_seconds or reset_seconds):
            return io.NodeOutput(AnchorAdaptive(state_frames, state_after_past, strength))
        freeze, reset = latent_frames(freeze_seconds), latent_frames(reset_seconds)
        timed = TimedAdaptive(state_frames, state_after_past, strength, freeze, reset, freeze_seconds, reset_seconds)
        return io.NodeOutput(timed)


class AnchorDeepNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorDeep",
            display_name="Anchor: Deep Sink",
            category=CATEGORY,
            description="A sink of half the window, and of the frames between it and the newest only the tokens that those "
            "attend to most (Deep Forcing, arXiv 2512.05081). Needs no training; made for Self-Forcing weights with "
            "window_frames at 8.",
            search_aliases=["Deep Forcing", "sink", "compression", "token pruning"],
            inputs=[
                widget(
                    io.Int,
                    "sink_frames",
                    default=10,
                    min=1,
                    max=64,
                    tooltip="How many of the first latent frames are kept for good; the paper uses 10 (10 to 15 did well).",
                ),
                widget(
                    io.Int,
                    "recent_frames",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Newest latent frames that are kept whole and say which tokens matter; counts the chunk being made.",
                ),
                widget(
                    io.Int,
                    "budget_frames",
                    default=16,
                    min=2,
                    max=192,
                    tooltip="What a chunk looks at after a cut, in latent frames: sink, recent frames (the chunk is among them) "
                    "and chosen tokens worth the rest.",
                ),
                widget(
                    io.Boolean,
                    "shift_selected",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Whose rule it is. On, the paper's: chosen tokens stand between sink and recent frames. Off, the "
                    "authors' code's: they stay where they were in the video, a token is chosen at most 7 times, and the sink "
                    "stands a chunk further back.",
                ),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def check(
        cls, sink_frames: int | None = None, recent_frames: int | None = None, budget_frames: int | None = None
    ) -> str | None:
        return _reason(lambda: AnchorDeep(sink_frames, recent_frames, budget_frames))

    @classmethod
    def execute(
        cls, sink_frames: int, recent_frames: int, budget_frames: int, shift_selected: bool = True
    ) -> io.NodeOutput:
        return io.NodeOutput(AnchorDeep(sink_frames, recent_frames, budget_frames, shift_selected))


def _reason(build: Callable[[], object]) -> str | None:
    """The sentence with which building the policy fails, or None. Linked inputs arrive as None and pass."""
    try:
        build()
    except ValueError as error:
        return str(error)
    except TypeError:
        return None
    return None


NODES = [
    AnchorNoneNode,
    AnchorStaticNode,
    AnchorEMANode,
    AnchorMemoryNode,
    AnchorReplayNode,
    AnchorDeepNode,
    AnchorAdaptiveNode,
]
