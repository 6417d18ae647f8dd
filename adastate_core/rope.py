"""Wan's 3-axis rotary embedding, and the time positions of cached and current frames.

A head of d channels is split into time, height and width parts of d - 4(d//6), 2(d//6) and 2(d//6) channels
(44, 42, 42 of 128); inside a part of width a, the adjacent channels (2j, 2j+1) turn by position * 10000^(-2j/a)
(Wan 2.1, modules/model.py; ComfyUI, comfy/ldm/flux/math.py). Angles are made in float64 from float32 positions,
whatever the model's dtype: in bfloat16, frames 300 and 301 would share one rotation.

How a rotation is held and applied is known here alone: `Rope.turn` gives an opaque Turn, `Rope.rotate` applies it. On the
CPU it is unit complex numbers, whose product is the fastest there; elsewhere cosines and sines in float32, since not every
device and compiler knows complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from .shots import NOTHING, time_of

THETA = 10000.0
# the most bytes of tables that a Rope keeps where nobody says otherwise
MOST_BYTES = 2**28
POSITION_MODES = ("packed", "fixed", "absolute")


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that carry time, height and width. ValueError unless `head_dim` is even and at least 6."""
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"a head of {head_dim} channels cannot carry three rotary axes; it needs an even number >= 6")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions: torch.Tensor, width: int) -> torch.Tensor:
    """[N] float32 positions to [N, width // 2] float64 angles."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.double()[:, None] * THETA**-exponent


@dataclass(frozen=True)
class Turn:
    """A rotation of frames of `tokens` tokens, made by Rope and applied by `Rope.rotate`. What `parts` are is its business:
    unit complex numbers [..., N, 1, head_dim / 2], or the cosines and signed sines [..., N, 1, head_dim] float32."""

    parts: tuple[torch.Tensor, ...] = field(repr=False)
    tokens: int

    def frames(self, first: int, end: int) -> Turn:
        """The rotation of frames `first`..`end` - 1 alone."""
        return Turn(tuple(part[first * self.tokens : end * self.tokens] for part in self.parts), self.tokens)

    @staticmethod
    def joined(turns: Sequence[Turn]) -> Turn:
        """The rotation of the frames of several turns of one Rope, one after another."""
        return Turn(
            tuple(torch.cat(parts) for parts in zip(*(turn.parts for turn in turns), strict=True)), turns[0].tokens
        )


def _units(angles: torch.Tensor) -> torch.Tensor:
    """Float64 angles to unit complex numbers (complex64)."""
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _pairs(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit complex numbers [..., c] as cosines and sines [..., 2c] of adjacent channels, each first one's sine negated."""
    return units.real.repeat_interleave(2, -1), torch.stack([-units.imag, units.imag], -1).flatten(-2)


def table_bytes(channels: int, tokens: int, real_pairs: bool) -> int:
    """Bytes of the table that turns `channels` of a head at so many tokens."""
    return tokens * channels * (8 if real_pairs else 4)


def space_bytes(head_dim: int, tokens: int, real_pairs: bool) -> int:
    """Bytes of what a Rope of frames of `tokens` keeps beside its tables: the parts that all frames share."""
    return table_bytes(sum(axis_widths(head_dim)[1:]), tokens, real_pairs)


