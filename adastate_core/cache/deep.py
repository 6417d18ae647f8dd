"""Deep Forcing's cache (arXiv 2512.05081): a deep sink, tokens chosen by attention, and the newest frames.

One layer's buffers, in latent frames (S sink, W window, F chunk, C chosen, r newest past frames of the recent ones):

    [ home, W + F, filled from the right | sink, S, filled from the right | current, F | staged, C + r ]

Home holds the past without the sink, the oldest nearest to the sink. It begins with C frames' worth of chosen tokens, if any
were chosen. Whole frames follow. While home holds at most W frames, a pass reads [home | sink | current]. When home holds more, the
first pass of the chunk chooses tokens. It leaves the r newest frames out, and of all other tokens in home it takes the C frames'
worth with the largest sum of q.k over the queries of the recent frames. The chosen tokens and the r newest frames are put into
`staged` at their places in time, and every pass of the chunk reads [sink | current | staged]. Home does not change until the
chunk is committed, so an interrupted chunk does not touch the past. In both cases a pass reads one slice of the buffers.

How tokens are chosen is in cache/deep_choice.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch

from ..anchors import Anchor, Selection, Source
from ..rope import Layout, Rope, Turn
from ..shots import NOTHING
from .byte_plan import CachePlan, LayerSpec
from .deep_choice import choose, gathered, summed
from .enter_leave import write_frame
from .host_copies import Frames, HostCopies, place
from .slots import LayerSlots, LayerSnapshot, Slot, Turned


@dataclass(frozen=True)
class DeepSpec(LayerSpec):
    """`selection` of the policy; `spare_frames` beside the window until the next chunk chooses."""

    selection: Selection = field(kw_only=True)
    spare_frames: int = field(kw_only=True)

    @property
    def ring_frames(self) -> int:
        return self.window_frames + self.spare_frames

    @property
    def staged_frames(self) -> int:
        return self.selection.staged_frames

    @property
    def query_frames(self) -> int:
        return self.selection.query_frames

    @property
    def chosen_frames(self) -> int:
        """Frames' worth of tokens that are chosen."""
        return self.staged_frames - self.query_frames

    def bytes(self, plan: CachePlan) -> dict[str, int]:
        kept = (self.anchor_frames + self.ring_frames) * plan.frame_bytes
        # staged frames; of the chosen tokens ids and counts, and what the chunk that chooses has picked; summed queries
        tables = 3 if self.selection.most_choices else 2
        ids = tables * 8 * plan.batch * self.chosen_frames * plan.tokens
        queries = 4 * plan.batch * (self.query_frames + plan.chunk_frames) * plan.width
        return {
            "k": kept,
            "v": kept,
            "rotated_copy": self.ring_frames * plan.frame_bytes,
            "current": 2 * plan.current_frames * plan.frame_bytes,
            "ema": 0,
            "replay": self.replay_bytes(plan),
            "selection": 2 * self.staged_frames * plan.frame_bytes + ids + queries,
        }

    def build(self, plan: CachePlan, device: torch.device, workspace: Any, room: DeepSpec) -> DeepLayer:
        return DeepLayer(plan, self, device, room)


