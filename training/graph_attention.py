"""The rollout's cached attention in a form that gradients pass through.

The product's cache (adastate_core/kv_cache.py) writes into preallocated buffers, which autograd forbids; this one keeps
the same frames as tensors of the graph and is called by the same two attention forwards (adastate_core/wan_attention.py),
with the same layouts and the same anchor policies. Everything a run computes is the same
(tests/training/test_recurrence.py); only memory differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from adastate_core.anchors import Anchor
from adastate_core.attention import Kernel, plain_attention
from adastate_core.rope import Layout, Rope


@dataclass(frozen=True)
class Gradients:
    """What the gradient may cross from one chunk to the next.

    `window`: the keys and values of past content. `state_writes` M: the clean state written by the last M chunks
    (0: none, as when the clean pass runs under no_grad); segments of M chunks are cut at `offset`.
    """

    window: bool = True
    state_writes: int = 0
    offset: int = 0

    def cuts_state(self, chunk: int) -> bool:
        """Whether the state that `chunk` wrote carries no graph into the next one."""
        return self.state_writes == 0 or (chunk + 1 + self.offset) % self.state_writes == 0


@dataclass
class _Frame:
    index: int
    key: torch.Tensor  # [B, P, width], not rotated
    value: torch.Tensor


@dataclass
class _LayerGraph:
    """One layer's cached frames; what an anchor policy needs of a LayerCache."""

    anchor: dict[int, _Frame] = field(default_factory=dict)
    window: list[_Frame] = field(default_factory=list)
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    staged: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_anchor(self, slot: int, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.anchor[slot] = _Frame(frame, key, value)

    def blend_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor, weight: float) -> None:
        kept = self.anchor[slot]
        self.anchor[slot] = _Frame(kept.index, kept.key.lerp(key, weight), kept.value.lerp(value, weight))


class GraphAttention:
    """One rollout's attention with gradient: `place`, `begin`, forward, and `commit` after a clean pass.

    `anchor`, `window_frames`, `positions` are those of a RolloutSpec; the cache belongs to one batch of clips.
    """

    def __init__(
        self,
        rope: Rope,
        layers: int,
        heads: int,
        anchor: Anchor,
        window_frames: int,
        positions: str,
        gradients: Gradients = Gradients(),  # noqa: B008
        kernel: Kernel = plain_attention,
    ) -> None:
        self.rope, self.heads, self.kernel = rope, heads, kernel
        self.anchor, self.window_frames, self.positions = anchor, window_frames, positions
        self.gradients = gradients
        self.layers = [_LayerGraph() for _ in range(layers)]
        self._text: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tokens = rope.rows * rope.columns
        self.next_frame = self.next_chunk = 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent frame (Wan's patches are 2 x 2)."""
        return 2 * self.rope.rows, 2 * self.rope.columns

    def layout(self) -> Layout:
        """Positions of the pass to come, as Rollout makes them."""
        return Layout(
            mode=self.positions,
            anchor_capacity=self.anchor.frames,
            window_capacity=self.window_frames,
            state_frames=self.anchor.state_frames,
            anchor_present=len(self.layers[0].anchor),
            window_present=len(self.layers[0].window),
            first_frame=self.next_frame,
        )

    def place(self) -> None:
        """Once a chunk: rotate what is cached to its positions."""
        layout = self.layout()
        for layer in self.layers:
            anchor = [(layout.anchor(slot, f.index), f) for slot, f in layer.anchor.items()]
            entries = anchor + [(layout.window(f.index), f) for f in layer.window]
            layer.past = None
            if entries:
                keys = torch.cat([frame.key for _, frame in entries], 1)
                values = torch.cat([frame.value for _, frame in entries], 1)
                layer.past = self._rotated(keys, self.rope.table([position for position, _ in entries])), values
        self._text.clear()

    def begin(self, content_frames: int) -> None:
        """Start a pass over [state | content_frames]."""
        self._table = self.rope.table(self.layout().current(content_frames))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer's attention: q, k (normed, not rotated), v [B, N, heads * head_dim] -> the same shape."""
        graph = self.layers[layer]
        graph.staged = k, v
        keys, values = self._rotated(k, self._table), v
        if graph.past is not None:
            keys, values = torch.cat([graph.past[0], keys], 1), torch.cat([graph.past[1], values], 1)
        return self.kernel(self._rotated(q, self._table), keys, values, self.heads)

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values, made once a chunk, and apart with and without a graph."""
        entry = (layer, key, torch.is_grad_enabled())
        if entry not in self._text:
            self._text[entry] = make()
        return self._text[entry]

    def commit(self, content_frames: int) -> None:
        """Cache what the last pass staged, with or without its graph as `gradients` says."""
        states = self.anchor.state_frames
        cut = self.gradients.cuts_state(self.next_chunk)
        for layer in self.layers:
            keys, values = (t.unflatten(1, (-1, self.tokens)) for t in layer.staged)
            layer.staged = layer.past = None
            for i in range(content_frames):
                key, value = keys[:, states + i], values[:, states + i]
                if not self.gradients.window:
                    key, value = key.detach(), value.detach()
                self._enter(layer, self.next_frame + i, key, value)
            if states:
                key, value = keys[:, :states], values[:, :states]
                self.anchor.state_committed(layer, *((key.detach(), value.detach()) if cut else (key, value)))
        self.next_frame += content_frames
        self.next_chunk += 1

    def _enter(self, layer: _LayerGraph, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        slot = self.anchor.slot_of(frame)
        if slot is not None:
            layer.set_anchor(slot, frame, key, value)
            return
        layer.window.append(_Frame(frame, key, value))
        if len(layer.window) > self.window_frames:
            oldest = layer.window.pop(0)
            self.anchor.evicted(layer, oldest.index, oldest.key, oldest.value)

    def _rotated(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.rope.rotate(x.unflatten(-1, (self.heads, -1)), table).flatten(2)