class Rope:
    """Rotations of the tokens of frames of one size, on one device.

    `rotate` turns [B, frames * rows * columns, heads, head_dim] in any float dtype; computed in float32, cast back. A table
    is made on the first of its uses and kept as long as all that are kept take at most `most_bytes`; those used longest ago
    go first, and one that is larger than that alone is made, used and not kept.
    """

    def __init__(
        self,
        head_dim: int,
        rows: int,
        columns: int,
        device: torch.device | str = "cpu",
        real_pairs: bool | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """`real_pairs`: no complex numbers; None: on every device but the CPU."""
        self.time_width, height_width, width_width = axis_widths(head_dim)
        self.rows, self.columns, self.device = rows, columns, torch.device(device)
        self.real_pairs = self.device.type != "cpu" if real_pairs is None else real_pairs
        self.most_bytes = most_bytes
        row_angles = _angles(torch.arange(rows, dtype=torch.float32), height_width)
        column_angles = _angles(torch.arange(columns, dtype=torch.float32), width_width)
        self._space = torch.cat(
            [
                row_angles[:, None].expand(rows, columns, -1),
                column_angles[None].expand(rows, columns, -1),
            ],
            dim=-1,
        ).reshape(rows * columns, -1)
        # the newest used last, and their bytes
        self._kept: dict[Hashable, tuple[torch.Tensor, ...]] = {}
        self._bytes = 0
        # what every table of raw keys has of height and width: [P, 1, channels], parts as in a Turn
        self._space_parts: tuple[torch.Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device of what is kept now; at most `most_bytes` and what `space_bytes` says."""
        return self._bytes + sum(part.nbytes for part in self._space_parts or ())

    def bytes_of(self, frames: int) -> int:
        """Bytes of a table that turns so many frames."""
        return table_bytes(self.time_width + 2 * self._space.shape[-1], frames * len(self._space), self.real_pairs)

    def turn(self, from_positions: Sequence[float | None] | None, to_positions: Sequence[float | None]) -> Turn:
        """What brings keys of frames at `from_positions` to `to_positions`, frame by frame; None is raw, on either side, and
        `from_positions` None means that all are raw. ValueError if the two differ in length."""
        came = [None] * len(to_positions) if from_positions is None else from_positions
        came, to = (tuple(None if p is None else float(p) for p in row) for row in (came, to_positions))
        if len(came) != len(to):
            raise ValueError(f"{len(came)} positions to come from and {len(to)} to go to; each frame has one of both")

        def make() -> tuple[torch.Tensor, ...]:
            if all(position is None for position in came):
                return self._from_raw(to)
            table = self._units(to) * self._units(came).conj().resolve_conj()
            return self._parts(table[:, None])

        return Turn(self._once((came, to), self.bytes_of(len(to)), make), len(self._space))

    def _from_raw(self, positions: tuple[float | None, ...]) -> tuple[torch.Tensor, ...]:
        """The parts of a turn of raw keys. Time is the same for all tokens of a frame, height and width for all frames, so
        only one row a frame is computed; the rest is put together on the device."""
        times = _units(_angles(torch.tensor([p or 0.0 for p in positions], dtype=torch.float32), self.time_width))
        raw = [i for i, p in enumerate(positions) if p is None]
        times[raw] = 1
        made = []
        for part, (time, space) in enumerate(zip(self._parts(times), self._space_once(), strict=True)):
            frames, tokens, split = len(positions), len(space), time.shape[-1]
            out = space.new_empty((frames, tokens, 1, split + space.shape[-1]))
            out[..., :split] = time[:, None, None]
            out[..., split:] = space
            for i in raw:
                out[i, ..., split:] = 1 - part  # of unit numbers 1; of cosines 1 and of sines 0
            made.append(out.flatten(0, 1))
        return tuple(made)

    def _space_once(self) -> tuple[torch.Tensor, ...]:
        if self._space_parts is None:
            self._space_parts = self._parts(_units(self._space)[:, None])
        return self._space_parts

    def _parts(self, units: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Unit complex numbers as a Turn has them, on the device."""
        return tuple(part.to(self.device) for part in (_pairs(units) if self.real_pairs else (units,)))

    def turn_tokens(self, positions: Sequence[float], which: torch.Tensor, tokens: torch.Tensor) -> Turn:
        """What brings raw keys of single tokens to the time `positions`[`which`], in the place of the frame that `tokens`
        says (row-major); token 0 turns by time alone. Both [..., N] int64; on the device, nothing waits for it."""

        def time() -> tuple[torch.Tensor, ...]:
            return self._parts(_units(_angles(torch.tensor(positions, dtype=torch.float32), self.time_width))[:, None])

        key = ("time", positions if isinstance(positions, range) else tuple(positions))
        times = self._once(key, table_bytes(self.time_width, len(positions), self.real_pairs), time)
        space = self._space_once()
        which, tokens = which.to(self.device), tokens.to(self.device)
        return Turn(tuple(torch.cat([t[which], s[tokens]], -1) for t, s in zip(times, space, strict=True)), 1)

    def _units(self, positions: Sequence[float | None]) -> torch.Tensor:
        """Unit complex numbers [frames * rows * columns, head_dim // 2] (complex64) on the CPU for frames at `positions`."""
        time = _angles(torch.tensor([p or 0.0 for p in positions], dtype=torch.float32), self.time_width)
        tokens = len(self._space)
        shape = (len(time), tokens, -1)
        table = _units(torch.cat([time[:, None].expand(shape), self._space[None].expand(shape)], dim=-1))
        for i, position in enumerate(positions):
            if position is None:
                table[i] = 1
        return table.flatten(0, 1)

    def _once(self, key: Hashable, size: int, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The parts of a table of `size` bytes, made on the first of its uses and kept as far as `most_bytes` goes."""
        parts = self._kept.pop(key, None)
        if parts is None:
            while self._kept and self._bytes + size > self.most_bytes:
                self._bytes -= sum(part.nbytes for part in self._kept.pop(next(iter(self._kept))))
            parts = make()
            if size > self.most_bytes:
                return parts
            self._bytes += size
        self._kept[key] = parts
        return parts

    @staticmethod
    def rotate(x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """`x` [B, N, heads, head_dim] turned by a `turn` of its N tokens; same shape and dtype."""
        return Rope.turned(x, turn).to(x.dtype)

    @staticmethod
    def turned(x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """The same in float32, for whoever rounds it while copying it to its place."""
        if len(turn.parts) == 1:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn.parts[0]).flatten(-2)
        cosines, sines = turn.parts
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x * cosines).addcmul_(swapped, sines)


@dataclass(frozen=True)
class Layout:
    """Time positions of every frame in one pass, by mode (docs/semantics.md, Positions).

    `anchor_capacity` A, `window_capacity` W and `state_frames` S are the rollout's numbers, `anchor_present` a and
    `window_present` w what its fullest layer holds, `first_frame` f the index of the pass's first content frame.
    With `state_after_past` the state that is being denoised stands between the past and the content; `jump` puts the
    content that much later than it belongs, for a cut. Of passes that read less than is cached (schedules/rolling.py),
    `reads_window` is how many of the newest window frames they read (None: all), `reads_anchor` whether the anchor, and
    `anchor_at` the position of its slot 0 where that is no matter of the mode. `again`: the pass makes so many of the newest cached
    frames once more, and stands where they do (absorption/sensitivity.py). `shots` are the first frames of all shots up to
    the pass's own, `pin` the cached frames that one of them keeps in the window (shots.py).
    """

    mode: str
    anchor_capacity: int
    window_capacity: int
    state_frames: int
    anchor_present: int
    window_present: int
    first_frame: int
    state_after_past: bool = False
    jump: int = 0
    reads_window: int | None = None
    reads_anchor: bool = True
    anchor_at: int | None = None
    again: int = 0
    shots: tuple[int, ...] = ()
    pin: range = NOTHING

    def at(self, frame: int) -> int:
        """Where a frame stands in `absolute`: at its own index, and further on for every shot that began by then."""
        return time_of(frame, self.shots)

    @property
    def past_end(self) -> int:
        """The position that follows the newest frame of the past."""
        if self.mode == "fixed":
            return self.anchor_capacity + self.window_capacity
        if self.mode == "packed":
            return max(self.anchor_present, self.state_frames) + self.window_present
        return self.at(self.first_frame)

    @property
    def content(self) -> int:
        """Position of the first content frame of the pass; the others follow one by one."""
        return self.past_end - self.again + (self.state_frames if self.state_after_past else 0) + self.jump

    def window(self, frame: int) -> int:
        """Position of a window frame: as far before the end of the past as it lies in the video."""
        if self.mode == "absolute":
            return self.at(frame)
        return self.past_end - (self.first_frame - frame)

    def pinned(self, slot: int, frame: int) -> int:
        """Position of a window frame that stays while others leave: where it lies in the video, but never in front of the
        window's own first position (`slot` counts pinned frames)."""
        if self.mode == "absolute":
            return self.at(frame)
        first = self.anchor_capacity if self.mode == "fixed" else max(self.anchor_present, self.state_frames)
        return max(self.window(frame), first + slot)

    def anchor(self, slot: int, frame: int) -> int:
        """Position of an anchor slot that holds video frame `frame` (the frame's own in `absolute`, else the slot)."""
        if self.anchor_at is not None:
            return self.anchor_at + slot
        return self.at(frame) if self.mode == "absolute" else slot

    def ring(self, frames: Sequence[int], stay: int = 0) -> list[int]:
        """Positions of cached frames that are no anchor's, oldest first; the first `stay` of them never leave."""
        held = [i for i, frame in enumerate(frames) if i < stay or frame in self.pin]
        pinned = {i: self.pinned(slot, frames[i]) for slot, i in enumerate(held)}
        return [pinned[i] if i in pinned else self.window(frame) for i, frame in enumerate(frames)]

    def current(self, content_frames: int) -> list[int]:
        """Positions of the frames being denoised: the state at 0..S-1 or behind the past, then the content."""
        state = self.past_end - self.again if self.state_after_past else 0
        content = range(self.content, self.content + content_frames)
        if self.mode == "absolute":  # frames that are made again may lie on both sides of a shot's beginning
            content = [self.at(self.first_frame + i) + self.content - self.past_end for i in range(content_frames)]
        return [*range(state, state + self.state_frames), *content]
