"""Wan's 3-axis rotary embedding, and the time positions of cached and current frames.

A head of d channels is split into time, height and width parts of d - 4(d//6), 2(d//6) and 2(d//6) channels
(44, 42, 42 of 128); inside a part of width a, the adjacent channels (2j, 2j+1) turn by position * 10000^(-2j/a)
(Wan 2.1, modules/model.py; ComfyUI, comfy/ldm/flux/math.py). Angles are made in float64 from float32 positions,
whatever the model's dtype: in bfloat16, frames 300 and 301 would share one rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

THETA = 10000.0
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


class Rope:
    """Rotation tables for frames of one size, on one device.

    `rotate` turns [B, frames * rows * columns, heads, head_dim] in any float dtype; computed in float32, cast back.
    """

    def __init__(self, head_dim: int, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.time_width, height_width, width_width = axis_widths(head_dim)
        self.rows, self.columns, self.device = rows, columns, torch.device(device)
        row_angles = _angles(torch.arange(rows, dtype=torch.float32), height_width)
        column_angles = _angles(torch.arange(columns, dtype=torch.float32), width_width)
        self._space = torch.cat(
            [
                row_angles[:, None].expand(rows, columns, -1),
                column_angles[None].expand(rows, columns, -1),
            ],
            dim=-1,
        ).reshape(rows * columns, -1)
        self._tables: dict[tuple[float, ...], torch.Tensor] = {}

    def table(self, positions: Sequence[float]) -> torch.Tensor:
        """Unit complex numbers [frames * rows * columns, 1, head_dim // 2] (complex64) for frames at `positions`."""
        key = tuple(float(p) for p in positions)
        if key not in self._tables:
            if len(self._tables) >= 64:
                self._tables.clear()
            time = _angles(torch.tensor(key, dtype=torch.float32), self.time_width)
            tokens = self._space.shape[0]
            angles = torch.cat(
                [time[:, None].expand(-1, tokens, -1), self._space[None].expand(len(key), -1, -1)], dim=-1
            ).flatten(0, 1)
            table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
            self._tables[key] = table[:, None].to(self.device)
        return self._tables[key]

    def token_table(self, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Unit complex numbers [..., N, 1, head_dim // 2] (complex64) for single tokens: at time `positions` [..., N], in the
        place of the frame that `tokens` [..., N] (int64, row-major) says; token 0 turns by time alone."""
        # float64 is not everywhere
        where = torch.device("cpu") if self.device.type == "mps" else self.device
        time = _angles(positions.to(where).float().flatten(), self.time_width)
        angles = torch.cat([time, self._space.to(where)[tokens.to(where).flatten()]], -1)
        table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        return table.unflatten(0, positions.shape)[..., None, :].to(self.device)

    def undo(self, positions: Sequence[float | None]) -> torch.Tensor:
        """The table that turns keys at `positions` back to raw; a frame at None is raw already."""
        tables = [
            torch.ones_like(self.table([0.0])) if position is None else self.table([position]).conj()
            for position in positions
        ]
        return torch.cat(tables)

    @staticmethod
    def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, heads, head_dim] turned by a `table` for its N tokens; same shape and dtype."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Layout:
    """Time positions of every frame in one pass, by mode (design, section 4).

    `anchor_capacity` A, `window_capacity` W and `state_frames` S are the rollout's numbers, `anchor_present` a and
    `window_present` w what its fullest layer holds, `first_frame` f the index of the pass's first content frame.
    With `state_after_past` the state that is being denoised stands between the past and the content; `jump` puts the
    content that much later than it belongs, for a cut.
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

    @property
    def past_end(self) -> int:
        """The position that follows the newest frame of the past."""
        if self.mode == "fixed":
            return self.anchor_capacity + self.window_capacity
        if self.mode == "packed":
            return max(self.anchor_present, self.state_frames) + self.window_present
        return self.first_frame

    @property
    def content(self) -> int:
        """Position of the first content frame of the pass; the others follow one by one."""
        return self.past_end + (self.state_frames if self.state_after_past else 0) + self.jump

    def window(self, frame: int) -> int:
        """Position of a window frame: as far before the end of the past as it lies in the video."""
        return self.past_end - (self.first_frame - frame)

    def pinned(self, slot: int, frame: int) -> int:
        """Position of a window frame that stays for good: where it lies in the video, but never in front of the window's
        own first position (`slot` counts pinned frames)."""
        if self.mode == "absolute":
            return frame
        first = self.anchor_capacity if self.mode == "fixed" else max(self.anchor_present, self.state_frames)
        return max(self.window(frame), first + slot)

    def anchor(self, slot: int, frame: int) -> int:
        """Position of an anchor slot that holds video frame `frame` (itself in `absolute`, else the slot)."""
        return frame if self.mode == "absolute" else slot

    def current(self, content_frames: int) -> list[int]:
        """Positions of the frames being denoised: the state at 0..S-1 or behind the past, then the content."""
        state = self.past_end if self.state_after_past else 0
        return [*range(state, state + self.state_frames), *range(self.content, self.content + content_frames)]
