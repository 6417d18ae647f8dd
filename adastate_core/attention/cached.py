"""What a model's attention layers call during a rollout: attention of a pass over the cache.

The model keeps its own projections, norms and attention kernel; this holds what happens between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..cache.kv_cache import KVCache
from ..rope import Layout, Rope, Turn

if TYPE_CHECKING:
    from ..absorption.corrections import Corrections

# (q, k, v, heads) -> out, each [B, tokens, heads * head_dim]; the number of query and key tokens may differ
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """torch's scaled dot product attention over [B, tokens, heads * head_dim]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class LayerOrderError(RuntimeError):
    """A pass left a layer out, or came to one twice or out of turn: its keys would be stale ones."""


@dataclass
class _Pass:
    """One forward of the model: how many content frames, whether its keys are to be cached, its rotation, whose turn it is."""

    content_frames: int
    kept: bool
    turn: Turn
    layout: Layout
    layer: int = 0


class CachedAttention:
    """The attention of one run: `begin` a pass, then every layer calls `attend` in its turn, then `end` it.

    Queries attend to [cached anchor | cached window | current state | current content] with no mask.
    """

    def __init__(self, cache: KVCache, rope: Rope, kernel: Kernel = plain_attention) -> None:
        self.cache, self.rope, self.kernel = cache, rope, kernel
        # called in every layer of every pass with (layer, rotated q, keys, kept); may look, must not change
        self.observe: Callable[[int, torch.Tensor, torch.Tensor, bool], None] | None = None
        self.corrections: Corrections | None = None
        self._pass: _Pass | None = None

    def place(self, layout: Layout) -> None:
        """Bring every cached key to its position in `layout`."""
        for step in self.cache.turns(layout, self.rope):
            step.write()

    def begin(self, layout: Layout, content_frames: int, kept: bool, cache: KVCache | None = None) -> None:
        """Start a pass of [state | content_frames] over `cache` (None: the one before). If it is `kept`, its raw keys are
        staged, to be committed."""
        self.cache = cache or self.cache
        self._pass = _Pass(content_frames, kept, self.rope.turn(None, layout.current(content_frames)), layout)
        self.cache.begin()

    def end(self) -> None:
        """The pass is over. LayerOrderError unless every layer has attended."""
        self._expect(len(self.cache.layers))

    def _expect(self, layer: int) -> None:
        if self._pass.layer != layer:
            what = "the pass ended" if layer == len(self.cache.layers) else f"layer {layer} attended"
            raise LayerOrderError(
                f"{what} when it was layer {self._pass.layer}'s turn: something in the model skips, repeats or reorders its "
                "blocks, which a rollout's cache cannot follow; remove the node that does (skip layer guidance, a block patch)"
            )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer's attention; q, k (normed, not rotated) and v [B, N, heads * head_dim] -> the same shape."""
        self._expect(layer)
        run, cache, heads = self._pass, self.cache.layers[layer], self.cache.heads
        dtype = q.dtype
        self.cache.open(layer)
        cache.write_current(self._rotated(k, run.turn), v)
        if cache.selects:
            cache.see(q, run.layout, self.rope, heads, run.kept)
        frames = self.cache.plan.state_frames + run.content_frames
        q = self._rotated(q, run.turn).to(self.cache.plan.dtype)
        out = None if self.corrections is None else self.corrections.attend(layer, q, frames, run.layout)
        if out is None:
            keys, values = cache.read(frames)
            if self.observe is not None:
                self.observe(layer, q, keys, run.kept)
            out = self.kernel(q, keys, values, heads)
            if self.corrections is not None:
                out = self.corrections.correct(layer, out)
        if run.kept:
            cache.keep_raw_current(k)
        run.layer += 1
        return out.to(dtype)

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values for the prompt `key`, made on first use."""
        return self.cache.text(layer, key, make)

    def _rotated(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        return self.rope.rotate(x.unflatten(-1, (self.cache.heads, -1)), turn).flatten(2)
