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
from ..cache.one_pass import OnePass, OnePassLayer
from ..cache.reference_tokens import ReferenceTokens
from ..cache.slots import LayerSlots
from ..reference import NEAREST
from ..rope import Layout, Rope, Turn
from .fused_blocks import FusedBlocks, QueryKeyNorms

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
    """One forward of the model: how many content frames, whether its keys are to be cached, its rotation, whose turn it is, and
    which frames it makes again, if it is no chunk's."""

    content_frames: int
    kept: bool
    turn: Turn
    layout: Layout
    one_pass: OnePass | None = None
    layer: int = 0


class CachedAttention:
    """The attention of one run: `begin` a pass, then every layer calls `attend` in its turn, then `end` it.

    Queries attend to [cached anchor | cached window | current state | current content | reference] with no mask.
    """

    def __init__(
        self,
        cache: KVCache,
        rope: Rope,
        kernel: Kernel = plain_attention,
        blocks: FusedBlocks | None = None,
        reference: ReferenceTokens | None = None,
    ) -> None:
        """`blocks`: which of the model's blocks use compiled functions; None: none. `reference`: tokens that all passes see."""
        self.cache, self.rope, self.kernel, self.blocks = cache, rope, kernel, blocks
        # whichever cache a pass reads, the text's keys and values are there once
        self._texts, self.reference = cache, reference
        # called in every layer of every pass with (layer, rotated q, keys, kept); may look, must not change
        self.observe: Callable[[int, torch.Tensor, torch.Tensor, bool], None] | None = None
        self.corrections: Corrections | None = None
        self._pass: _Pass | None = None

    def place(self, layout: Layout) -> None:
        """Bring every cached key to its position in `layout`."""
        for step in self.cache.turns(layout, self.rope):
            step.write()

    def begin(
        self,
        layout: Layout,
        content_frames: int,
        kept: bool,
        cache: KVCache | None = None,
        one_pass: OnePass | None = None,
        distance: int = NEAREST,
    ) -> None:
        """Start a pass of [state | content_frames] over `cache` (None: the one before). If it is `kept`, its raw keys are
        staged, to be committed. `one_pass`: its frames are these, and become anchor and window. `distance`: how far beyond its
        first content frame the reference stands."""
        self.cache = cache or self.cache
        if self.reference is not None:
            self.reference.place(layout.content, distance)
        turn = self.rope.turn(None, layout.current(content_frames))
        self._pass = _Pass(content_frames, kept, turn, layout, one_pass)
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
        run, cache = self._pass, self.cache.layers[layer]
        self.cache.open(layer)
        self._own(layer).write_current(self._rotated(k, run.turn), v)
        if cache.selects:
            cache.see(q, run.layout, self.rope, self.cache.heads, run.kept)
        return self._attend(layer, self._rotated(q, run.turn).to(self.cache.plan.dtype), k).to(q.dtype)

    def uses(self, layer: int) -> bool:
        """Whether a layer's block is to use the compiled functions."""
        return self.blocks is not None and self.blocks.use(layer)

    def takes_unnormed(self, layer: int, dtype: torch.dtype) -> bool:
        """Whether a layer's queries and keys, of `dtype`, go to `attend_unnormed`: its block uses the functions, and its cache has
        slots that they can write to."""
        return self.uses(layer) and dtype == self.cache.plan.dtype and self._slots(layer) is not None

    def attend_unnormed(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norms: QueryKeyNorms
    ) -> torch.Tensor:
        """As `attend`, of q and k that are still to be normed, where the layer `takes_unnormed`."""
        self._expect(layer)
        run, heads = self._pass, self.cache.heads
        self.cache.open(layer)
        name = "norm_rotate_raw" if run.kept else "norm_rotate"
        weights, turn = (norms.q_weight, norms.k_weight, norms.eps), (run.turn.parts, run.turn.tokens)
        made = self.blocks.fused(name, q, k, v, *weights, *turn, heads, *self._slots(layer))
        q, k = made if run.kept else (made, None)
        return self._attend(layer, q, k)

    def _slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The pass's own slots in a layer, if they lie side by side and are written to as they are."""
        return None if self._pass.one_pass is not None else self.cache.layers[layer].current_slots(self._frames)

    def _own(self, layer: int) -> LayerSlots | OnePassLayer:
        """Where the pass's keys and values go in a layer."""
        cache, one_pass = self.cache.layers[layer], self._pass.one_pass
        return cache if one_pass is None else one_pass.of(cache)

    @property
    def _frames(self) -> int:
        """State and content frames of the pass."""
        return self.cache.plan.state_frames + self._pass.content_frames

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor | None) -> torch.Tensor:
        """Of queries that are rotated, once keys and values are in their slots; k are the raw keys, if they are kept."""
        run, own, heads, frames = self._pass, self._own(layer), self.cache.heads, self._frames
        out = None if self.corrections is None else self.corrections.attend(layer, q, frames, run.layout)
        if out is None:
            keys, values = own.read(frames, run.layout)
            if self.observe is not None:
                self.observe(layer, q, keys, run.kept)
            if self.reference is not None:
                keys, values = self.reference.beside(layer, keys, values)
            out = self.kernel(q, keys, values, heads)
            if self.corrections is not None:
                out = self.corrections.correct(layer, out)
        if run.kept:
            own.keep_raw_current(k)
        run.layer += 1
        return out

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values for the prompt `key`, made on first use."""
        return self._texts.text(layer, key, make)

    def _rotated(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        return self.rope.rotate(x.unflatten(-1, (self.cache.heads, -1)), turn).flatten(2)
