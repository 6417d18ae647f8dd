"""What a model's attention layers call during a rollout: attention of a pass over the cache.

The model keeps its own projections, norms and attention kernel; this holds what happens between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .kv_cache import KVCache
from .rope import Layout, Rope, Turn

if TYPE_CHECKING:
    from .absorption.absorber import Absorber

# (q, k, v, heads) -> out, each [B, tokens, heads * head_dim]; the number of query and key tokens may differ
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """torch's scaled dot product attention over [B, tokens, heads * head_dim]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass
class _Pass:
    """One forward of the model: how many content frames, whether its keys are to be cached, its rotation."""

    content_frames: int
    clean: bool
    turn: Turn
    layout: Layout


class CachedAttention:
    """The attention of one run: `begin` a pass, then every layer calls `attend` in its turn.

    Queries attend to [cached anchor | cached window | current state | current content] with no mask.
    """

    def __init__(self, cache: KVCache, rope: Rope, kernel: Kernel = plain_attention) -> None:
        self.cache, self.rope, self.kernel = cache, rope, kernel
        # called in every layer of every pass with (layer, rotated q, keys, clean); may look, must not change
        self.observe: Callable[[int, torch.Tensor, torch.Tensor, bool], None] | None = None
        self.absorber: Absorber | None = None
        self._pass: _Pass | None = None

    def start_chunk(self) -> None:
        """Before the passes of a chunk; what an interrupted one left behind is forgotten."""
        for layer in self.cache:
            if layer.selects:
                layer.start_chunk()
        if self.absorber is not None:
            self.absorber.start_chunk()

    def place(self, layout: Layout) -> None:
        """Once a chunk: bring every cached key to its position for this chunk."""
        for layer in self.cache:
            layer.rotate_to(layout, self.rope, self.cache.heads)

    def begin(self, layout: Layout, content_frames: int, clean: bool) -> None:
        """Start a pass of [state | content_frames]; after a `clean` one its keys are staged raw, to be committed."""
        self._pass = _Pass(content_frames, clean, self.rope.turn(None, layout.current(content_frames)), layout)
        self.cache.begin()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer's attention; q, k (normed, not rotated) and v [B, N, heads * head_dim] -> the same shape."""
        run, cache, heads = self._pass, self.cache.layers[layer], self.cache.heads
        dtype = q.dtype
        self.cache.open(layer)
        cache.write_current(self._rotated(k, run.turn), v)
        if cache.selects:
            cache.see(q, run.layout, self.rope, heads, run.clean)
        frames = self.cache.plan.state_frames + run.content_frames
        q = self._rotated(q, run.turn).to(self.cache.plan.dtype)
        out = None if self.absorber is None else self.absorber.attend(layer, q, frames, run.layout)
        if out is None:
            keys, values = cache.read(frames)
            if self.observe is not None:
                self.observe(layer, q, keys, run.clean)
            out = self.kernel(q, keys, values, heads)
            if self.absorber is not None:
                out = self.absorber.correct(layer, out)
        if run.clean:
            cache.keep_raw_current(k)
        return out.to(dtype)

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values for the prompt `key`, made on first use."""
        return self.cache.text(layer, key, make)

    def commit(self, anchor: object, first_frame: int, content_frames: int) -> None:
        """Cache what the clean pass staged in every layer; from here on the chunk is part of the past."""
        for layer in self.cache:
            layer.commit(anchor, first_frame, content_frames, self.cache.plan.state_frames)
        if self.absorber is not None:
            self.absorber.finish_chunk(first_frame + content_frames)

    def _rotated(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        return self.rope.rotate(x.unflatten(-1, (self.cache.heads, -1)), turn).flatten(2)
