"""The KV cache of a rollout: the buffers of one run, as a plan (cache_plan.py) lays them out.

Each layer has one K and one V buffer of fixed size, laid out in latent frames as

    [ anchor, filled from the right | current: state, content | window, a ring filled from the left ]

so that what a query may read is always one slice, with no mask and no concatenation: an anchor is only partly
filled while the window is still empty. Attention does not depend on the order of its keys.

Keys are rotated where they lie, once a chunk, and only if their position changed. Where a frame will have to be
rotated again later (a relative window that keeps it for more than a chunk, an anchor that blends evicted frames),
an un-rotated copy is kept, so a key is always exactly one rotation away from the raw one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from .anchors import Anchor
from .cache_plan import CachePlan, LayerPlan
from .rope import Layout, Rope


@dataclass
class _Slot:
    """Which video frame a buffer slot holds, and where its key is rotated to (None: raw)."""

    frame: int
    position: float | None = None


@dataclass(frozen=True)
class LayerSnapshot:
    """An immutable copy of what one layer has cached, on the CPU.

    First the anchor's frames (`anchor_slots`), then the window's, oldest first (`ring_slots`, of which the first
    `pinned` never leave); `frames` are their video frame indices and `positions` where each key is rotated to (None:
    raw). `tensors` holds `keys` and `values` [B, frames, P, width] and, where the plan has them, `raw` [B, w, P, width],
    `blend_keys`, `blend_values`, `replay_keys` and `replay_values`.
    """

    anchor_slots: tuple[int, ...]
    ring_slots: tuple[int, ...]
    frames: tuple[int, ...]
    positions: tuple[float | None, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    pinned: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class LayerCache:
    """One layer's buffers. Mutable, private to one run."""

    def __init__(self, plan: CachePlan, layer: LayerPlan, device: torch.device) -> None:
        self.plan, self.layer = plan, layer
        slots = layer.anchor_frames + plan.current_frames + layer.ring_frames
        frame = (plan.tokens, plan.width)
        self.k = torch.zeros((plan.batch, slots, *frame), dtype=plan.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.raw = self._buffer(layer.ring_frames, plan.dtype) if layer.keep_raw else None
        self.blend_k = self._buffer(layer.blend_frames, torch.float32) if layer.blend_frames else None
        self.blend_v = torch.zeros_like(self.blend_k) if self.blend_k is not None else None
        # the first frames' raw keys and values, for an anchor that puts them into the window again
        self.replay_k = self._buffer(layer.replay_frames, plan.dtype) if layer.replay_frames else None
        self.replay_v = torch.zeros_like(self.replay_k) if self.replay_k is not None else None
        # told (frame, position, key, value) of every frame that leaves the window; a position of None: the key is raw
        self.on_evict: Callable[[int, float | None, torch.Tensor, torch.Tensor], None] | None = None
        self.anchor: dict[int, _Slot] = {}
        self.pinned: OrderedDict[int, _Slot] = OrderedDict()  # ring slot -> frame; always the first ring slots
        self.window: OrderedDict[int, _Slot] = OrderedDict()  # ring slot -> frame, oldest first

    def _buffer(self, frames: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(
            (self.plan.batch, frames, self.plan.tokens, self.plan.width), dtype=dtype, device=self.k.device
        )

    @property
    def nbytes(self) -> int:
        buffers = (self.k, self.v, self.raw, self.blend_k, self.blend_v, self.replay_k, self.replay_v)
        return sum(t.nbytes for t in buffers if t is not None)

    @property
    def current_start(self) -> int:
        return self.layer.anchor_frames

    @property
    def window_start(self) -> int:
        return self.layer.anchor_frames + self.plan.current_frames

    def _anchor_index(self, slot: int) -> int:
        return self.layer.anchor_frames - 1 - slot

    def rotate_to(self, layout: Layout, rope: Rope, heads: int) -> None:
        """Bring every cached key to its position in `layout`; work is done only where a position changed."""
        anchor = {self._anchor_index(slot): (e, layout.anchor(slot, e.frame)) for slot, e in self.anchor.items()}
        window = {ring: (e, layout.pinned(i, e.frame)) for i, (ring, e) in enumerate(self.pinned.items())}
        window |= {ring: (e, layout.window(e.frame)) for ring, e in self.window.items()}
        self._turn(anchor, 0, self.blend_k, rope, heads)
        self._turn(window, self.window_start, self.raw, rope, heads)

    def _turn(
        self, entries: dict[int, tuple[_Slot, float]], start: int, raw: torch.Tensor | None, rope: Rope, heads: int
    ) -> None:
        """Rotate keys at `start + offset` from `raw` (same offsets) if there is one, else in place.

        A key that is rotated already and has no raw copy is turned by the difference.
        """
        moved = {o: (e, to) for o, (e, to) in sorted(entries.items()) if e.position != to}
        for run in _runs(list(moved)):
            offsets = slice(run[0], run[-1] + 1)
            target = self.k[:, start + offsets.start : start + offsets.stop]
            source = target if raw is None else raw[:, offsets]
            table = rope.table([moved[o][1] for o in run])
            if raw is None:
                table = table * rope.undo([moved[o][0].position for o in run])
            turned = rope.rotate(source.flatten(1, 2).unflatten(-1, (heads, -1)), table)
            target.copy_(turned.reshape(target.shape))
            for o in run:
                moved[o][0].position = moved[o][1]

    def write_current(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stage the pass's own rotated keys and values [B, n * P, width]; n <= S + F frames."""
        frames = keys.shape[1] // self.plan.tokens
        start = self.current_start
        self.k[:, start : start + frames].copy_(keys.unflatten(1, (frames, -1)))
        self.v[:, start : start + frames].copy_(values.unflatten(1, (frames, -1)))

    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """After a clean pass has attended: what is staged to be cached are the un-rotated keys."""
        frames = keys.shape[1] // self.plan.tokens
        self.k[:, self.current_start : self.current_start + frames].copy_(keys.unflatten(1, (frames, -1)))

    def read(self, current_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of anchor, current and window, each [B, tokens, width]: views of the buffers.

        Only a pass of fewer than F content frames (the last one over given frames) has to copy.
        """
        low = self.layer.anchor_frames - len(self.anchor)
        high = self.current_start + current_frames
        held = len(self.pinned) + len(self.window)
        if held and high < self.window_start:
            end = self.window_start + held
            pieces = [(t[:, low:high], t[:, self.window_start : end]) for t in (self.k, self.v)]
            keys, values = (torch.cat(parts, dim=1).flatten(1, 2) for parts in pieces)
            return keys, values
        high = self.window_start + held if held else high
        return self.k[:, low:high].flatten(1, 2), self.v[:, low:high].flatten(1, 2)

    def held_frames(self, current_frames: int) -> list[tuple[str, int]]:
        """What `read` gives, frame by frame: ("anchor", slot), ("current", i) or ("window", video frame)."""
        anchor = [("anchor", slot) for slot in range(len(self.anchor) - 1, -1, -1)]
        current = [("current", i) for i in range(current_frames)]
        window = self.pinned | self.window
        return anchor + current + [("window", window[ring].frame) for ring in sorted(window)]

    def parts(self, current_frames: int, local_window: int, pinned: int) -> tuple[list[slice], list[slice]]:
        """(local, history) as runs of buffer slots: local are anchor, current, the first `pinned` frames that the
        window still holds from the beginning of the video, and its newest `local_window` frames."""
        start, ordered = self.current_start, list(self.window.items())
        newest = {ring for ring, _ in ordered[max(0, len(ordered) - local_window) :]}
        first = {ring for ring, slot in ordered if slot.frame < pinned}
        local = [*(self._anchor_index(slot) for slot in self.anchor), *range(start, start + current_frames)]
        local += [self.window_start + ring for ring in (*self.pinned, *(newest | first))]
        history = [self.window_start + ring for ring, _ in ordered if ring not in newest | first]
        return tuple([slice(run[0], run[-1] + 1) for run in _runs(sorted(part))] for part in (local, history))

    def read_slots(self, slots: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run of buffer slots, each [B, tokens, width]: views."""
        return self.k[:, slots].flatten(1, 2), self.v[:, slots].flatten(1, 2)

    def shrunk(self, layer: LayerPlan) -> LayerCache:
        """The same layer with a smaller plan: its anchor, the window's oldest `pinned_frames` and newest frames."""
        small = LayerCache(self.plan, layer, self.k.device)
        ordered = list((self.pinned | self.window).items())
        newest = ordered[max(layer.pinned_frames, len(ordered) - layer.window_frames) :]
        for i, (ring, entry) in enumerate(ordered[: layer.pinned_frames] + newest):
            raw = self.raw is not None and small.raw is None
            source = self.raw[:, ring] if raw else self.k[:, self.window_start + ring]
            small.k[:, small.window_start + i].copy_(source)
            small.v[:, small.window_start + i].copy_(self.v[:, self.window_start + ring])
            if small.raw is not None:
                small.raw[:, i].copy_(self.raw[:, ring])
            held = small.pinned if i < layer.pinned_frames else small.window
            held[i] = _Slot(entry.frame, None if raw else entry.position)
        for slot, entry in self.anchor.items():
            to, index = small._anchor_index(slot), self._anchor_index(slot)
            small.k[:, to].copy_(self.k[:, index])
            small.v[:, to].copy_(self.v[:, index])
            small.anchor[slot] = _Slot(entry.frame, entry.position)
        small.blend_k, small.blend_v = self.blend_k, self.blend_v
        return small

    def commit(self, anchor: Anchor, first_frame: int, content_frames: int, state_frames: int) -> None:
        """Cache what a clean pass staged: content enters, the oldest leave, then the policy sets the anchor."""
        start = self.current_start
        slots = {f: anchor.slot_of(f) for f in range(first_frame, first_frame + content_frames)}
        slots = {f: slot for f, slot in slots.items() if slot is not None and slot < self.layer.anchor_frames}
        held = len(self.pinned) + len(self.window)
        leaving = max(0, held + content_frames - len(slots) - self.layer.ring_frames)
        left = 0
        for i in range(content_frames):
            frame, index = first_frame + i, start + state_frames + i
            key, value = self.k[:, index], self.v[:, index]
            if frame in slots:
                self.set_anchor(slots[frame], frame, key, value)
            else:
                left += self._push(anchor, frame, key, value, (left, leaving))
        if state_frames and self.layer.anchor_frames:
            states = slice(start, start + state_frames)
            anchor.state_committed(self, self.k[:, states], self.v[:, states], first_frame)
        anchor.committed(self, first_frame, content_frames)

    def _push(self, anchor: Anchor, frame: int, key: torch.Tensor, value: torch.Tensor, place: tuple[int, int]) -> bool:
        """Put a frame into the window; whether one left for it, `place` being which of how many that leave."""
        if self.layer.window_frames == 0:
            anchor.evicted(self, frame, key, value, place)
            if self.on_evict is not None:
                self.on_evict(frame, None, key, value)
            return True
        ring = len(self.pinned) + len(self.window)
        full = ring == self.layer.ring_frames
        if full:
            if self.on_evict is not None:
                self.hand_over(next(iter(self.window)), self.on_evict)
            ring, oldest = self.window.popitem(last=False)
            raw = self.k[:, self.window_start + ring] if self.raw is None else self.raw[:, ring]
            anchor.evicted(self, oldest.frame, raw, self.v[:, self.window_start + ring], place)
        self.k[:, self.window_start + ring].copy_(key)
        self.v[:, self.window_start + ring].copy_(value)
        if self.raw is not None:
            self.raw[:, ring].copy_(key)
        self.window[ring] = _Slot(frame)
        return full

    def hand_over(self, ring: int, receiver: Callable[[int, float | None, torch.Tensor, torch.Tensor], None]) -> None:
        """Show a window frame to `receiver`, its key raw if there is a raw copy."""
        slot, value = self.window[ring], self.v[:, self.window_start + ring]
        if self.raw is not None:
            receiver(slot.frame, None, self.raw[:, ring], value)
        else:
            receiver(slot.frame, slot.position, self.k[:, self.window_start + ring], value)

    def flush(self, keep: int) -> None:
        """Forget the window but for its `keep` newest frames; the anchor and pinned frames stay."""
        newest = list(self.window.items())[max(0, len(self.window) - keep) :]
        buffers = [(t, self.window_start) for t in (self.k, self.v)] + ([(self.raw, 0)] if self.raw is not None else [])
        kept = [[t[:, start + ring].clone() for ring, _ in newest] for t, start in buffers]
        self.window.clear()
        for i, (_, slot) in enumerate(newest):
            ring = len(self.pinned) + i
            for (buffer, start), frames in zip(buffers, kept, strict=True):
                buffer[:, start + ring].copy_(frames[i])
            self.window[ring] = slot

    def set_anchor(self, slot: int, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put a raw key and value [B, P, width] into an anchor slot."""
        index = self._anchor_index(slot)
        self.k[:, index].copy_(key)
        self.v[:, index].copy_(value)
        if self.blend_k is not None:
            self.blend_k[:, index].copy_(key)
            self.blend_v[:, index].copy_(value)
        self.anchor[slot] = _Slot(frame)

    def blend_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor, weight: float) -> None:
        """Move a float32 anchor slot by `weight` towards a raw key and value [B, P, width]."""
        index = self._anchor_index(slot)
        self.blend_k[:, index].lerp_(key.float(), weight)
        self.blend_v[:, index].lerp_(value.float(), weight)
        self.v[:, index].copy_(self.blend_v[:, index])
        self.anchor[slot].position = None

    def keep_for_replay(self, first_frame: int, content_frames: int) -> None:
        """Keep raw keys and values of those staged content frames that are among the first `replay_frames`."""
        start = self.current_start + self.plan.state_frames
        for i in range(min(content_frames, self.layer.replay_frames - first_frame)):
            self.replay_k[:, first_frame + i].copy_(self.k[:, start + i])
            self.replay_v[:, first_frame + i].copy_(self.v[:, start + i])

    def replay(self, source: int, frame: int) -> None:
        """Put the kept frame `source` in the place, and at the positions, of window frame `frame`."""
        ring = next((ring for ring, slot in self.window.items() if slot.frame == frame), None)
        if ring is None:
            return
        self.k[:, self.window_start + ring].copy_(self.replay_k[:, source])
        self.v[:, self.window_start + ring].copy_(self.replay_v[:, source])
        if self.raw is not None:
            self.raw[:, ring].copy_(self.replay_k[:, source])
        self.window[ring].position = None

    def snapshot(self) -> LayerSnapshot:
        """A copy on the CPU of all that is cached (what is staged for the current chunk is not)."""
        slots = [*self.anchor.values(), *self.pinned.values(), *self.window.values()]
        rings = [*self.pinned, *self.window]
        order = [self._anchor_index(s) for s in self.anchor] + [self.window_start + r for r in rings]
        tensors = {"keys": _to_cpu(self.k, order), "values": _to_cpu(self.v, order)}
        if self.raw is not None:
            tensors["raw"] = _to_cpu(self.raw, rings)
        if self.blend_k is not None:
            every = range(self.layer.anchor_frames)
            tensors |= {"blend_keys": _to_cpu(self.blend_k, every), "blend_values": _to_cpu(self.blend_v, every)}
        if self.replay_k is not None:
            every = range(self.layer.replay_frames)
            tensors |= {"replay_keys": _to_cpu(self.replay_k, every), "replay_values": _to_cpu(self.replay_v, every)}
        return LayerSnapshot(
            anchor_slots=tuple(self.anchor),
            ring_slots=tuple(rings),
            frames=tuple(entry.frame for entry in slots),
            positions=tuple(entry.position for entry in slots),
            tensors=tensors,
            pinned=len(self.pinned),
        )

    def restore(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot of a layer with the same plan; the snapshot stays as it is.

        Every frame returns to its own slot: the order of the keys is part of the bits of a sum.
        """
        self._check(saved)
        entries = [_Slot(frame, position) for frame, position in zip(saved.frames, saved.positions, strict=True)]
        anchors = len(saved.anchor_slots)
        self.anchor = dict(zip(saved.anchor_slots, entries[:anchors], strict=True))
        ring = list(zip(saved.ring_slots, entries[anchors:], strict=True))
        self.pinned, self.window = OrderedDict(ring[: saved.pinned]), OrderedDict(ring[saved.pinned :])
        order = [self._anchor_index(s) for s in self.anchor] + [self.window_start + r for r in saved.ring_slots]
        self.k[:, order] = saved.tensors["keys"].to(self.k)
        self.v[:, order] = saved.tensors["values"].to(self.v)
        if self.raw is not None:
            self.raw[:, list(saved.ring_slots)] = saved.tensors["raw"].to(self.raw)
        if self.blend_k is not None:
            self.blend_k.copy_(saved.tensors["blend_keys"])
            self.blend_v.copy_(saved.tensors["blend_values"])
        if self.replay_k is not None:
            self.replay_k.copy_(saved.tensors["replay_keys"])
            self.replay_v.copy_(saved.tensors["replay_values"])

    def _check(self, saved: LayerSnapshot) -> None:
        """ValueError unless a snapshot, which may come from any file, has just the slots and tensors of this layer."""
        frame = (self.plan.tokens, self.plan.width)
        kept, window = len(saved.frames), len(saved.ring_slots)
        shapes = {"keys": (self.plan.batch, kept, *frame), "values": (self.plan.batch, kept, *frame)}
        if self.raw is not None:
            shapes["raw"] = (self.plan.batch, window, *frame)
        if self.blend_k is not None:
            shapes |= dict.fromkeys(("blend_keys", "blend_values"), tuple(self.blend_k.shape))
        if self.replay_k is not None:
            shapes |= dict.fromkeys(("replay_keys", "replay_values"), tuple(self.replay_k.shape))
        slots_fit = (
            kept == len(saved.positions) == len(saved.anchor_slots) + window
            and set(saved.anchor_slots) == set(range(len(saved.anchor_slots)))
            and set(saved.ring_slots) == set(range(window))
            and len(saved.anchor_slots) <= self.layer.anchor_frames
            and saved.pinned == self.layer.pinned_frames
            and saved.ring_slots[: saved.pinned] == tuple(range(saved.pinned))
            and saved.pinned <= window <= self.layer.ring_frames
        )
        if not slots_fit or {name: tuple(t.shape) for name, t in saved.tensors.items()} != shapes:
            raise ValueError("the state's cache does not have the layout that its settings say: the file is damaged")


def _to_cpu(buffer: torch.Tensor, slots: Iterable[int]) -> torch.Tensor:
    """A copy of some slots [B, slots, P, width], made on the CPU frame by frame: nothing is gathered on the device."""
    slots = list(slots)
    out = torch.empty((buffer.shape[0], len(slots), *buffer.shape[2:]), dtype=buffer.dtype)
    for i, slot in enumerate(slots):
        out[:, i].copy_(buffer[:, slot])
    return out


def _runs(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers split into runs of neighbours."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


class KVCache:
    """All layers' buffers of one run, and the text keys and values of the current prompt."""

    def __init__(self, plan: CachePlan, heads: int, device: torch.device | str = "cpu") -> None:
        self.plan, self.heads, self.device = plan, heads, torch.device(device)
        self.layers = [LayerCache(plan, layer, self.device) for layer in plan.layers]
        self._text: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._text_key: object = None

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for keys and values (compare with `plan.kv_bytes`)."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def text_nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._text.values())

    @property
    def anchor_present(self) -> int:
        return max((len(layer.anchor) for layer in self.layers), default=0)

    @property
    def window_present(self) -> int:
        return max((len(layer.pinned) + len(layer.window) for layer in self.layers), default=0)

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values, made once for each `key` (the prompt and the weights' identity)."""
        if key != self._text_key:
            self._text.clear()
            self._text_key = key
        if layer not in self._text:
            self._text[layer] = make()
        return self._text[layer]

    def snapshot(self) -> tuple[LayerSnapshot, ...]:
        return tuple(layer.snapshot() for layer in self.layers)

    def restore(self, saved: tuple[LayerSnapshot, ...]) -> None:
        if len(saved) != len(self.layers):
            raise ValueError(f"the state holds {len(saved)} layers, the model has {len(self.layers)}")
        for layer, snapshot in zip(self.layers, saved, strict=True):
            layer.restore(snapshot)
