"""What clips are conditioned on: the demo's words, chunk by chunk, or the text encoder's embeddings of whole prompts.

A clip's condition is a row of numbers into a table; conditions [B, chunks, slots] can be drawn, shared and saved as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from adastate_core.prompts.demo_words import VOCABULARY, word_vector


class Texts:
    """The demo's closed vocabulary: one token a word. Any slot but the last may be left out.

    `slots`: those of the vocabulary that conditions give, in its order; the others are left out always.
    """

    def __init__(self, slots: Sequence[str] = tuple(VOCABULARY)) -> None:
        vectors = [word_vector(slot, word) for slot in slots for word in VOCABULARY[slot]]
        self.table = torch.stack(vectors)
        self.sizes = [len(VOCABULARY[slot]) for slot in slots]
        self.droppable = len(self.sizes) - 1

    def kept(self, dropped: list[bool]) -> tuple[int, ...]:
        """The slots that are given when these of the droppable ones are not."""
        return tuple(i for i, drop in enumerate(dropped) if not drop) + (self.droppable,)

    def context(self, words: torch.Tensor, kept: tuple[int, ...] | None = None) -> torch.Tensor:
        """Numbers [B, slots] of one chunk to [B, tokens, 4096] float32, of the slots `kept` (default: all)."""
        kept = tuple(range(len(self.sizes))) if kept is None else kept
        first = torch.tensor([sum(self.sizes[:i]) for i in kept])
        return self.table[words[:, list(kept)] + first]

    def whole(self, words: torch.Tensor, drop: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers [B, chunks, slots] to the context of whole clips [1, all words, 4096] and which of it each chunk
        sees, [B, chunks, all words] bool; a slot of a clip is left out with probability `drop`."""
        parts = []
        for i, size in enumerate(self.sizes):
            chosen = F.one_hot(words[..., i], size).bool()
            if i < self.droppable:
                stays = torch.rand(words.shape[0], 1, 1, generator=generator) >= drop
                chosen &= stays.expand(-1, words.shape[1], 1)
            parts.append(chosen)
        return self.table[None], torch.cat(parts, -1)


class Prompts(Texts):
    """Embeddings of whole prompts; one prompt a clip. What is left out is replaced by the last one, the negative prompt."""

    def __init__(self, tokens: torch.Tensor, lengths: torch.Tensor, padded_to: int) -> None:
        """`tokens` [sum of lengths, 4096] end to end; every text is given with zeros up to `padded_to` tokens, as the
        text encoder does. ValueError if they do not fit together."""
        if int(lengths.sum()) != len(tokens) or int(lengths.max()) > padded_to or len(lengths) < 2:
            raise ValueError(
                f"{len(lengths)} texts of {int(lengths.sum())} tokens, at most {int(lengths.max())} each, do not fit "
                f"{len(tokens)} embeddings padded to {padded_to}; a file needs at least one prompt and the negative one"
            )
        self.parts, self.padded_to = tokens.split(lengths.tolist()), padded_to
        self.sizes, self.droppable = [len(lengths) - 1], 1

    def _texts(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B] numbers to [B, padded_to, 4096] float32; -1 is the negative prompt."""
        chosen = [self.parts[i].float() for i in numbers.tolist()]
        return torch.stack([F.pad(text, (0, 0, 0, self.padded_to - len(text))) for text in chosen])

    def kept(self, dropped: list[bool]) -> tuple[int, ...]:
        return () if dropped[0] else (0,)

    def context(self, words: torch.Tensor, kept: tuple[int, ...] | None = None) -> torch.Tensor:
        numbers = words[:, 0] if kept is None or kept else torch.full_like(words[:, 0], -1)
        return self._texts(numbers)

    def whole(self, words: torch.Tensor, drop: float, generator: torch.Generator) -> tuple[torch.Tensor, None]:
        """The clips' own contexts [B, tokens, 4096]; every chunk sees all of its clip's."""
        numbers = words[:, 0, 0]
        dropped = torch.rand(len(words), generator=generator) < drop
        return self._texts(torch.where(dropped, -1, numbers)), None


def texts_of(config: dict) -> Texts:
    """The demo's words, of the `slots` that the config names or all, or the prompts in the safetensors file that it names as
    `texts`."""
    if "texts" not in config:
        return Texts(config.get("slots", tuple(VOCABULARY)))
    tensors = load_file(Path(config["texts"]))
    return Prompts(tensors["tokens"], tensors["lengths"], int(tensors["padded_to"]))
