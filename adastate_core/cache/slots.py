"""Which frame lies in which slot of a layer's cache, how frames enter and leave, and how attention reads them.

Slots are numbered as attention reads them, in latent frames:

    [ anchor, filled from the right | current: state, content | window, a ring filled from the left ]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch

from ..anchors import Anchor, Source
from ..rope import Layout, Rope
from .byte_plan import CachePlan, LayerSpec

# called with (frame, position, key, value) of a frame that is to leave; position None means that the key is raw. It copies what it
# wants to keep. It returns a function, which is called when the frame has left.
Receiver = Callable[[int, float | None, torch.Tensor, torch.Tensor], Callable[[], None]]


@dataclass
class Slot:
    """Which video frame a slot holds, and the position to which its stored key is rotated (None: raw)."""

    frame: int
    position: float | None = None


@dataclass(frozen=True)
class LayerSnapshot:
    """An immutable copy of what one layer has cached, on the CPU.

    The order is: the anchor's frames (`anchor_slots`), then the window's frames, oldest first (`ring_slots`; the first
    `pinned` of them never leave). `frames` are the video frame indices of all these. `positions` are those to which
    each key is rotated (None: raw). `tensors` holds `keys` and `values` [B, frames, P, width] and, if the plan has
    them, `raw` [B, w, P, width], `blend_keys` and `blend_values`. A cache in 8 bits also has `scales` [B, frames, 2,
    heads] for keys and values; an anchor that blends is then only in the blend tensors. `replay_keys` and
    `replay_values` [B, r, P, width] are the raw first frames of an anchor that puts them into the window again.
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


class Draft(Protocol):
    """What a commit will do to one layer. Making the draft does not change the layer. `writes` are run in order, and each may be
    run again. When all have run, each of `left` is called."""

    @property
    def writes(self) -> list[Callable[[], object]]: ...

    left: list[Callable[[], None]]

    def fill(self, anchor: Anchor, first_frame: int, content_frames: int, state_frames: int) -> None:
        """Content that a pass staged enters, the oldest leave, then the policy sets the anchor."""
        ...


