"""The rollout's cached attention in a form that gradients pass through.

The product's cache (adastate_core/kv_cache.py) writes into preallocated buffers, which autograd forbids; this one keeps
the same frames as tensors of the graph and is called by the same two attention forwards (adastate_core/attention/wan.py),
with the same layouts and the same anchor policies. Everything a run computes is the same
(tests/training/test_recurrence.py); only memory differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from adastate_core.anchors import Anchor
from adastate_core.attention.cached import Kernel, plain_attention
from adastate_core.rope import Layout, Rope, Turn

Pair = tuple[torch.Tensor, torch.Tensor]


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


@dataclass(frozen=True)
class Frame:
    """One cached frame: its key (not rotated) and value [B, P, width]."""

    index: int
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class LayerGraph:
    """One layer's cached frames, as an anchor policy sees them (adastate_core.anchors.LayerView)."""

    window_frames: int
    replay_frames: int = 0
    anchor: dict[int, Frame] = field(default_factory=dict)
    window: list[Frame] = field(default_factory=list)
    # the video's first frames, of a policy that puts them into the window again
    first: list[Frame] = field(default_factory=list)
    # what the commit under way has just cached, and the frame that left the window first for it
    newest: list[Frame] = field(default_factory=list)
    first_left: int | None = None

    def frame_in(self, slot: int) -> int | None:
        return self.anchor[slot].index if slot in self.anchor else None

    def clear_anchor(self) -> None:
        self.anchor.clear()

    def keep_first(self, first_frame: int, content_frames: int) -> None:
        self.first += self.newest[: max(0, min(content_frames, self.replay_frames - first_frame))]

    def replay(self, source: int, frame: int) -> None:
        for i, held in enumerate(self.window):
            if held.index == frame:
                self.window[i] = Frame(frame, self.first[source].key, self.first[source].value)

    def set_anchor(self, slot: int, frame: int, source: Callable[[], Pair]) -> None:
        self.anchor[slot] = Frame(frame, *source())

    def blend_anchor(self, slot: int, source: Callable[[], Pair], weight: float) -> None:
        kept, (key, value) = self.anchor[slot], source()
        self.anchor[slot] = Frame(kept.index, kept.key.lerp(key, weight), kept.value.lerp(value, weight))


@dataclass(frozen=True)
class Pass:
    """One forward of the model, as its attention layers see it.

    It holds on to the past that it attends to, so that a layer may be computed again (activation checkpointing) after
    the cache has moved on.
    """

    past: list[Pair | None]
    turn: Turn
    heads: int
    kernel: Kernel
    staged: dict[int, Pair] = field(default_factory=dict)

    def takes_unnormed(self, layer: int, dtype: torch.dtype) -> bool:
        """Never: the model norms queries and keys itself, and gradients run through that."""
        return False

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One layer's attention: q, k (normed, not rotated), v [B, N, heads * head_dim] -> the same shape."""
        self.staged.setdefault(layer, (k, v))
        keys, values = rotated(k, self.turn, self.heads), v
        if self.past[layer] is not None:
            past_keys, past_values = self.past[layer]
            keys, values = torch.cat([past_keys, keys], 1), torch.cat([past_values, values], 1)
        return self.kernel(
            rotated(q, self.turn, self.heads).to(values.dtype), keys.to(values.dtype), values, self.heads
        )

    def text(self, layer: int, key: object, make: Callable[[], Pair]) -> Pair:
        """A layer's text keys and values; made anew in every pass, as each has a graph of its own."""
        return make()


def rotated(x: torch.Tensor, turn: Turn, heads: int) -> torch.Tensor:
    """[B, N, heads * head_dim], turned."""
    return Rope.rotate(x.unflatten(-1, (heads, -1)), turn).flatten(2)


class GraphAttention:
    """One rollout's cache with gradient: `place` once a chunk, `begin` every pass, `commit` after a clean one.

    `anchor`, `window_frames`, `positions` are those of a RolloutSpec; the cache belongs to one batch of clips. ValueError for
    an anchor that cannot be trained.
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
        if anchor.selects:
            raise ValueError(
                f"the {anchor.kind} anchor chooses tokens by attention, which has no gradient, so it cannot be trained; train with "
                "another anchor, and use this one with the weights"
            )
        self.rope, self.heads, self.kernel = rope, heads, kernel
        self.anchor, self.window_frames, self.positions = anchor, window_frames, positions
        self.gradients = gradients
        self.layers = [LayerGraph(window_frames, anchor.replay_frames) for _ in range(layers)]
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
            state_after_past=self.anchor.state_after_past,
        )

    def place(self) -> None:
        """Once a chunk: rotate what is cached to its positions."""
        layout = self.layout()
        self._past = [self._placed(layer, layout) for layer in self.layers]

    def _placed(self, layer: LayerGraph, layout: Layout) -> Pair | None:
        entries = [(layout.anchor(slot, frame.index), frame) for slot, frame in layer.anchor.items()]
        entries += [(layout.window(frame.index), frame) for frame in layer.window]
        if not entries:
            return None
        keys = torch.cat([frame.key for _, frame in entries], 1)
        values = torch.cat([frame.value for _, frame in entries], 1)
        return rotated(keys, self.rope.turn(None, [position for position, _ in entries]), self.heads), values

    def begin(self, content_frames: int) -> Pass:
        """A pass over [state | content_frames]; it goes into `transformer_options`."""
        turn = self.rope.turn(None, self.layout().current(content_frames))
        self._pass = Pass(self._past, turn, self.heads, self.kernel)
        return self._pass

    def commit(self, content_frames: int) -> None:
        """Cache what the last pass staged, with or without its graph as `gradients` says."""
        states = self.anchor.state_frames
        cut = self.gradients.cuts_state(self.next_chunk)
        for number, layer in enumerate(self.layers):
            keys, values = (t.unflatten(1, (-1, self.tokens)) for t in self._pass.staged[number])
            layer.newest = []
            for i in range(content_frames):
                key, value = keys[:, states + i], values[:, states + i]
                if not self.gradients.window:
                    key, value = key.detach(), value.detach()
                layer.newest.append(Frame(self.next_frame + i, key, value))
            self._enter(layer)
            if states:
                pairs = [(keys[:, i], values[:, i]) for i in range(states)]
                if cut:
                    pairs = [(key.detach(), value.detach()) for key, value in pairs]
                self.anchor.state_committed(layer, [partial(tuple, pair) for pair in pairs], self.next_frame)
            self.anchor.committed(layer, self.next_frame, content_frames)
        self.next_frame += content_frames
        self.next_chunk += 1

    def _enter(self, layer: LayerGraph) -> None:
        """What was just cached goes to the anchor or into the window, the oldest leave it."""
        slots = {frame.index: self.anchor.slot_of(frame.index) for frame in layer.newest}
        entering = sum(slot is None for slot in slots.values())
        leaving, left = max(0, len(layer.window) + entering - self.window_frames), 0
        layer.first_left = None
        for frame in layer.newest:
            if (slot := slots[frame.index]) is not None:
                layer.set_anchor(slot, frame.index, partial(_pair, frame))
                continue
            layer.window.append(frame)
            if len(layer.window) > self.window_frames:
                oldest = layer.window.pop(0)
                layer.first_left = oldest.index if left == 0 else layer.first_left
                self.anchor.evicted(layer, oldest.index, partial(_pair, oldest), (left, leaving))
                left += 1


def _pair(frame: Frame) -> Pair:
    return frame.key, frame.value
