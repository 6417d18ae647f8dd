"""Latents of a rollout to growing videos: a decoder that carries its cache, and one sink a batch item."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from .enlarging import FilePictures
from .frame_writer import FrameWriter, Sink
from .page_locked import Landed
from .picture_forms import in_form

# What chunks under way may hold of the decoder's cache: each has to be able to bring it back to where the chunk began.
MARKS = 256 * 2**20


def old_caches(nbytes: int) -> int:
    """How many caches of a decoder, of so many bytes each, are alive beside the newest one while a stream decodes: the one before
    the chunk, and that of a chunk that is being written if it is small."""
    return 2 if nbytes <= MARKS else 1


class Decoder(Protocol):
    """A streaming decoder such as VaeStream behind a host's VAE."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that it carries."""
        ...

    def step(self, latents: torch.Tensor, takes: str) -> torch.Tensor:
        """[B, C, n, h, w] to pictures [B, t, H, W, 3], all finite, in one of picture_forms.FORMS, where they were decoded; or an
        error."""
        ...

    def mark(self) -> Any:
        """The decoder as it stands, for `rewind`; it copies nothing, and keeps the cache of then alive."""
        ...

    def rewind(self, mark: Any) -> None: ...

    def snapshot(self) -> dict[str, Any]: ...

    def restore(self, saved: dict[str, Any]) -> None: ...


class VideoStream:
    """Decodes chunks in order and writes item b's pictures to `sinks[b]`; a state knows the files by `names`.

    Writing goes on beside the next chunk, at most two chunks behind (FrameWriter): what fails there is raised by the next `step`,
    `drain` or `snapshot`. Then `take_back` tells how many chunks were decoded for nothing, and has the decoder stand before them.

    With `enlarged`, the files hold what it makes of the decoder's pictures, a whole chunk at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        sinks: Sequence[Sink],
        names: Sequence[str] = (),
        frames_before: int = 0,
        most: int = 0,
        enlarged: FilePictures | None = None,
        taken_over: int = 0,
    ) -> None:
        """`most`: bytes of a chunk's pictures at most, all items together, so that buffers are made once. `taken_over`: so many of
        the frames in each sink count as written by this stream, whose sinks take the place of others."""
        self.decoder, self.sinks, self.names, self.enlarged = decoder, list(sinks), list(names), enlarged
        self.frames_before = frames_before
        self._taken_over = taken_over
        self._joined = [sink.frames - taken_over for sink in self.sinks]
        self._writer, self._taken_back = FrameWriter(self.sinks, most), False

    @property
    def frames(self) -> int:
        """Frames of each item that are in its file, those of a joined video not counted."""
        return self._taken_over + self._writer.frames

    @property
    def under_way(self) -> int:
        """Chunks that were decoded and are not written yet."""
        return len(self._writer.under_way)

    @torch.no_grad()
    def step(self, latents: torch.Tensor) -> Landed:
        """Decode [B, C, n, h, w] (VAE space) and have it written; the decoder's own pictures [B, t, H, W, 3], for a preview until
        the next step.

        If it raises, the decoder stands before the chunk and the chunk does not count; chunks before may have failed (`take_back`).
        """
        self._writer.wait(old_caches(self.decoder.nbytes) - 1)  # each chunk under way keeps one alive
        before = self.mark()
        try:
            if self.enlarged is None:
                return self._writer.give(self.decoder.step(latents, self._writer.takes), before)
            pictures = self.decoder.step(latents, "float")
            shown = Landed(in_form(pictures, "bytes").cpu())
            self._writer.give(self.enlarged.step(pictures, self._writer.takes), before)
            return shown
        except BaseException:
            self.rewind(before)
            raise

    def mark(self) -> Any:
        """Its decoder and what enlarges as they stand, for `rewind`."""
        return self.decoder.mark(), self.enlarged.mark() if self.enlarged else None

    def rewind(self, mark: Any) -> None:
        decoder, enlarged = mark
        self.decoder.rewind(decoder)
        if self.enlarged:
            self.enlarged.rewind(enlarged)

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Stand where this stream's snapshot was taken, with all that makes pictures; its files are for others to bring back."""
        self.decoder.restore(saved)
        if self.enlarged:
            self.enlarged.go_back(saved)

    def own_frames(self, saved: Mapping[str, Any]) -> int:
        """How many frames of each file were this stream's own when the snapshot was taken."""
        return saved["file_frames"][0] - self._joined[0]

    def drain(self) -> None:
        """Wait until all chunks are written. Raises what writing one failed with, until that was taken back."""
        if not self._taken_back:
            self._writer.wait()

    def take_back(self) -> int:
        """After writing has failed: how many chunks, the newest ones, were decoded and never will be written. The decoder stands
        before them. 0 where nothing failed, and the second time."""
        if self._taken_back or not self._writer.failed:
            return 0
        lost, self._taken_back = self._writer.under_way, True
        if lost:
            self.rewind(lost[0].mark)
        return len(lost)

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps of the stream, once all chunks are written: the decoder's cache, its frames since frame 0, files."""
        self.drain()
        enlarged = self.enlarged
        kept = self.decoder.snapshot() | (enlarged.snapshot() if enlarged else {})
        return kept | {
            "frames_written": self.frames_before + (enlarged.decoded(self.frames) if enlarged else self.frames),
            "file_frames": [joined + self.frames for joined in self._joined],
            "files": self.names,
        }

    def sync(self) -> None:
        """Have the system put every file on the disk as far as it is written: before a state that counts its frames. A growing file
        keeps the newest frame back, so its last one is there once a chunk behind it has been written."""
        for sink in self.sinks:
            sink.sync()

    def leave(self) -> None:
        """Others take its sinks' place: end its thread, and leave the sinks to whoever takes over."""
        self._writer.end()

    def release(self) -> None:
        """After `close` or `leave`: let go of the buffers of what was written."""
        self._writer.release()

    def close(self) -> list[str]:
        """Write what is under way and finish every file; sentences about those that could not be finished and stay as they grew.
        What writing failed with is for `drain` to tell."""
        try:
            self._writer.end()
            for sink in self.sinks:
                sink.close()
        except BaseException:
            for sink in self.sinks:
                with contextlib.suppress(Exception):
                    sink.stop()
            raise
        return [sink.warning for sink in self.sinks if sink.warning]
