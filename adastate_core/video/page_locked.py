"""Pictures from a device to host memory, without anyone waiting: copies into page-locked buffers, each with its event."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger("adastate")


class Landed:
    """Pictures [B, t, H, W, 3] in host memory, or on their way there."""

    def __init__(self, pictures: torch.Tensor, event: torch.cuda.Event | None = None) -> None:
        """`event`: after which `pictures`, a part of a buffer, are there; None for memory of their own."""
        self._pictures, self._event = pictures, event
        self.released = event is None

    @property
    def shape(self) -> torch.Size:
        return self._pictures.shape

    def wait(self) -> torch.Tensor:
        """The pictures, once they are there; not to be written to. A buffer's hold until other pictures are landed in it."""
        if self._event is not None:
            self._event.synchronize()
        return self._pictures

    def kept(self, item: int) -> torch.Tensor:
        """A batch item's pictures [t, H, W, 3], for as long as anybody wants them."""
        pictures = self.wait()[item]
        return pictures if self._event is None else pictures.clone()

    def release(self) -> None:
        """They have been read: their buffer may be filled anew."""
        self.released = True


class _Buffer:
    """Page-locked bytes, and what was landed there last."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.last: Landed | None = None

    @property
    def free(self) -> bool:
        return self.last is None or self.last.released


class Landing:
    """Where pictures land: as many buffers as are read at one time, each made once, for `most` bytes or what needs more.

    Pictures of another device than CUDA are copied by a call that waits, those of the CPU not at all.
    """

    def __init__(self, most: int = 0) -> None:
        self._buffers: list[_Buffer] = []
        self._most, self._refused = most, False

    @property
    def nbytes(self) -> int:
        """Page-locked bytes that are held."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def take(self, pictures: torch.Tensor) -> Landed:
        """Have them copied to host memory. The copy waits for what the device's current stream was given, and nobody for it."""
        if pictures.device.type != "cuda":
            return Landed(pictures.cpu())
        buffer = self._free(pictures.nbytes)
        if buffer is None:
            return Landed(pictures.cpu())
        there = buffer.memory[: pictures.nbytes].view(pictures.dtype).view(pictures.shape)
        there.copy_(pictures.contiguous(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(pictures.device))
        buffer.last = Landed(there, event)
        return buffer.last

    def _free(self, size: int) -> _Buffer | None:
        """A buffer that nobody reads, of at least `size` bytes; None where no memory can be page-locked."""
        for buffer in self._buffers:
            if buffer.free and buffer.memory.nbytes >= size:
                return buffer
        if self._refused:
            return None
        self._most = max(self._most, size)
        # too small for what comes now, and for all that may come
        self._buffers = [buffer for buffer in self._buffers if not buffer.free]
        try:
            self._buffers.append(_Buffer(self._most))
        except RuntimeError as error:
            self._refused = True
            log.warning("frames leave the device by copies that wait, since no memory could be page-locked: %s", error)
            return None
        return self._buffers[-1]
