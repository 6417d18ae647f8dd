"""The demo model's language: a closed vocabulary, each word one fixed vector in the place of a text encoder's token.

Free text needs the real encoder (umt5-xxl); the demo's model was trained on these vectors instead (training/world.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch

from .timeline import TimedText, TimelineError, locate, parse_timeline

TEXT_WIDTH = 4096
# slot -> words; any slot but the last may be left out ("any")
VOCABULARY: dict[str, tuple[str, ...]] = {
    "terrain": ("meadow", "desert", "snow", "city"),
    "pace": ("slow", "steady", "fast"),
    "balloon": ("crimson", "gold", "white", "violet"),
    "lantern": ("lantern", "no lantern"),
}
ANY = "any"
DEFAULTS = {"terrain": "meadow", "pace": "steady", "balloon": "crimson", "lantern": "no lantern"}


class WordError(ValueError):
    """A word that the demo model cannot take, `offset` characters into its text."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def word_vector(slot: str, word: str) -> torch.Tensor:
    """[4096] float32 standard normal, from SHA-256 of "slot/word"; ValueError for a word outside the vocabulary."""
    if word not in VOCABULARY.get(slot, ()):
        raise ValueError(
            f"{slot} is {word!r}; the demo model knows {', '.join(VOCABULARY.get(slot, ())) or 'no such slot'}"
        )
    digest = hashlib.sha256(f"{slot}/{word}".encode("ascii")).digest()
    return torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))


def prompt(words: Mapping[str, str]) -> torch.Tensor:
    """[1, n, 4096] float32, one token a given word in the vocabulary's order; slots at "any" are left out."""
    chosen = [(slot, words.get(slot, ANY)) for slot in VOCABULARY]
    tokens = [word_vector(slot, word) for slot, word in chosen if word != ANY]
    if not tokens:
        raise ValueError("every slot of the demo prompt is 'any'; give at least one word")
    return torch.stack(tokens)[None]


def words_in(text: str, before: Mapping[str, str]) -> dict[str, str]:
    """The word of each slot as a text of the vocabulary's words says, in any order; slots left out stay as in `before`.

    A word may be followed by its slot ("crimson balloon"), "any" by a slot leaves that one to the model, and commas are
    spaces. Raises WordError for any other word and for a slot said twice.
    """
    slots = {word: slot for slot, words in VOCABULARY.items() for word in words}
    tokens = [(token[0].lower(), token.start()) for token in re.finditer(r"[^\s,]+", text)]
    said: dict[str, str] = {}
    while tokens:
        word, offset = tokens.pop(0)
        following = tokens[0][0] if tokens else ""
        if word == "no" and following == "lantern":
            word = "no lantern"
            tokens.pop(0)
        slot = slots.get(word)
        if word == ANY and following in VOCABULARY and following != "lantern":
            slot = following
        if slot is None:
            raise WordError(f"found {word[:24]!r}; the demo model knows {_known_words()}", offset)
        if slot in said:
            raise WordError(f"found {word!r} behind {said[slot]!r}; a prompt says its {slot} once", offset)
        said[slot] = word
        if slot != "lantern" and following == slot:
            tokens.pop(0)
    return {slot: said.get(slot, before[slot]) for slot in VOCABULARY}


def words_over_time(text: str) -> tuple[tuple[TimedText, dict[str, str]], ...]:
    """The prompts of a timeline, each with its words by slot; slots left out stay as they were, at first DEFAULTS.

    Raises TimelineError for a text that is no timeline or holds a word that the demo does not know.
    """
    read, words = [], dict(DEFAULTS)
    for entry in parse_timeline(text):
        try:
            words = words_in(entry.text, words)
        except WordError as error:
            raise TimelineError(str(error), *locate(text, entry, error.offset)) from None
        read.append((entry, words))
    return tuple(read)


def _known_words() -> str:
    slots = [f"{', '.join(words)} ({slot})" for slot, words in VOCABULARY.items()]
    return f"{'; '.join(slots)}; and any with terrain, pace or balloon behind it"
