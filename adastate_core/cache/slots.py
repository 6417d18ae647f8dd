"""Which frame lies in which slot of a layer's cache, how frames enter and leave, and how attention reads them.

Slots are numbered as attention reads them, in latent frames:

    [ anchor, filled from the right | current: state, content | window, a ring filled from the left ]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch

from ..anchors import Anchor, Source
from ..rope import Layout, Rope
from ..shots import NOTHING
from .byte_plan import CachePlan, LayerSpec
from .host_copies import Frames, HostCopies

# called with (frame, position, key, value) of a frame that is to leave, and with the frames that a shot pins; position None means
# that the key is raw. It copies what it wants to keep. It returns a function, which is called when the frame has left.
Receiver = Callable[[int, float | None, torch.Tensor, torch.Tensor, range], Callable[[], None]]


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

    def fill(
        self,
        anchor: Anchor,
        first_frame: int,
        content_frames: int,
        state_frames: int,
        pin: range = NOTHING,
        keeps: bool = True,
    ) -> None:
        """Content that a pass staged enters, the oldest leave, then the policy sets the anchor. The frames of `pin` do not leave
        (shots.py), if the layer `keeps` them."""
        ...


class LayerSlots(ABC):
    """The books of one layer: which frame lies in which slot. Mutable, private to one run. A subclass holds keys and values.

    `k` and `v` [B, slots, P, width] are the buffers that attention reads.
    """

    k: torch.Tensor
    v: torch.Tensor
    # whether the layer has to `see` the queries of a pass before the pass reads it
    selects: ClassVar[bool] = False

    def __init__(
        self, plan: CachePlan, layer: LayerSpec, device: torch.device, room: LayerSpec, old: LayerSlots | None = None
    ) -> None:
        """`layer` says what is kept. `room` is the same spec with the window that buffers are allocated for; it may be smaller as
        long as there are no more frames. `old`: the layer that this one takes the place of, whose buffers of the first frames
        and of an anchor that blends are taken over."""
        self.plan, self.layer, self.device, self.room = plan, layer, device, room
        # called for every frame that is to leave the window
        self.on_evict: Receiver | None = None
        # of the last pass; whoever turns keys between two passes asks it
        self._rope: Rope | None = None
        self.anchor: dict[int, Slot] = {}
        self.pinned: OrderedDict[int, Slot] = OrderedDict()  # ring slot -> frame; always the first ring slots
        self.window: OrderedDict[int, Slot] = OrderedDict()  # ring slot -> frame, oldest first
        # [keys or values, frame, B, P, width]: the first frames, raw, for an anchor that puts them into the window again
        kept = (2, layer.replay_frames, plan.batch, plan.tokens, plan.width)
        self.first_frames = None if old is None else old.first_frames
        if old is None and layer.replay_frames:
            self.first_frames = torch.zeros(kept, dtype=plan.dtype, device=device)

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
        held = self.pinned | self.window
        at = layout.ring([e.frame for e in held.values()], stay=len(self.pinned))
        return anchor, {ring: (e, to) for (ring, e), to in zip(held.items(), at, strict=True)}

    def held_frames(self, current_frames: int) -> list[tuple[str, int]]:
        """What `read` gives, frame by frame: ("anchor", slot), ("current", i) or ("window", video frame)."""
        anchor = [("anchor", slot) for slot in range(len(self.anchor) - 1, -1, -1)]
        current = [("current", i) for i in range(current_frames)]
        window = self.pinned | self.window
        return anchor + current + [("window", window[ring].frame) for ring in sorted(window)]

    def parts(
        self, current_frames: int, local_window: int, pinned: int, hidden: int = 0
    ) -> tuple[list[slice], list[slice]]:
        """(local, history) as runs of buffer slots: local are anchor, current, the first `pinned` frames that the
        window still holds from the beginning of the video, and its newest `local_window` frames. The window's newest `hidden`
        frames are in neither, as if they had not been made."""
        start, ordered = self.current_start, list(self.window.items())[: max(0, len(self.window) - hidden)]
        newest = {ring for ring, _ in ordered[max(0, len(ordered) - local_window) :]}
        first = self.first_of(pinned) & {ring for ring, _ in ordered}
        local = [*(self.anchor_index(slot) for slot in self.anchor), *range(start, start + current_frames)]
        local += [self.window_start + ring for ring in (*self.pinned, *(newest | first))]
        history = [self.window_start + ring for ring, _ in ordered if ring not in newest | first]
        return tuple([slice(run[0], run[-1] + 1) for run in runs(sorted(part))] for part in (local, history))

    def first_of(self, frames: int) -> set[int]:
        """Ring slots of those of the video's first `frames` that are still in the window; what only a shot keeps there has left."""
        newest = max((slot.frame for slot in self.window.values()), default=0)
        left = newest - self.layer.window_frames
        return {ring for ring, slot in self.window.items() if left < slot.frame < frames}

    def resized(self, layer: LayerSpec, room: LayerSpec) -> LayerSlots:
        """The same layer with buffers of another size, beside this one, which stays as it is. Nothing may still be on its way to or
        from host memory (Workspace.give_up).

        If `layer` is this one's, every frame keeps its slot. A smaller `layer` keeps what `kept_of` says, in the order of time.
        """
        new, same = self._like(layer, room), layer == self.layer
        new.on_evict = self.on_evict
        ordered = list((self.pinned | self.window).items())
        kept = range(len(ordered)) if same else layer.kept_of(len(ordered))
        for i, (ring, entry) in enumerate(ordered[index] for index in kept):
            to = ring if same else i
            new._carry(self, ring, to)
            held = new.pinned if i < layer.pinned_frames else new.window
            held[to] = replace(entry)
        for slot, entry in self.anchor.items():
            new._carry_anchor(self, slot)
            new.anchor[slot] = replace(entry)
        return new

    def _like(self, layer: LayerSpec, room: LayerSpec) -> LayerSlots:
        """An empty layer of the same kind, which takes this one's place."""
        return type(self)(self.plan, layer, self.device, room, self)

    @abstractmethod
    def _carry(self, old: LayerSlots, ring: int, to: int) -> None:
        """Copy all that another layer of this kind holds of its ring slot `ring`, as it is, to this one's slot `to`."""

    @abstractmethod
    def _carry_anchor(self, old: LayerSlots, slot: int) -> None:
        """Copy what another layer of this kind holds of an anchor slot, as it is. Buffers that were taken over are left alone."""

    def scratch(self, blends: bool = False) -> torch.Tensor | None:
        """The memory that a draft needs beside the buffers. It fits all layers of the plan. None if a draft needs nothing.
        `blends`: the policy blends an anchor, even where no float32 frames are kept for it."""
        if not (self.layer.blend_frames or blends and self.layer.anchor_frames):
            return None
        return torch.empty((2, 2, *self._frame_shape), dtype=torch.float32, device=self.device)

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        return self.plan.batch, self.plan.tokens, self.plan.width

    def take_books(self, anchor: dict[int, Slot], pinned: dict[int, Slot], window: dict[int, Slot]) -> None:
        """Which frame lies where from now on."""
        self.anchor, self.pinned, self.window = anchor, pinned, window

    def window_books(self) -> tuple[Any, ...]:
        """Which frame of the window lies where, for `take_window`."""
        return (self.window,)

    def take_window(self, window: OrderedDict[int, Slot]) -> None:
        """Which frame of the window lies where from now on; the anchor and pinned frames stay."""
        self.window = window

    def beside_window(self, anchor_too: bool) -> list[torch.Tensor]:
        """What committing frames again changes beside the window, as views: the anchor's buffers if it changes."""
        if not anchor_too:
            return []
        return self._anchor_buffers() + ([] if self.first_frames is None else [self.first_frames])

    def turn_back(self, ring: int, key: torch.Tensor, position: float | None) -> None:
        """Put a key [B, P, width] that was turned in place back into its ring slot, as it was."""
        self.k[:, self.window_start + ring].copy_(key)
        (self.pinned if ring in self.pinned else self.window)[ring].position = position

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

    def current_slots(self, frames: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where `write_current` puts keys and values of so many frames, each [1, frames * P, width]: views, whose strides do not
        depend on how many slots there are. None where it does more than to put them there, or for a batch."""
        return None

    def read(self, current_frames: int, layout: Layout | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of anchor, current and window, each [B, tokens, width]: views of the buffers.

        Only a pass of fewer than F content frames (the last one over given frames) has to copy, and one whose `layout` says
        that it reads less.
        """
        if layout is not None and layout.reads_window is not None:
            return self._read_less(current_frames, layout)
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

    def _read_less(self, current_frames: int, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """`read` of the anchor, if it is read, of the current and of the newest window frames: a copy."""
        newest = sorted(list(self.window)[max(0, len(self.window) - layout.reads_window) :])
        slots = [*range(self.current_start, self.current_start + current_frames)]
        slots += [self.window_start + ring for ring in newest]
        places = [slice(run[0], run[-1] + 1) for run in runs(slots)]
        keys, values = ([t[:, place] for place in places] for t in (self.k, self.v))
        if self.anchor and layout.reads_anchor:
            anchor = slice(self.layer.anchor_frames - len(self.anchor), self.layer.anchor_frames)
            keys, values = [self.anchor_keys(anchor), *keys], [self.v[:, anchor], *values]
        return torch.cat(keys, 1).flatten(1, 2), torch.cat(values, 1).flatten(1, 2)

    def anchor_keys(self, slots: slice) -> torch.Tensor:
        """Keys [B, n, P, width] of all held anchor slots, at their positions."""
        return self.k[:, slots]

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
    def snapshot(self, copies: HostCopies) -> LayerSnapshot:
        """A copy on the CPU of all that is cached (what is staged for the current chunk is not), once `copies` were waited for."""

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
    def _anchor_buffers(self) -> list[torch.Tensor]:
        """All that is held of the anchor's slots, as views."""

    @abstractmethod
    def write_anchor(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a raw key and value [B, P, width] to an anchor slot."""

    @abstractmethod
    def blend(self, slot: int, source: Source, weight: float, scratch: torch.Tensor) -> None:
        """Move an anchor slot by `weight` towards a raw key and value, in float32; the result goes to `scratch`, not the slot."""

    @abstractmethod
    def write_blended(self, slot: int, scratch: torch.Tensor) -> None:
        """Write what `blend` made to the anchor slot."""

    def blended_position(self, slot: Slot) -> float | None:
        """Where the key of an anchor slot is rotated to once it was blended: raw where raw frames are kept for that."""
        return None if self.layer.blend_frames else slot.position

    def _blend_in_place(
        self, slot: int, held: Sequence[torch.Tensor], source: Source, weight: float, scratch: torch.Tensor
    ) -> None:
        """`blend` of an anchor slot of which no raw float32 frame is kept: towards the new key where the `held` one is rotated to.
        Rotations and blends may change places."""
        position = self.anchor[slot].position
        key, value = source()
        if position is not None:
            rows = key.unflatten(-1, (self.plan.heads, -1))
            key = Rope.turned(rows, self._rope.turn([None], [position])).flatten(-2)
        for kept, one, (raw, out) in zip(held, (key, value), scratch, strict=True):
            torch.lerp(kept.float(), raw.copy_(one), weight, out=out)

    def hand_over(self, ring: int, receiver: Receiver) -> Callable[[], None]:
        """Show a window frame to `receiver`; what that returned."""
        slot = self.window[ring]
        key, value = (t.to(self.plan.dtype) for t in self.shown(ring))
        return receiver(slot.frame, self.shown_position(slot), key, value, NOTHING)

    def _snapshot_of(self, parts: dict[str, Frames], copies: HostCopies) -> LayerSnapshot:
        """A snapshot whose tensors are those `parts`."""
        slots = [*self.anchor.values(), *self.pinned.values(), *self.window.values()]
        if self.first_frames is not None:
            for name, kept in zip(("replay_keys", "replay_values"), self.first_frames, strict=True):
                parts = parts | {name: (kept.transpose(0, 1), None)}
        return LayerSnapshot(
            anchor_slots=tuple(self.anchor),
            ring_slots=(*self.pinned, *self.window),
            frames=tuple(entry.frame for entry in slots),
            positions=tuple(entry.position for entry in slots),
            tensors=copies.take(parts),
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
            and saved.pinned <= window <= self.room.ring_frames
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


@dataclass(frozen=True, eq=False)
class Turned:
    """A write that puts rotated keys, in float32 or rounded, in their place, and notes in the books where they are rotated to.
    `in_place`: the ring slots of which it overwrites keys that are nowhere else."""

    target: torch.Tensor
    turned: torch.Tensor
    moved: list[tuple[Slot, float]]
    in_place: Sequence[int] = ()

    def __call__(self) -> None:
        self.target.copy_(self.turned)
        for slot, position in self.moved:
            slot.position = position


def runs(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers split into runs of neighbours."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def blocks(run: list[int], to: Sequence[float], most: int) -> list[slice]:
    """A run of frames that go to positions `to`, in blocks of at most `most`, as slices of it.

    A block's frames follow one another in time. In a ring the oldest frame begins one, so chunk after chunk the blocks have
    the same positions, and their tables are found again.
    """
    starts = [0]
    for i in range(1, len(run)):
        if i - starts[-1] == most or abs(to[i] - to[i - 1]) != 1:
            starts.append(i)
    return [slice(low, high) for low, high in pairwise([*starts, len(run)])] if run else []
