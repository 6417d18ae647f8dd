"""Prompts over time: what the video shows from which second on, and how it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..adastate_core.prompts.demo_words import words_over_time
from ..adastate_core.prompts.values import (
    BLENDS,
    LONGEST,
    MOST_CHUNKS,
    TRANSITIONS,
    PromptAt,
    Prompts,
    listing,
    parse_timeline,
)
from .host import api
from .host.api import io, schema, widget
from .host.node import Node
from .host.text import encode_texts
from .timeline_sources import Change, ClipTimeline, DemoTimeline, seconds_or_open

CATEGORY = "AdaState/prompts"
_PROMPTS = "The prompts and when they begin. Connect it to positive of AdaState Rollout."
_TIMELINE = "The prompts as they were read, one a line with its time."
_EXAMPLE = (
    "0:00 a red balloon over a meadow, camera moving forward\n0:05 a red balloon over a desert, camera moving forward"
)
_DEMO_EXAMPLE = "0:00 meadow, crimson balloon\n0:05 snow, lantern\n0:10 {cut} city, gold balloon, fast"
# What `prompts` is when nothing is connected: a connected one arrives at validation as None.
_UNCONNECTED = object()


def _text_input(default: str, what: str) -> io.Input:
    return widget(
        io.String,
        "text",
        multiline=True,
        dynamic_prompts=False,
        default=default,
        tooltip=f"{what} Three ways to write it: lines (0:05 prompt), marks ([5s: prompt]) or bars (prompt [5s] | prompt). "
        "{cut} behind a time names its transition, {seed 7} and {strength 0.5} set the noise's seed and the adaptive "
        "anchor's strength.",
    )


def _transition_input(what: str, **options: Any) -> io.Input:
    return widget(
        io.Combo,
        "transition",
        options=list(TRANSITIONS),
        default="recache",
        tooltip=f"How the video changes to {what}: recache makes the window again under the new words, flush keeps only the "
        "anchor and the newest 2 latent frames, rope cut jumps ahead in time, cut changes the words and nothing else, soft blends "
        "the words over some chunks, shot begins a new scene (LongLive 2.0).",
        **options,
    )


def _blend_inputs() -> list[io.Input]:
    return [
        widget(
            io.Int,
            "blend_chunks",
            default=3,
            min=1,
            max=MOST_CHUNKS,
            optional=True,
            tooltip="Over how many chunks a soft transition takes place; the other transitions do not use it.",
        ),
        widget(
            io.Combo,
            "blend",
            options=list(BLENDS),
            default="linear",
            optional=True,
            tooltip="How a soft transition mixes the two prompts' embeddings: along a line, or turning at an even angle.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        api.Prompts.Output("timed", display_name="PROMPTS", tooltip=_PROMPTS),
        io.String.Output("listing", display_name="TIMELINE", tooltip=_TIMELINE),
    ]


def _reason(*checks: Callable[[], object]) -> str | None:
    """The sentence with which the first of the checks fails, or None."""
    for check in checks:
        try:
            check()
        except ValueError as error:
            return str(error)
    return None


def _check_change(
    transition: str | None, blend_chunks: int | None, blend: str | None, seconds: float | None = 0.0
) -> None:
    """ValueError for a setting out of range; connected ones arrive as None and pass."""
    given = {"transition": transition, "chunks": blend_chunks, "blend": blend, "seconds": seconds}
    PromptAt(**({"seconds": 0.0, "conditioning": None} | {k: v for k, v in given.items() if v is not None}))


class PromptTimelineNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStatePromptTimeline",
            display_name="Prompt Timeline",
            category=CATEGORY,
            description="A prompt for each part of the video, in one text with times. Connect it to positive of AdaState "
            "Rollout.",
            search_aliases=["prompt schedule", "prompt travel", "timestamp", "prompt switch"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder: Load CLIP with umt5-xxl, type wan."),
                _text_input(_EXAMPLE, "The prompts and when they begin, in seconds of video."),
                widget(
                    io.String,
                    "shared",
                    multiline=True,
                    dynamic_prompts=False,
                    default="",
                    optional=True,
                    tooltip="What all prompts have in common: put in front of each, or around it where {} stands.",
                ),
                _transition_input("a prompt that names no transition of its own", optional=True),
                *_blend_inputs(),
                widget(
                    io.Float,
                    "duration",
                    default=0.0,
                    min=0.0,
                    max=float(LONGEST),
                    step=0.5,
                    optional=True,
                    advanced=True,
                    tooltip="Seconds of video, if known: prompts between bars without a length share what is left evenly, and "
                    "one behind the end is refused. 0 leaves it open.",
                ),
                widget(
                    io.Boolean,
                    "live",
                    default=False,
                    optional=True,
                    tooltip="New words may be given while the video is made, from the panel or over HTTP: the text encoder stays "
                    "with the run. The report then has the timeline that makes the same video.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def check(
        cls,
        text: str | None = None,
        shared: str | None = "",
        transition: str | None = "recache",
        blend_chunks: int | None = 3,
        blend: str | None = "linear",
        duration: float | None = 0.0,
    ) -> str | None:
        def read() -> None:
            if text is not None and duration is not None:
                parse_timeline(text, shared or "", seconds_or_open(duration))

        return _reason(lambda: _check_change(transition, blend_chunks, blend), read)

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        shared: str = "",
        transition: str = "recache",
        blend_chunks: int = 3,
        blend: str = "linear",
        duration: float = 0.0,
        live: bool = False,
    ) -> io.NodeOutput:
        change = Change(transition, blend_chunks, blend)
        source = ClipTimeline(text, shared, change, duration, {}, clip if live else None)
        source.encoded.update(encode_texts(clip, source.texts()))
        prompts = source.read(text)
        return io.NodeOutput(prompts, listing(prompts))


class PromptAtNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStatePromptAt",
            display_name="Prompt At",
            category=CATEGORY,
            description="A conditioning from a second of the video on. Chain several: the first in the chain begins at 0, the "
            "others in any order.",
            search_aliases=["prompt schedule", "prompt switch"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the video shows from then on; one plain prompt."),
                widget(
                    io.Float,
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=float(LONGEST),
                    step=0.25,
                    round=0.001,
                    tooltip="Second of the video at which this prompt begins; 0 for the first of a chain.",
                ),
                _transition_input("this prompt; the prompt at 0 does not use it"),
                api.Prompts.Input("prompts", optional=True, tooltip="The chain so far; this prompt is added to it."),
                *_blend_inputs(),
            ],
            outputs=_outputs()[:1],
        )

    @classmethod
    def check(
        cls,
        seconds: float | None = None,
        transition: str | None = None,
        prompts: Any = _UNCONNECTED,
        blend_chunks: int | None = 3,
        blend: str | None = "linear",
    ) -> str | None:
        def first() -> None:
            if prompts is _UNCONNECTED and seconds is not None:
                _check_first(seconds)

        return _reason(lambda: _check_change(transition, blend_chunks, blend, seconds), first)

    @classmethod
    def execute(
        cls,
        positive: Any,
        seconds: float,
        transition: str,
        prompts: Prompts | None = None,
        blend_chunks: int = 3,
        blend: str = "linear",
    ) -> io.NodeOutput:
        entry = PromptAt(float(seconds), positive, transition, blend_chunks, blend)
        if prompts is not None:
            return io.NodeOutput(prompts.with_entry(entry))
        _check_first(seconds)
        return io.NodeOutput(Prompts((entry,)))


def _check_first(seconds: float) -> None:
    if seconds != 0:
        raise ValueError(
            f"seconds is {seconds:g} and prompts is not connected; the first prompt of a chain begins at 0: set seconds to 0 "
            "or connect another Prompt At"
        )


class DemoTimelineNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDemoTimeline",
            display_name="Demo Prompt Timeline",
            category="AdaState/demo",
            description="Words of the demo model's little world over time. Real checkpoints take Prompt Timeline.",
            inputs=[
                _text_input(
                    _DEMO_EXAMPLE, "Words of the demo and when they begin; what a prompt leaves out stays as it was."
                ),
                _transition_input("a prompt that names no transition of its own", optional=True),
                *_blend_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def check(
        cls,
        text: str | None = None,
        transition: str | None = "recache",
        blend_chunks: int | None = 3,
        blend: str | None = "linear",
    ) -> str | None:
        return _reason(
            lambda: _check_change(transition, blend_chunks, blend),
            lambda: text is not None and words_over_time(text),
        )

    @classmethod
    def execute(
        cls, text: str, transition: str = "recache", blend_chunks: int = 3, blend: str = "linear"
    ) -> io.NodeOutput:
        prompts = DemoTimeline(text, Change(transition, blend_chunks, blend)).read(text)
        return io.NodeOutput(prompts, listing(prompts))


NODES = [PromptTimelineNode, PromptAtNode, DemoTimelineNode]
