"""The demo model's language: a closed vocabulary, each word one fixed vector in the place of a text encoder's token.

Free text needs the real encoder (umt5-xxl); the demo's model was trained on these vectors instead (training/world.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

TEXT_WIDTH = 4096
# slot -> words; any slot but the last may be left out ("any")
VOCABULARY: dict[str, tuple[str, ...]] = {
    "terrain": ("meadow", "desert", "snow", "city"),
    "pace": ("slow", "steady", "fast"),
    "balloon": ("crimson", "gold", "white", "violet"),
    "lantern": ("lantern", "no lantern"),
}
ANY = "any"


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