class DeepLayer(LayerSlots):
    """One layer's buffers, in the compute dtype on the model's device. Mutable, private to one run."""

    selects: ClassVar[bool] = True

    def __init__(
        self, plan: CachePlan, layer: DeepSpec, device: torch.device, room: DeepSpec, old: DeepLayer | None = None
    ) -> None:
        super().__init__(plan, layer, device, room, old)
        self.shift = layer.selection.shift
        self.home_frames = room.ring_frames
        self.recent = layer.query_frames
        self.chosen_frames = layer.chosen_frames
        batch, tokens, width = plan.batch, plan.tokens, plan.width
        slots = self.home_frames + layer.anchor_frames + plan.current_frames + layer.staged_frames
        self.k = torch.zeros((batch, slots, tokens, width), dtype=plan.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        # un-rotated keys of home, oldest first
        self.raw = torch.zeros((batch, self.home_frames, tokens, width), dtype=plan.dtype, device=device)
        # chosen tokens in home: video frame * P + token of the frame
        self.ids = torch.zeros((batch, self.chosen_frames * tokens), dtype=torch.int64, device=device)
        # tokens of home, oldest first, that the chunk under way has chosen
        self.picked = torch.zeros_like(self.ids)
        # summed queries at time 0, one for each frame: of the newest past frames, and of the chunk under way
        self.queries = torch.zeros((batch, self.recent, width), device=device)
        self.new_queries = torch.zeros((batch, plan.chunk_frames, width), device=device)
        # how often each chosen token was chosen, where that has a limit
        self.counts = torch.zeros_like(self.ids) if layer.selection.most_choices else None
        self.chosen = 0
        self.compressed = False
        # whether the sink stands `sink_back` frames further back, as it does from the first cut on
        self.moved = False

    @property
    def current_start(self) -> int:
        return self.home_frames + self.layer.anchor_frames

    @property
    def staged_start(self) -> int:
        return self.current_start + self.plan.current_frames

    @property
    def count(self) -> int:
        """Frames (and frames' worth of tokens) in home."""
        return self.chosen + len(self.window)

    @property
    def held(self) -> int:
        """What the passes of the next chunk, or of the one under way, read beside the sink."""
        return self.layer.staged_frames if self.count > self.layer.window_frames else self.count

    def anchor_index(self, slot: int) -> int:
        return self.current_start - 1 - slot

    def home_index(self, index: int) -> int:
        """The buffer slot of the `index`-th frame of home."""
        return self.home_frames - 1 - index

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated, by the plan's names."""
        frame = self.k[:, :1].nbytes
        current, staged = self.plan.current_frames * frame, self.layer.staged_frames * frame
        tables = [t for t in (self.ids, self.picked, self.counts, self.queries, self.new_queries) if t is not None]
        return {
            "k": self.k.nbytes - current - staged,
            "v": self.v.nbytes - current - staged,
            "rotated_copy": self.raw.nbytes,
            "current": 2 * current,
            "ema": 0,
            "replay": 0 if self.first_frames is None else self.first_frames.nbytes,
            "selection": 2 * staged + sum(t.nbytes for t in tables),
        }

    def start_chunk(self) -> None:
        """The passes of a chunk begin; what an interrupted one chose is forgotten."""
        self.compressed = False

    def turns(self, layout: Layout, rope: Rope, heads: int) -> Iterator[Callable[[], None]]:
        """Writes that rotate the keys that entered since the last time. Sink slots and frames of home get positions 0, 1, 2, ...,
        but a sink that was moved stands further back."""
        cut = self.moved or self.count > self.layer.window_frames
        back = self.layer.selection.sink_back if cut else 0
        for slot, entry in self.anchor.items():
            to = layout.anchor(slot, entry.frame) - back
            if entry.position != to:
                key = self.k[:, self.anchor_index(slot)]
                turned = self._rotated(key, rope.turn([entry.position], [to]), heads)
                yield Turned(key, turned, [(entry, to)])
        for i, entry in self.window.items():
            to = len(self.anchor) + i
            if entry.position != to:
                turned = self._rotated(self.raw[:, i], rope.turn(None, [to]), heads)
                yield Turned(self.k[:, self.home_index(i)], turned, [(entry, to)])

    @staticmethod
    def _rotated(keys: torch.Tensor, turn: Turn, heads: int) -> torch.Tensor:
        """Keys [B, N, width], turned."""
        return Rope.rotate(keys.unflatten(-1, (heads, -1)), turn).flatten(2)

    @classmethod
    def _rotate(cls, keys: torch.Tensor, turn: Turn, out: torch.Tensor, heads: int) -> None:
        """The same into `out` of the same shape."""
        out.copy_(cls._rotated(keys, turn, heads))

    def see(self, q: torch.Tensor, layout: Layout, rope: Rope, heads: int, clean: bool) -> None:
        """Take the queries [B, N, width] of a pass, normed and not rotated, before the pass reads. Choose tokens if that is due.
        If the pass is clean, keep the sums of its queries."""
        due = self.count > self.layer.window_frames and not self.compressed
        if not (due or clean):
            return
        sums = summed(q, q.shape[1] // self.plan.tokens, rope, heads)
        if due:
            self._choose(sums, layout, rope, heads)
            self._stage(layout, rope, heads)
            self.compressed = True
        if clean:
            self.new_queries[:, : sums.shape[1]].copy_(sums)

    def _choose(self, sums: torch.Tensor, layout: Layout, rope: Rope, heads: int) -> None:
        """Fill `picked`. Each key and query stands at the position that it has when all of home is in place."""
        first, candidates = len(self.anchor), self.count - self.recent
        content = layout.content + self.count - self.held
        places = [*range(first + candidates, first + self.count), *range(content, content + sums.shape[1])]
        keys = [self.k[:, self.home_index(i)] for i in range(candidates)]
        queries = torch.cat([self.queries, sums], 1)
        most = self.layer.selection.most_choices
        spent = self.counts >= most if most and self.chosen else None
        self.picked.copy_(choose(keys, queries, places, self.picked.shape[1], rope, heads, spent))

    def picked_counts(self) -> torch.Tensor:
        """[B, C * P] how often each picked token was chosen, this time included."""
        if not self.chosen:
            return torch.ones_like(self.picked)
        held = self.counts.shape[1]
        before = self.counts.gather(1, self.picked.clamp(max=held - 1)) * (self.picked < held)
        return before + 1

    def picked_ids(self) -> torch.Tensor:
        """[B, C * P] `ids` of the picked tokens."""
        tokens = self.plan.tokens
        held = [slot.frame for slot in self.window.values()]
        following = range(held[0], held[0] + len(held)) if held else range(0)
        # frames that follow one another are counted out on the device: within a pass nothing is copied to it
        frames = (
            torch.arange(following.start, following.stop, device=self.device)
            if held == [*following]
            else torch.tensor(held, device=self.device)
        )
        whole = (frames[:, None] * tokens + torch.arange(tokens, device=self.device)).flatten()
        whole = whole.expand(self.plan.batch, -1)
        ids = torch.cat([self.ids, whole], 1) if self.chosen else whole
        return ids.gather(1, self.picked)

    def _stage(self, layout: Layout, rope: Rope, heads: int) -> None:
        """Put picked tokens and the newest frames at the places in time that they have in the chunk's passes."""
        tokens, start, first = self.plan.tokens, self.staged_start, len(self.anchor)
        chosen = slice(start, start + self.chosen_frames)
        ids = self.picked_ids()
        if self.shift:
            row = torch.arange(self.chosen_frames, device=self.device).repeat_interleave(tokens)
            places, which = range(first, first + self.chosen_frames), row.expand_as(ids)
        else:  # as far before the content as they lie in the video
            ages = 1 << layout.first_frame.bit_length()  # a length that seldom changes
            places, which = range(layout.content, layout.content - ages, -1), layout.first_frame - ids // tokens
        mirrored = self.home_index(self.picked // tokens) * tokens + self.picked % tokens
        keys, values = (t[:, chosen].flatten(1, 2) for t in (self.k, self.v))
        size = self.plan.block_frames * tokens
        for low in range(0, ids.shape[1], size):
            part = slice(low, low + size)
            turn = rope.turn_tokens(places, which[:, part], ids[:, part] % tokens)
            self._rotate(gathered(self.raw, self.picked[:, part]), turn, keys[:, part], heads)
            values[:, part].copy_(gathered(self.v[:, : self.home_frames], mirrored[:, part]))
        for j in range(self.recent):
            i, to = self.count - self.recent + j, self.chosen_frames + j
            self._rotate(self.raw[:, i], rope.turn(None, [first + to]), self.k[:, start + to], heads)
            self.v[:, start + to].copy_(self.v[:, self.home_index(i)])

    def read(self, current_frames: int, layout: Layout | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the past and the current frames, each [B, tokens, width]: views of the buffers.

        Only a pass of fewer than F content frames that has chosen (over given frames) has to copy.
        """
        low, high = self.current_start - len(self.anchor), self.current_start + current_frames
        if not self.compressed:
            low = self.home_frames - self.count if self.count else low
            return self.k[:, low:high].flatten(1, 2), self.v[:, low:high].flatten(1, 2)
        end = self.staged_start + self.layer.staged_frames
        if high == self.staged_start:
            return self.k[:, low:end].flatten(1, 2), self.v[:, low:end].flatten(1, 2)
        pieces = [(t[:, low:high], t[:, self.staged_start : end]) for t in (self.k, self.v)]
        keys, values = (torch.cat(parts, dim=1).flatten(1, 2) for parts in pieces)
        return keys, values

    def held_frames(self, current_frames: int) -> list[tuple[str, int]]:
        """What `read` gives, frame by frame; chosen tokens count as anchor slots behind the sink."""
        sink = [("anchor", slot) for slot in range(len(self.anchor) - 1, -1, -1)]
        current = [("current", i) for i in range(current_frames)]
        frames = [("window", slot.frame) for slot in self.window.values()]
        chosen = self.chosen_frames if self.compressed else self.chosen
        tokens = [("anchor", len(self.anchor) + i) for i in range(chosen)]
        if self.compressed:
            return sink + current + tokens + frames[len(frames) - self.recent :]
        return [*(tokens + frames)[::-1], *sink, *current]

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: what is staged to be cached are the un-rotated keys."""
        frames = keys.shape[1] // self.plan.tokens
        self.k[:, self.current_start : self.current_start + frames].copy_(keys.unflatten(1, (frames, -1)))

    def window_books(self) -> tuple[Any, ...]:
        return self.window, self.chosen

    def take_window(self, window: OrderedDict[int, Slot], chosen: int = 0) -> None:
        """Which frame of home lies where from now on, behind how many frames' worth of chosen tokens; the sink stays."""
        self.window, self.chosen, self.compressed = window, chosen, False

    def beside_window(self, anchor_too: bool) -> list[torch.Tensor]:
        return [*super().beside_window(anchor_too), self.queries]

    def scratch(self, blends: bool = False) -> torch.Tensor | None:
        """[B, C * P, width]: chosen tokens on their way."""
        return self.raw.new_empty((self.plan.batch, self.chosen_frames * self.plan.tokens, self.plan.width))

    def draft(self, scratch: torch.Tensor | None) -> DeepDraft:
        return DeepDraft(self, scratch)

    def staged(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.current_start + frame
        return self.k[:, index], self.v[:, index]

    def leaving(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.raw[:, ring], self.v[:, self.home_index(ring)]

    def shown(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.leaving(ring)

    def shown_position(self, slot: Slot) -> float | None:
        return None

    def enter(self, ring: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.raw[:, ring].copy_(key)
        self.v[:, self.home_index(ring)].copy_(value)

    def _take(self, ring: int) -> list[torch.Tensor]:
        return [t.clone() for t in (*self.leaving(ring), self.k[:, self.home_index(ring)])]

    def resized(self, layer: DeepSpec, room: DeepSpec) -> DeepLayer:
        new = super().resized(layer, room)
        for i in range(self.chosen):
            new._carry(self, i, i)
        new.ids.copy_(self.ids)
        new.queries.copy_(self.queries)
        if self.counts is not None:
            new.counts.copy_(self.counts)
        new.chosen, new.moved = self.chosen, self.moved
        return new

    def _carry(self, old: DeepLayer, ring: int, to: int) -> None:
        self.raw[:, to].copy_(old.raw[:, ring])
        for mine, other in ((self.k, old.k), (self.v, old.v)):
            mine[:, self.home_index(to)].copy_(other[:, old.home_index(ring)])

    def _carry_anchor(self, old: DeepLayer, slot: int) -> None:
        for mine, other in ((self.k, old.k), (self.v, old.v)):
            mine[:, self.anchor_index(slot)].copy_(other[:, old.anchor_index(slot)])

    def _place(self, ring: int, taken: list[torch.Tensor]) -> None:
        raw, value, key = taken
        self.enter(ring, raw, value)
        self.k[:, self.home_index(ring)].copy_(key)

    def _anchor_buffers(self) -> list[torch.Tensor]:
        return [t[:, self.home_frames : self.current_start] for t in (self.k, self.v)]

    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        index = self.anchor_index(slot)
        self.k[:, index].copy_(key)
        self.v[:, index].copy_(value)

    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        raise TypeError("a deep sink is never blended")

    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        raise TypeError("a deep sink is never blended")

    def _order(self, anchors: int, count: int) -> list[int]:
        return [*(self.anchor_index(slot) for slot in range(anchors)), *(self.home_index(i) for i in range(count))]

    def snapshot(self, copies: HostCopies) -> LayerSnapshot:
        """As LayerSlots: sink slots, chosen tokens and whole frames, in this order.

        Besides keys and values it has `raw` [B, home, P, width], `ids` [B, C * P], `queries` [B, r, width] and, where tokens are
        counted, `counts` [B, C * P].
        """
        self.anchor = dict(sorted(self.anchor.items()))
        order = self._order(len(self.anchor), self.count)
        parts: dict[str, Frames] = {"keys": (self.k, order), "values": (self.v, order)}
        parts |= {"raw": (self.raw, range(self.count)), "ids": (self.ids, None), "queries": (self.queries, None)}
        if self.counts is not None:
            parts["counts"] = (self.counts, None)
        return self._snapshot_of(parts, copies)

    def restore(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot of a layer with the same plan; the snapshot stays as it is."""
        anchors, window, plan = len(saved.anchor_slots), len(saved.ring_slots), self.plan
        chosen = saved.ring_slots[0] if saved.ring_slots else 0
        count, frame = chosen + window, (plan.tokens, plan.width)
        shapes = dict.fromkeys(("keys", "values"), (plan.batch, anchors + count, *frame))
        shapes |= {
            "raw": (plan.batch, count, *frame),
            "ids": tuple(self.ids.shape),
            "queries": tuple(self.queries.shape),
        }
        if self.counts is not None:
            shapes["counts"] = tuple(self.counts.shape)
        fits = (
            len(saved.frames) == len(saved.positions) == anchors + window
            and saved.anchor_slots == tuple(range(anchors))
            and anchors <= self.layer.anchor_frames
            and chosen in (0, self.chosen_frames)
            and saved.ring_slots == tuple(range(chosen, count))
            and count <= self.home_frames
            and saved.pinned == 0
            and {name: tuple(t.shape) for name, t in saved.tensors.items()} == shapes
            and all(saved.tensors[name].dtype == torch.int64 for name in ("ids", "counts") if name in shapes)
            and saved.tensors["queries"].dtype == torch.float32
            and all(saved.tensors[name].dtype == plan.dtype for name in ("keys", "values", "raw"))
        )
        if not fits:
            raise ValueError("the state's cache does not have the layout that its settings say: the file is damaged")
        self._adopt(saved)
        self.chosen, self.compressed = chosen, False
        order = self._order(anchors, count)
        place(self.k, order, saved.tensors["keys"])
        place(self.v, order, saved.tensors["values"])
        self.raw[:, :count] = saved.tensors["raw"].to(self.raw)
        self.moved = any(entry.position is not None and entry.position < slot for slot, entry in self.anchor.items())
        self.ids.copy_(saved.tensors["ids"])
        if self.counts is not None:
            self.counts.copy_(saved.tensors["counts"])
        self.queries.copy_(saved.tensors["queries"])


class DeepDraft:
    """The draft of a commit to a deep sink's layer (as LayerDraft). Tokens that the chunk did not choose are forgotten by it."""

    def __init__(self, cache: DeepLayer, scratch: torch.Tensor) -> None:
        """`scratch`: what `DeepLayer.scratch` gives."""
        self.cache, self._scratch = cache, scratch
        self.anchor = {slot: replace(entry) for slot, entry in cache.anchor.items()}
        self.window = OrderedDict((i, replace(entry)) for i, entry in cache.window.items())
        self.chosen, self.moved = cache.chosen, cache.moved
        self.writes: list[Callable[[], object]] = []
        self.left: list[Callable[[], None]] = []

    def fill(
        self,
        anchor: Anchor,
        first_frame: int,
        content_frames: int,
        state_frames: int,
        pin: range = NOTHING,
        keeps: bool = True,
    ) -> None:
        """First home becomes what the chunk chose. Then the content that a pass staged enters home or the sink. Nothing is pinned
        here: shots are refused."""
        cache = self.cache
        if cache.compressed:
            self._settle()
        for i in range(content_frames):
            source = partial(cache.staged, state_frames + i)
            if (slot := anchor.slot_of(first_frame + i)) is not None:
                self.set_anchor(slot, first_frame + i, source)
            else:
                index = self.chosen + len(self.window)
                self.writes.append(partial(write_frame, cache.enter, index, source))
                self.window[index] = Slot(first_frame + i)
        queries = torch.cat([cache.queries, cache.new_queries[:, :content_frames]], 1)
        self.writes.append(partial(cache.queries.copy_, queries[:, queries.shape[1] - cache.recent :]))
        self.writes.append(self._take_books)
        anchor.committed(self, first_frame, content_frames)

    @property
    def window_frames(self) -> int:
        return self.cache.layer.window_frames

    def frame_in(self, slot: int) -> int | None:
        """The video frame that a sink slot holds, or None while it is empty."""
        held = self.anchor.get(slot)
        return None if held is None else held.frame

    @property
    def first_left(self) -> int | None:
        """None: no policy is told of a frame that leaves here."""
        return None

    def set_anchor(self, slot: int, frame: int, source: Source) -> None:
        """Put a raw key and value [B, P, width] into a sink slot."""
        self.writes.append(partial(write_frame, self.cache.write_anchor, slot, source))
        self.anchor[slot] = Slot(frame)

    def clear_anchor(self) -> None:
        """Empty every sink slot."""
        self.anchor.clear()

    def blend_anchor(self, slot: int, source: Source, weight: float) -> None:
        raise TypeError("a sink beside chosen tokens is never blended")

    def keep_first(self, first_frame: int, content_frames: int) -> None:
        raise TypeError("a sink beside chosen tokens keeps no first frames")

    def replay(self, source: int, frame: int) -> None:
        raise TypeError("a sink beside chosen tokens replays nothing")

    def _settle(self) -> None:
        """Home becomes what is in `staged`."""
        cache = self.cache
        first, count, chosen, staged = len(self.anchor), cache.count, cache.chosen_frames, cache.layer.staged_frames
        index = cache.picked[..., None].expand(-1, -1, cache.plan.width)
        kept = self._scratch.unflatten(1, (chosen, -1)) if chosen else self._scratch[:, :0, None]
        self.writes += [
            partial(torch.gather, cache.raw.flatten(1, 2), 1, index, out=self._scratch),
            partial(cache.raw[:, :chosen].copy_, kept),
            partial(cache.ids.copy_, cache.picked_ids()),
        ]
        if cache.counts is not None:
            self.writes.append(partial(cache.counts.copy_, cache.picked_counts()))
        for j in range(cache.recent):  # upwards: a frame that is moved lies above all places that are filled before it
            target, source = cache.raw[:, chosen + j], cache.raw[:, count - cache.recent + j]
            self.writes.append(partial(target.copy_, source))
        for i in range(staged):
            for buffer in (cache.k, cache.v):
                target, source = buffer[:, cache.home_index(i)], buffer[:, cache.staged_start + i]
                self.writes.append(partial(target.copy_, source))
        frames = [slot.frame for slot in self.window.values()][len(self.window) - cache.recent :]
        self.window = OrderedDict((i, Slot(f, first + i)) for i, f in zip(range(chosen, staged), frames, strict=True))
        self.chosen, self.moved = chosen, bool(cache.layer.selection.sink_back)

    def _take_books(self) -> None:
        self.cache.chosen, self.cache.moved, self.cache.compressed = self.chosen, self.moved, False
        self.cache.take_books(self.anchor, self.cache.pinned, self.window)
