"""The words of a shot: LongLive 2.0 was trained to begin a scene at a sentence in front of the words of its first chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .entry_options import SHOT
from .timeline import TimedText, with_shared

SCENE = "The scene transitions. "


@dataclass(frozen=True)
class Words:
    """What an entry shows: `text` with what all share, "" where the words stay as they were. `opening`: what the first chunk of a
    shot has in their place; "" where it has the same."""

    text: str
    opening: str = ""


def shot_words(text: str, shared: str = "") -> Words:
    """The words of a shot whose prompt is `text`, which may begin with the sentence itself."""
    plain = text.removeprefix(SCENE.rstrip())
    own = plain.strip() if plain[:1].isspace() else text
    if own == SCENE.rstrip():  # it is all that the prompt says
        return Words(with_shared(shared, own))
    told = with_shared(shared, own)
    return Words(told, SCENE + told)


def words_over(entries: Sequence[TimedText], shared: str, transition: str) -> list[Words]:
    """The words of each entry, as it is written, of a timeline. `transition` is that of an entry with words that names none. A shot
    without words of its own begins under those that hold; the first entry begins none."""
    told: list[Words] = []
    now = ""
    for number, entry in enumerate(entries):
        if number and (entry.transition or (transition if entry.text else None)) == SHOT:
            words = shot_words(entry.text, shared) if entry.text else Words(now, shot_words(now).opening)
        else:
            words = Words(with_shared(shared, entry.text))
        now = words.text or now
        told.append(words)
    return told
