"""Frames that left a switched layer's cache, kept in host memory. They are only for measuring; the run never reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..cache.host_copies import HostCopies
from ..rope import Layout, Rope
from ..shots import NOTHING


@dataclass(frozen=True)
class _Kept:
    """One frame's key and value [B, P, width] on the CPU, and the position to which the key is rotated (None: raw)."""

    frame: int
    position: float | None
    key: torch.Tensor
    value: torch.Tensor


class HostHistory:
    """The newest `capacity` frames that have left one layer, brought to host memory by `copies`. Those that a shot pins stay, as in
    layers that have not lost their history."""

    def __init__(self, capacity: int, copies: HostCopies) -> None:
        self._copies = copies
        self._capacity = capacity
        self._frames: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        return sum(kept.key.nbytes + kept.value.nbytes for kept in self._frames)

    def push(
        self, frame: int, position: float | None, key: torch.Tensor, value: torch.Tensor, pin: range = NOTHING
    ) -> Callable[[], None]:
        """Start copying a frame's key and value. Returns a function; the copies are in the history after it is called."""
        taken = self._copies.take({"key": (key[:, None], None), "value": (value[:, None], None)})
        return partial(self._append, _Kept(frame, position, taken["key"][:, 0], taken["value"][:, 0]), pin)

    def _append(self, kept: _Kept, pin: range) -> None:
        self._copies.wait()
        self._frames.append(kept)
        if len(self) > self._capacity:
            self._frames.pop(next((i for i, one in enumerate(self._frames) if one.frame not in pin), 0))

    def flush(self, keep: int) -> None:
        """Forget all but the `keep` newest frames."""
        self._frames = self._frames[max(0, len(self) - keep) :]

    def mark(self) -> tuple[_Kept, ...]:
        """What it holds, for `rewind`."""
        return tuple(self._frames)

    def rewind(self, mark: tuple[_Kept, ...]) -> None:
        self._frames = list(mark)

    def read(
        self, layout: Layout, rope: Rope, heads: int, device: torch.device, most: int = 3
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys at their positions in `layout`, and values, each [B, frames * P, width] on `device`. They are rotated in
        blocks of at most `most` frames."""
        kept, places = self._frames, layout.ring([one.frame for one in self._frames])
        batch, tokens, width = kept[0].key.shape
        keys, values = (kept[0].key.new_empty((batch, len(kept), tokens, width), device=device) for _ in range(2))
        for i, one in enumerate(kept):
            keys[:, i].copy_(one.key)
            values[:, i].copy_(one.value)
        for low in range(0, len(kept), most):
            part = kept[low : low + most]
            turn = rope.turn([one.position for one in part], places[low : low + most])
            block = keys[:, low : low + most]
            turned = rope.rotate(block.flatten(1, 2).unflatten(-1, (heads, -1)), turn)
            block.copy_(turned.reshape(block.shape))
        return keys.flatten(1, 2), values.flatten(1, 2)

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
