"""Where a timeline's prompts come from, kept beside them so that a run that is under way can be given other words.

Every change becomes an entry of the timeline's text, and the text is read as the node reads it. So the video is that of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..adastate_core.prompts.demo_words import DEFAULTS, prompt, words_in, words_over_time
from ..adastate_core.prompts.timeline import tidy, with_shared
from ..adastate_core.prompts.values import LONGEST, PromptAt, Prompts, TimedText, parse_timeline
from .host.text import encode_one, on_the_cpu

NOT_LIVE = "no text encoder is linked to new words: turn live on at Prompt Timeline, and queue it again"


def seconds_or_open(duration: float) -> float | None:
    """The duration, or None where it is 0; ValueError for what is none."""
    if not (math.isfinite(duration) and 0 <= duration <= LONGEST):
        raise ValueError(f"duration is {duration}; it must be between 0 (open) and {LONGEST} seconds")
    return duration or None


@dataclass(frozen=True)
class Change:
    """How the words change where an entry does not say it itself."""

    transition: str
    chunks: int
    blend: str


@dataclass(frozen=True, eq=False)
class ClipTimeline:
    """Prompt Timeline's: `encoded` has the CONDITIONING of each text with what is shared. `clip` is None unless it is live."""

    text: str
    shared: str
    change: Change
    duration: float
    encoded: dict[str, Any] = field(repr=False)
    clip: Any = field(default=None, repr=False)

    @property
    def refused(self) -> str | None:
        """Why it takes no new words, or None."""
        return NOT_LIVE if self.clip is None else None

    @property
    def beside(self) -> bool:
        """Whether words can be encoded while the model is at work: the text encoder is on the CPU."""
        return on_the_cpu(self.clip)

    def own(self) -> ClipTimeline:
        """The same for one run, whose words nobody else keeps."""
        return replace(self, encoded=dict(self.encoded))

    def entries(self) -> tuple[TimedText, ...]:
        """As they are written, without what is shared."""
        return parse_timeline(self.text, duration=seconds_or_open(self.duration))

    def check(self, words: str) -> None:
        """ValueError for words that it cannot take."""

    def encoding(self, words: str) -> Callable[[], None] | None:
        """What has to be done before `read` takes these words; None: nothing."""
        text = with_shared(tidy(self.shared), words)
        if text in self.encoded:
            return None

        def encode() -> None:
            self.encoded[text] = encode_one(self.clip, text)

        return encode

    def read(self, text: str) -> Prompts:
        """As adastate_core.prompts.values.TimelineSource."""
        entries = parse_timeline(text, self.shared, seconds_or_open(self.duration))
        change = self.change
        made = [
            PromptAt(
                entry.seconds,
                self.encoded[entry.text] if entry.text else None,
                entry.transition or change.transition,
                change.chunks,
                change.blend,
                entry.text,
                entry.seed,
                entry.strength,
            )
            for entry in entries
        ]
        return Prompts(tuple(made), replace(self, text=text))


@dataclass(frozen=True, eq=False)
class DemoTimeline:
    """Demo Prompt Timeline's, whose words need no encoder."""

    text: str
    change: Change
    refused: str | None = None
    beside: bool = False

    def own(self) -> DemoTimeline:
        return self

    def entries(self) -> tuple[TimedText, ...]:
        """As they are written."""
        return parse_timeline(self.text)

    def check(self, words: str) -> None:
        """ValueError for words that the demo does not know."""
        words_in(words, DEFAULTS)

    def encoding(self, words: str) -> None:
        """Nothing."""

    def read(self, text: str) -> Prompts:
        """As adastate_core.prompts.values.TimelineSource."""
        made, change, known = [], self.change, {}
        for entry, words in words_over_time(text):
            said = ", ".join(word if slot == "lantern" else f"{word} {slot}" for slot, word in words.items())
            if entry.text and said not in known:
                known[said] = [[prompt(words), {}]]
            made.append(
                PromptAt(
                    entry.seconds,
                    known[said] if entry.text else None,
                    entry.transition or change.transition,
                    change.chunks,
                    change.blend,
                    said if entry.text else "",
                    entry.seed,
                    entry.strength,
                )
            )
        return Prompts(tuple(made), replace(self, text=text))
