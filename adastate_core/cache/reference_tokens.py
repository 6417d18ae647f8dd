"""Keys and values of a reference's tokens (reference.py), layer by layer, and the pass that makes them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ..reference import NEAREST, times, token_places
from ..rope import Rope, Turn
from .byte_plan import CachePlan

Texts = Callable[[int, object, Callable[[], tuple[torch.Tensor, torch.Tensor]]], tuple[torch.Tensor, torch.Tensor]]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class ReferenceTokens:
    """One run's. `made_of` says what they are the tokens of; None while they are not whole."""

    def __init__(self, plan: CachePlan, rope: Rope, device: torch.device) -> None:
        self.rope, self.heads = rope, plan.heads
        self._which, self._places = (t.to(device) for t in token_places(rope.rows, rope.columns))
        shape = (len(plan.layers), plan.batch, len(self._which), plan.width)
        self.keys, self.values = (torch.zeros(shape, dtype=plan.dtype, device=device) for _ in range(2))
        self.made_of: Hashable | None = None
        self._turn: Turn | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def turn(self, content: float, distance: int = NEAREST) -> Turn:
        """The rotation of all of them for a pass whose content begins at `content`."""
        return self.rope.turn_tokens(times(content, distance), self._which, self._places)

    def place(self, content: float, distance: int = NEAREST) -> None:
        """Where they stand in the passes that follow."""
        self._turn = self.turn(content, distance)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys, at their places, and values [B, N, width]."""
        rows = self.keys[layer].unflatten(-1, (self.heads, -1))
        return self.rope.rotate(rows, self._turn).flatten(2), self.values[layer]

    def beside(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a pass, and these behind them: a copy."""
        own = self.read(layer)
        return torch.cat([keys, own[0]], 1), torch.cat([values, own[1]], 1)

    def making(self, kernel: Kernel, texts: Texts) -> MakingReference:
        """What a model's layers call in the pass that makes them anew."""
        return MakingReference(self, kernel, texts)


class MakingReference:
    """That pass: queries attend to these tokens alone, which stand where the first chunk has them."""

    def __init__(self, tokens: ReferenceTokens, kernel: Kernel, texts: Texts) -> None:
        self.tokens, self.kernel, self.text = tokens, kernel, texts
        self._turn = tokens.turn(0.0)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer's attention; q, k (normed, not rotated) and v [B, N, width] -> the same shape. Keys and values are kept."""
        tokens = self.tokens
        tokens.keys[layer].copy_(k)
        tokens.values[layer].copy_(v)
        q, k = (tokens.rope.rotate(x.unflatten(-1, (tokens.heads, -1)), self._turn).flatten(2) for x in (q, k))
        return self.kernel(q, k, v, tokens.heads)
