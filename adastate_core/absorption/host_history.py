"""Frames that left a switched layer's cache, kept in host memory. They are only for measuring; the run never reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..rope import Layout, Rope


@dataclass(frozen=True)
class _Kept:
    """One frame's key and value [B, P, width] on the CPU, and the position to which the key is rotated (None: raw)."""

    frame: int
    position: float | None
    key: torch.Tensor
    value: torch.Tensor


class HostHistory:
    """The newest `capacity` frames that have left one layer."""

    def __init__(self, capacity: int) -> None:
        self._frames: deque[_Kept] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        return sum(kept.key.nbytes + kept.value.nbytes for kept in self._frames)

    def push(self, frame: int, position: float | None, key: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
        """Copy a frame's key and value. Returns a function; the copies are in the history after it is called."""
        kept = _Kept(frame, position, key.to("cpu", copy=True), value.to("cpu", copy=True))
        return partial(self._append, kept)

    def _append(self, kept: _Kept) -> None:
        self._frames.append(kept)

    def flush(self, keep: int) -> None:
        """Forget all but the `keep` newest frames."""
        self._frames = deque(list(self._frames)[max(0, len(self) - keep) :], self._frames.maxlen)

    def mark(self) -> tuple[_Kept, ...]:
        """What it holds, for `rewind`."""
        return tuple(self._frames)

    def rewind(self, mark: tuple[_Kept, ...]) -> None:
        self._frames = deque(mark, self._frames.maxlen)

    def read(self, layout: Layout, rope: Rope, heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys at their positions in `layout`, and values, each [B, frames * P, width] on `device`."""
        keys = torch.cat([kept.key for kept in self._frames], 1).to(device)
        values = torch.cat([kept.value for kept in self._frames], 1).to(device)
        came = [kept.position for kept in self._frames]
        turn = rope.turn(came, [layout.window(kept.frame) for kept in self._frames])
        return rope.rotate(keys.unflatten(-1, (heads, -1)), turn).flatten(2), values

    def state(self, prefix: str) -> dict[str, Any]:
        """Flat tensors and the frames' numbers."""
        frames = [(kept.frame, kept.position) for kept in self._frames]
        if not frames:
            return {f"{prefix}.frames": []}
        keys = torch.stack([kept.key for kept in self._frames], 1)
        values = torch.stack([kept.value for kept in self._frames], 1)
        return {f"{prefix}.frames": frames, f"{prefix}.keys": keys, f"{prefix}.values": values}

    def restore(self, state: dict[str, Any], prefix: str, frame_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take over what `state` gave for frames [B, P, width]; ValueError if it does not fit."""
        self._frames.clear()
        frames = state[f"{prefix}.frames"]
        if not frames:
            return
        keys, values = state[f"{prefix}.keys"], state[f"{prefix}.values"]
        wanted = (frame_shape[0], len(frames), *frame_shape[1:])
        if tuple(keys.shape) != wanted or tuple(values.shape) != wanted or keys.dtype != dtype or values.dtype != dtype:
            raise ValueError(
                "the state's history for the absorption's monitor does not fit its settings: it is damaged"
            )
        for i, (frame, position) in enumerate(frames):
            self._frames.append(
                _Kept(int(frame), None if position is None else float(position), keys[:, i], values[:, i])
            )
