"""Anchors: what the rollout keeps in the anchor slots of its cache."""

from __future__ import annotations

from ..adastate_core.anchors import Anchor, AnchorAdaptive, AnchorDeep, AnchorEMA, AnchorStatic
from .host import api
from .host.api import io, schema, widget

CATEGORY = "AdaState/anchors"
_OUTPUT = "What the rollout looks back to beyond its window. Connect it to AdaState Rollout."


def _sink_frames() -> io.Input:
    return widget(
        io.Int,
        "sink_frames",
        default=3,
        min=1,
        max=64,
        tooltip="How many of the first latent frames are kept (1 latent frame = 4 video frames).",
    )


class AnchorNoneNode(io.ComfyNode):
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


class AnchorStaticNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorStatic",
            display_name="Anchor: Static",
            category=CATEGORY,
            description="The first frames stay in the cache for good (attention sink, as in LongLive). Steady, but "
            "scenes tend to freeze on them.",
            search_aliases=["sink", "attention sink"],
            inputs=[_sink_frames()],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def validate_inputs(cls, sink_frames: int) -> bool | str:
        return _reason(lambda: AnchorStatic(sink_frames))

    @classmethod
    def execute(cls, sink_frames: int) -> io.NodeOutput:
        return io.NodeOutput(AnchorStatic(sink_frames))


class AnchorEMANode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAnchorEMA",
            display_name="Anchor: EMA",
            category=CATEGORY,
            description="A sink into which frames that leave the window are blended, a little each (Reward-Forcing).",
            search_aliases=["sink", "moving average"],
            inputs=[
                _sink_frames(),
                widget(
                    io.Float,
                    "decay",
                    default=0.999,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="How much of the sink stays when a frame is blended in: 1 never changes, 0 replaces.",
                ),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def validate_inputs(cls, sink_frames: int, decay: float) -> bool | str:
        return _reason(lambda: AnchorEMA(sink_frames, decay))

    @classmethod
    def execute(cls, sink_frames: int, decay: float) -> io.NodeOutput:
        return io.NodeOutput(AnchorEMA(sink_frames, decay))


class AnchorAdaptiveNode(io.ComfyNode):
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
                    tooltip="Latent frames of hidden state; the paper's choice is 1.",
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
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def validate_inputs(cls, state_frames: int) -> bool | str:
        return _reason(lambda: AnchorAdaptive(state_frames))

    @classmethod
    def execute(cls, state_frames: int, state_after_past: bool = False) -> io.NodeOutput:
        return io.NodeOutput(AnchorAdaptive(state_frames, state_after_past))


class AnchorDeepNode(io.ComfyNode):
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
                    tooltip="How many of the first latent frames are kept for good; the paper has 10, and 10 to 15 did well.",
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
                    tooltip="Where chosen tokens stand in time: on, between sink and recent frames, as in the paper; off, where "
                    "they were in the video, as in the authors' published code.",
                ),
            ],
            outputs=[api.Anchor.Output("anchor", display_name="ANCHOR", tooltip=_OUTPUT)],
        )

    @classmethod
    def validate_inputs(cls, sink_frames: int, recent_frames: int, budget_frames: int) -> bool | str:
        return _reason(lambda: AnchorDeep(sink_frames, recent_frames, budget_frames))

    @classmethod
    def execute(
        cls, sink_frames: int, recent_frames: int, budget_frames: int, shift_selected: bool = True
    ) -> io.NodeOutput:
        return io.NodeOutput(AnchorDeep(sink_frames, recent_frames, budget_frames, shift_selected))


def _reason(build: object) -> bool | str:
    """True, or the sentence with which building the policy fails. Linked inputs arrive as None and pass."""
    try:
        build()
    except ValueError as error:
        return str(error)
    except TypeError:
        return True
    return True


NODES = [AnchorNoneNode, AnchorStaticNode, AnchorEMANode, AnchorAdaptiveNode, AnchorDeepNode]
