"""Where a timeline's prompts come from, kept beside them so that a run that is under way can be given other words.

Every change becomes an entry of the timeline's text, and the text is read as the node reads it. So the video is that of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adastate_core.prompts.demo_words import DEFAULTS, prompt, words_in, words_over_time
from ..adastate_core.prompts.entry_options import SHOT
from ..adastate_core.prompts.shot_words import Words, shot_words, words_over
from ..adastate_core.prompts.timeline import check_shared, tidy, with_shared
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
    """Prompt Timeline's: `encoded` has the CONDITIONING of each text with what is shared, and of the openings of shots. `clip` is
    None unless it is live."""

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

    def words(self, entries: Sequence[TimedText]) -> list[Words]:
        """Of each entry, with what is shared. TimelineError where that is too much."""
        shared = tidy(self.shared)
        check_shared(shared, entries)
        return words_over(entries, shared, self.change.transition)

    def texts(self) -> list[str]:
        """All that has to be encoded for it."""
        return [text for words in self.words(self.entries()) for text in (words.text, words.opening) if text]

    def check(self, words: str) -> None:
        """ValueError for words that it cannot take."""

    def encoding(self, words: str, transition: str | None = None) -> Callable[[], None] | None:
        """What has to be done before `read` takes an entry with these words and this transition; None: nothing."""
        shared = tidy(self.shared)
        shot = (transition or self.change.transition) == SHOT
        said = shot_words(words, shared) if shot else Words(with_shared(shared, words))
        texts = [said.text, said.opening]
        if any(
            entry.begins_prompt and not entry.text for entry in self.entries()
        ):  # a later shot may begin under these words
            texts.append(shot_words(said.text).opening)
        missing = [text for text in texts if text and text not in self.encoded]

        def encode() -> None:
            for text in missing:
                self.encoded[text] = encode_one(self.clip, text)

        return encode if missing else None

    def read(self, text: str) -> Prompts:
        """As adastate_core.prompts.values.TimelineSource."""
        entries = parse_timeline(text, duration=seconds_or_open(self.duration))
        change, encoded = self.change, self.encoded
        made = [
            PromptAt(
                entry.seconds,
                encoded[words.text] if words.text else None,
                entry.transition or change.transition,
                change.chunks,
                change.blend,
                words.text,
                entry.seed,
                entry.strength,
                encoded[words.opening] if words.opening else None,
            )
            for entry, words in zip(entries, self.words(entries), strict=True)
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

    def encoding(self, words: str, transition: str | None = None) -> None:
        """Nothing."""

    def read(self, text: str) -> Prompts:
        """As adastate_core.prompts.values.TimelineSource."""
        made, change, known = [], self.change, {}
        for entry, words in words_over_time(text):
            said = ", ".join(word if slot == "lantern" else f"{word} {slot}" for slot, word in words.items())
            if entry.begins_prompt and said not in known:
                known[said] = [[prompt(words), {}]]
            made.append(
                PromptAt(
                    entry.seconds,
                    known[said] if entry.begins_prompt else None,
                    entry.transition or change.transition,
                    change.chunks,
                    change.blend,
                    said if entry.begins_prompt else "",
                    entry.seed,
                    entry.strength,
                )
            )
        return Prompts(tuple(made), replace(self, text=text))
