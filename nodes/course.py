"""The timeline of a run as it is now, and whether it says what a state was steered by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..adastate_core.prompts.steered import changed, written
from ..adastate_core.prompts.values import PromptAt, Prompts, TimedText, parse_timeline
from .host.steer_wishes import Wish


@dataclass(frozen=True)
class Course:
    """A run's timeline as far as it is known: its prompts, and their entries as they are written where there is a text."""

    prompts: Prompts
    entries: tuple[TimedText, ...] | None

    @staticmethod
    def of(positive: Any) -> Course:
        if not isinstance(positive, Prompts):
            return Course(Prompts((PromptAt(0.0, positive),)), None)
        source = positive.source
        if source is None:
            return Course(positive, None)
        source = source.own()
        return Course(Prompts(positive.entries, source), source.entries())

    @property
    def text(self) -> str | None:
        return None if self.entries is None else self.prompts.source.text

    def with_entry(self, seconds: float, wish: Wish, takes_hold: Callable[[Any], bool]) -> Course:
        """With one more entry. ValueError, in a sentence, where the timeline cannot say it."""
        numbers = {"seed": wish.seed, "strength": wish.strength}
        if self.entries is None:
            new = PromptAt(seconds, None, **numbers)
            return Course(Prompts(changed(self.prompts.entries, new, takes_hold)), None)
        transition = None if wish.prompt is None else wish.transition
        entries = changed(self.entries, TimedText(seconds, wish.prompt or "", transition, **numbers), takes_hold)
        return Course(self.prompts.source.read(written(entries)), entries)


def unsaid(steered: dict[str, Any], positive: Any, latent_frame: Callable[[float], int]) -> list[str]:
    """A sentence if the timeline of a run does not have the changes that the video of the state was `steered` by."""
    changes = steered.get("changes", [])
    if not changes:
        return []
    course, at = Course.of(positive), {change["at"] for change in changes}
    if steered["timeline"] is not None and course.entries is not None:
        wanted = [entry for entry in parse_timeline(steered["timeline"]) if entry.seconds in at]
        missing = [entry.seconds for entry in wanted if entry not in course.entries]
    else:
        known = {(latent_frame(entry.seconds), entry.seed, entry.strength) for entry in course.prompts.entries}
        keys = ("frame", "seed", "strength")
        missing = [
            change["at"]
            for change in changes
            if "prompt" in change or tuple(change.get(key) for key in keys) not in known
        ]
    if not missing:
        return []
    where = ", ".join(f"{seconds:g}" for seconds in sorted(set(missing))[:8])
    return [
        f"the state's video was steered while it was made (at {where} s), and the prompts here do not say so: it goes on without. "
        "The timeline that has it all is shown by Load Rollout State, and in the report of that run, under steering"
    ]


def takes_words(positive: Any) -> bool:
    """Whether new words may come while the video is made."""
    return isinstance(positive, Prompts) and positive.source is not None and positive.source.refused is None
