"""Frames of device buffers to host memory and back, in few copies.

A copy of a layer is gathered on the device into one block of bytes (whole runs of neighbouring frames, in the order that is
wanted) and crosses to host memory as one asynchronous copy. Two page-locked buffers take turns: while one is filled, what has
landed in the other is copied on to ordinary memory. So a snapshot of many GiB locks no more than `staging_bytes`, and the
device is waited for once a block, never once a frame.

Page-locked memory is scarce, and torch rounds every block of it up to a power of two and keeps it for the next one who asks:
the buffers have such a size from the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .byte_plan import CachePlan
from .working_bytes import ALIGNED, MOST_BLOCK, block_of

# where frames lie: a buffer [B, slots, ...], and the slots in the order that is wanted; None is all of them as they are
Frames = tuple[torch.Tensor, Iterable[int] | None]


def block_bytes(plan: CachePlan) -> int:
    """Bytes of one staging buffer, and the most that is gathered on the device at once while a snapshot is made: a power of two
    that takes what the largest layer has there, MOST_BLOCK at most. 0 where all frames lie in host memory."""
    return block_of(max((plan.snapshot_bytes(layer) for layer in plan.layers), default=0), MOST_BLOCK)


def frame_block_bytes(plan: CachePlan) -> int:
    """The same for the copies of single frames, keys and values, as they leave a layer."""
    return block_of(2 * plan.frame_bytes, MOST_BLOCK)


def staging_bytes(plan: CachePlan) -> int:
    """Page-locked bytes that snapshots of a cache on CUDA take: two staging buffers."""
    return 2 * block_bytes(plan)


@dataclass(frozen=True)
class _Piece:
    """A run of frames `source` [B, n, ...] on the device, and where it goes on the CPU, of the same shape."""

    source: torch.Tensor
    target: torch.Tensor

    @property
    def room(self) -> int:
        return -(-self.source.nbytes // ALIGNED) * ALIGNED


@dataclass
class _Stage:
    """A page-locked buffer, when the newest copy to it has landed, and what of it goes where."""

    buffer: torch.Tensor
    landed: torch.cuda.Event
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait for the copy, and copy it on."""
        if self.waiting:
            self.landed.synchronize()
            for target, staged in self.waiting:
                target.copy_(staged)
            self.waiting.clear()


class HostCopies:
    """Copies of frames to ordinary host memory that are under way together. They are there when `wait` has returned.

    `block`: bytes of a staging buffer. Off CUDA a copy is made at once. Where no memory can be page-locked, or the device has no
    room to gather, frames are copied one run after another, each of them waited for: slower, and the same bits.
    """

    def __init__(self, device: torch.device, block: int) -> None:
        self.device, self.block = device, block
        self._stages: list[_Stage] | None = None
        self._next = 0

    def take(self, parts: dict[str, Frames]) -> dict[str, torch.Tensor]:
        """Start copies [B, n, ...] of the parts, each a contiguous tensor of its own, which `wait` completes."""
        out, pieces = {}, []
        for name, (buffer, slots) in parts.items():
            found = _runs(range(buffer.shape[1]) if slots is None else slots)
            count = sum(high - low for low, high in found)
            shape = (buffer.shape[0], count, *buffer.shape[2:])
            out[name], at = torch.empty(shape, dtype=buffer.dtype), 0
            for low, high in found:
                pieces.append(_Piece(buffer[:, low:high], out[name][:, at : at + high - low]))
                at += high - low
        staged = [piece for piece in pieces if piece.source.device.type == "cuda"]
        for piece in pieces:
            if piece.source.device.type != "cuda":
                piece.target.copy_(piece.source)
        for block in _blocks(staged, self.block):
            self._start(block)
        return out

    def wait(self) -> None:
        """Have everything that was taken there."""
        for stage in self._stages or ():
            stage.settle()

    def _start(self, pieces: list[_Piece]) -> None:
        size = sum(piece.room for piece in pieces)
        gathered = _room(size, self.device) if size <= self.block and self._staging() else None
        if gathered is None:
            for piece in pieces:
                piece.target.copy_(piece.source)
            return
        stage = self._stages[self._next % 2]
        self._next += 1
        stage.settle()
        at = 0
        for piece in pieces:
            place = slice(at, at + piece.source.nbytes)
            _shaped(gathered[place], piece.source).copy_(piece.source)
            stage.waiting.append((piece.target, _shaped(stage.buffer[place], piece.source)))
            at += piece.room
        stage.buffer[:size].copy_(gathered, non_blocking=True)
        stage.landed.record(torch.cuda.current_stream(self.device))

    def _staging(self) -> bool:
        """Whether there are the two buffers."""
        if self._stages is None:
            try:
                self._stages = [
                    _Stage(torch.empty(self.block, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                    for _ in range(2)
                ]
            except RuntimeError:  # the system does not lock so much
                self._stages = []
        return bool(self._stages)


def place(buffer: torch.Tensor, slots: Iterable[int], frames: torch.Tensor) -> None:
    """Write frames [B, n, ...] to slots of a buffer [B, slots, ...], run by run."""
    at = 0
    for low, high in _runs(slots):
        buffer[:, low:high].copy_(frames[:, at : at + high - low])
        at += high - low


def _runs(slots: Iterable[int]) -> list[tuple[int, int]]:
    """Slots, in their order, as runs of neighbours that rise: (first, one after the last)."""
    if isinstance(slots, range) and slots.step == 1:
        return [(slots.start, slots.stop)] if slots else []
    found: list[tuple[int, int]] = []
    for slot in slots:
        if found and found[-1][1] == slot:
            found[-1] = (found[-1][0], slot + 1)
        else:
            found.append((slot, slot + 1))
    return found


def _blocks(pieces: list[_Piece], most: int) -> list[list[_Piece]]:
    """Pieces, cut between frames where that is needed, in blocks of at most `most` bytes; a frame that is larger is alone."""
    blocks: list[list[_Piece]] = []
    free = 0
    for whole in pieces:
        piece: _Piece | None = whole
        while piece is not None:
            frames, frame = piece.source.shape[1], _Piece(piece.source[:, :1], piece.target[:, :1]).room
            if frame > free:
                blocks.append([])
                free = most
            fits = min(frames, max(1, free // frame))
            first = _Piece(piece.source[:, :fits], piece.target[:, :fits])
            blocks[-1].append(first)
            free -= first.room
            piece = _Piece(piece.source[:, fits:], piece.target[:, fits:]) if fits < frames else None
    return blocks


def _room(size: int, device: torch.device) -> torch.Tensor | None:
    """So many bytes on the device, or None where it has not got them: a state is also taken after it ran out of memory."""
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None


def _shaped(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers of another tensor's dtype and shape."""
    return block.view(like.dtype).view(like.shape)