class LayerSlots(ABC):
    """The books of one layer: which frame lies in which slot. Mutable, private to one run. A subclass holds keys and values.

    `k` and `v` [B, slots, P, width] are the buffers that attention reads.
    """

    k: torch.Tensor
    v: torch.Tensor
    # whether the layer has to `see` the queries of a pass before the pass reads it
    selects: ClassVar[bool] = False

    def __init__(self, plan: CachePlan, layer: LayerSpec, device: torch.device) -> None:
        self.plan, self.layer, self.device = plan, layer, device
        # called for every frame that is to leave the window
        self.on_evict: Receiver | None = None
        self.anchor: dict[int, Slot] = {}
        self.pinned: OrderedDict[int, Slot] = OrderedDict()  # ring slot -> frame; always the first ring slots
        self.window: OrderedDict[int, Slot] = OrderedDict()  # ring slot -> frame, oldest first
        # [keys or values, frame, B, P, width]: the first frames, raw, for an anchor that puts them into the window again
        kept = (2, layer.replay_frames, plan.batch, plan.tokens, plan.width)
        self.first_frames = torch.zeros(kept, dtype=plan.dtype, device=device) if layer.replay_frames else None

    @property
    def current_start(self) -> int:
        return self.layer.anchor_frames

    @property
    def window_start(self) -> int:
        return self.layer.anchor_frames + self.plan.current_frames

    @property
    def held(self) -> int:
        """Frames in the ring."""
        return len(self.pinned) + len(self.window)

    def anchor_index(self, slot: int) -> int:
        """The buffer slot of an anchor slot."""
        return self.layer.anchor_frames - 1 - slot

    def wanted(self, layout: Layout) -> tuple[dict[int, tuple[Slot, float]], dict[int, tuple[Slot, float]]]:
        """The position of every held frame in `layout`: the anchor's by buffer slot, the ring's by ring slot."""
        anchor = {self.anchor_index(slot): (e, layout.anchor(slot, e.frame)) for slot, e in self.anchor.items()}
        ring = {ring: (e, layout.pinned(i, e.frame)) for i, (ring, e) in enumerate(self.pinned.items())}
        ring |= {ring: (e, layout.window(e.frame)) for ring, e in self.window.items()}
        return anchor, ring

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
        local = [*(self.anchor_index(slot) for slot in self.anchor), *range(start, start + current_frames)]
        local += [self.window_start + ring for ring in (*self.pinned, *(newest | first))]
        history = [self.window_start + ring for ring, _ in ordered if ring not in newest | first]
        return tuple([slice(run[0], run[-1] + 1) for run in runs(sorted(part))] for part in (local, history))

    def kept_by(self, layer: LayerSpec) -> list[tuple[int, Slot]]:
        """Ring slots and frames that a smaller plan keeps, oldest first: the oldest `pinned_frames` and the newest frames."""
        ordered = list((self.pinned | self.window).items())
        newest = ordered[max(layer.pinned_frames, len(ordered) - layer.window_frames) :]
        return ordered[: layer.pinned_frames] + newest

    def scratch(self) -> torch.Tensor | None:
        """The memory that a draft needs beside the buffers. It fits all layers of the plan. None if a draft needs nothing."""
        if not self.layer.blend_frames:
            return None
        return torch.empty((2, 2, *self._frame_shape), dtype=torch.float32, device=self.device)

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        return self.plan.batch, self.plan.tokens, self.plan.width

    def take_books(self, anchor: dict[int, Slot], pinned: dict[int, Slot], window: dict[int, Slot]) -> None:
        """Which frame lies where from now on."""
        self.anchor, self.pinned, self.window = anchor, pinned, window

    def flush(self, keep: int) -> None:
        """Forget the window but for its `keep` newest frames; the anchor and pinned frames stay."""
        newest = list(self.window.items())[max(0, len(self.window) - keep) :]
        taken = [self._take(ring) for ring, _ in newest]
        self.window.clear()
        for i, (_, slot) in enumerate(newest):
            ring = len(self.pinned) + i
            self._place(ring, taken[i])
            self.window[ring] = slot

    def write_first(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the raw key and value [B, P, width] of the video's frame `index` for a replay."""
        for kept, one in zip(self.first_frames, (key, value), strict=True):
            kept[index].copy_(one)

    def first_frame(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw key and value [B, P, width] that `write_first` kept."""
        return self.first_frames[0, index], self.first_frames[1, index]

    def write_current(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stage the pass's own rotated keys and values [B, n * P, width]; n <= S + F frames."""
        frames = keys.shape[1] // self.plan.tokens
        start = self.current_start
        self.k[:, start : start + frames].copy_(keys.unflatten(1, (frames, -1)))
        self.v[:, start : start + frames].copy_(values.unflatten(1, (frames, -1)))

    def read(self, current_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of anchor, current and window, each [B, tokens, width]: views of the buffers.

        Only a pass of fewer than F content frames (the last one over given frames) has to copy.
        """
        low = self.layer.anchor_frames - len(self.anchor)
        high = self.current_start + current_frames
        held = self.held
        if held and high < self.window_start:
            end = self.window_start + held
            pieces = [(t[:, low:high], t[:, self.window_start : end]) for t in (self.k, self.v)]
            keys, values = (torch.cat(parts, dim=1).flatten(1, 2) for parts in pieces)
            return keys, values
        high = self.window_start + held if held else high
        return self.k[:, low:high].flatten(1, 2), self.v[:, low:high].flatten(1, 2)

    def read_slots(self, slots: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run of buffer slots, each [B, tokens, width]: views."""
        return self.k[:, slots].flatten(1, 2), self.v[:, slots].flatten(1, 2)

    @abstractmethod
    def draft(self, scratch: torch.Tensor | None) -> Draft:
        """An empty draft of a commit; `scratch` is what `scratch` gave."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes really allocated, by the plan's names."""

    @abstractmethod
    def turns(self, layout: Layout, rope: Rope, heads: int) -> Iterator[Callable[[], None]]:
        """Writes that bring every cached key to its position in `layout`, one after another; only where it changed."""

    @abstractmethod
    def keep_raw_current(self, keys: torch.Tensor) -> None:
        """Stage the un-rotated keys [B, n * P, width] to be cached. Called after a clean pass has attended."""

    @abstractmethod
    def snapshot(self) -> LayerSnapshot:
        """A copy on the CPU of all that is cached (what is staged for the current chunk is not)."""

    @abstractmethod
    def restore(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot of a layer with the same spec; the snapshot stays as it is. ValueError if it does not fit."""

    @abstractmethod
    def staged(self, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw key and value [B, P, width] of a frame that a kept pass staged, state frames first."""

    def as_stored(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """What `leaving` would give of a frame once it had been entered."""
        return source()

    @abstractmethod
    def leaving(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw key and value [B, P, width] of a ring slot."""

    @abstractmethod
    def shown(self, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, P, width] of a ring slot, for a receiver that remembers it. The key is at `shown_position`."""

    def shown_position(self, slot: Slot) -> float | None:
        """Where the key that `shown` gives of this slot is rotated to (None: raw)."""
        return slot.position

    @abstractmethod
    def enter(self, ring: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a raw key and value [B, P, width] to a ring slot."""

    @abstractmethod
    def _take(self, ring: int) -> list[torch.Tensor]:
        """A copy of all that is held of a ring slot, as it is."""

    @abstractmethod
    def _place(self, ring: int, taken: list[torch.Tensor]) -> None:
        """Put what `_take` took into a ring slot."""

    @abstractmethod
    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a raw key and value [B, P, width] to an anchor slot."""

    @abstractmethod
    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        """Move a float32 anchor slot by `weight` towards a raw key and value. The result goes to `scratch`, not to the slot."""

    @abstractmethod
    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        """Write what `blend` made to the anchor slot."""

    def hand_over(self, ring: int, receiver: Receiver) -> Callable[[], None]:
        """Show a window frame to `receiver`; what that returned."""
        slot = self.window[ring]
        key, value = (t.to(self.plan.dtype) for t in self.shown(ring))
        return receiver(slot.frame, self.shown_position(slot), key, value)

    def _snapshot_of(self, tensors: dict[str, torch.Tensor]) -> LayerSnapshot:
        slots = [*self.anchor.values(), *self.pinned.values(), *self.window.values()]
        if self.first_frames is not None:
            frame = (self.plan.batch, self.plan.tokens, self.plan.width)
            for name, kept in zip(("replay_keys", "replay_values"), self.first_frames, strict=True):
                tensors = tensors | {name: to_cpu(kept.unbind(0), frame, kept.dtype)}
        return LayerSnapshot(
            anchor_slots=tuple(self.anchor),
            ring_slots=(*self.pinned, *self.window),
            frames=tuple(entry.frame for entry in slots),
            positions=tuple(entry.position for entry in slots),
            tensors=tensors,
            pinned=len(self.pinned),
        )

    def _adopt(self, saved: LayerSnapshot) -> None:
        """Take over a snapshot's books. Every frame returns to its own slot, because the order changes the bits of a sum."""
        entries = [Slot(frame, position) for frame, position in zip(saved.frames, saved.positions, strict=True)]
        anchors = len(saved.anchor_slots)
        self.anchor = dict(zip(saved.anchor_slots, entries[:anchors], strict=True))
        ring = list(zip(saved.ring_slots, entries[anchors:], strict=True))
        self.pinned, self.window = OrderedDict(ring[: saved.pinned]), OrderedDict(ring[saved.pinned :])
        if self.first_frames is not None:
            for name, kept in zip(("replay_keys", "replay_values"), self.first_frames, strict=True):
                kept.copy_(saved.tensors[name].transpose(0, 1))

    def _check(self, saved: LayerSnapshot, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError unless a snapshot has exactly this layer's slots and tensor `shapes`. It may come from any file."""
        kept, window = len(saved.frames), len(saved.ring_slots)
        if self.first_frames is not None:
            first = (self.plan.batch, self.layer.replay_frames, self.plan.tokens, self.plan.width)
            shapes = shapes | dict.fromkeys(("replay_keys", "replay_values"), first)
        slots_fit = (
            kept == len(saved.positions) == len(saved.anchor_slots) + window
            and set(saved.anchor_slots) == set(range(len(saved.anchor_slots)))
            and set(saved.ring_slots) == set(range(window))
            and len(saved.anchor_slots) <= self.layer.anchor_frames
            and saved.pinned == self.layer.pinned_frames
            and saved.ring_slots[: saved.pinned] == tuple(range(saved.pinned))
            and saved.pinned <= window <= self.layer.ring_frames
        )
        float32 = ("blend_keys", "blend_values", "scales")
        dtypes_fit = all(
            t.dtype == (torch.float32 if name in float32 else self.plan.dtype)
            or (self.plan.cache_dtype != "model" and name in ("keys", "values"))  # codes, which their layer looks at
            for name, t in saved.tensors.items()
        )
        if not (slots_fit and dtypes_fit) or {name: tuple(t.shape) for name, t in saved.tensors.items()} != shapes:
            raise ValueError("the state's cache does not have the layout that its settings say: the file is damaged")


def without_copies(saved: LayerSnapshot, blends: bool) -> LayerSnapshot:
    """Turn a snapshot of rotated buffers into one of stored frames. Window keys are raw if there is a raw copy. An anchor that
    `blends` loses its rounded copy."""
    tensors, anchors = dict(saved.tensors), len(saved.anchor_slots)
    positions = saved.positions
    if (raw := tensors.pop("raw", None)) is not None:
        tensors["keys"] = torch.cat([tensors["keys"][:, :anchors], raw], 1)
        positions = positions[:anchors] + (None,) * len(saved.ring_slots)
    if blends and tensors["keys"].shape[1] == len(saved.frames):
        positions = (None,) * anchors + positions[anchors:]
        tensors |= {name: tensors[name][:, anchors:] for name in ("keys", "values")}
    return replace(saved, tensors=tensors, positions=positions)


def with_copies(saved: LayerSnapshot, keep_raw: bool, blends: bool) -> LayerSnapshot:
    """The opposite of `without_copies`: stored frames, with the extra copies that buffers rotated in place hold."""
    tensors, window = dict(saved.tensors), len(saved.ring_slots)
    anchors, size = len(saved.anchor_slots), tensors["keys"].shape[1]
    if keep_raw and "raw" not in tensors and not any(p is not None for p in saved.positions[anchors:]):
        tensors["raw"] = tensors["keys"][:, size - window :]
    if blends and size == window != len(saved.frames):
        slots = [tensors["blend_keys"].shape[1] - 1 - slot for slot in saved.anchor_slots]
        for name in ("keys", "values"):
            rounded = tensors[f"blend_{name}"][:, slots].to(tensors[name].dtype)
            tensors[name] = torch.cat([rounded, tensors[name]], 1)
    return replace(saved, tensors=tensors)


def write_turned(target: torch.Tensor, turned: torch.Tensor, moved: list[tuple[Slot, float]]) -> None:
    """Put rotated keys in their place, and note in the books where they are rotated to."""
    target.copy_(turned)
    for slot, position in moved:
        slot.position = position


def to_cpu(frames: Iterable[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A copy of frames [B, ...] as [B, n, ...] on the CPU, made one by one: nothing is gathered on the device."""
    frames = list(frames)
    out = torch.empty((shape[0], len(frames), *shape[1:]), dtype=dtype)
    for i, frame in enumerate(frames):
        out[:, i].copy_(frame)
    return out


def runs(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers split into runs of neighbours."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return found
