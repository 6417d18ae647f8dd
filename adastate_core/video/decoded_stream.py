"""Latents of a rollout to growing videos: a decoder that carries its cache, and one sink a batch item."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .sink import VideoSink, to_bytes


class Decoder(Protocol):
    """A streaming decoder such as VaeStream behind a host's VAE."""

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, n, h, w] to pictures [B, t, H, W, 3] in 0..1, all finite, or an error."""
        ...

    def mark(self) -> Any:
        """The decoder as it stands, for `rewind`; cheap."""
        ...

    def rewind(self, mark: Any) -> None: ...

    def snapshot(self) -> dict[str, Any]: ...

    def restore(self, saved: dict[str, Any]) -> None: ...


class VideoStream:
    """Decodes chunks in order and writes item b's pictures to `sinks[b]`; a state knows the files by `names`."""

    def __init__(
        self, decoder: Decoder, sinks: Sequence[VideoSink], names: Sequence[str] = (), frames_before: int = 0
    ) -> None:
        self.decoder, self.sinks, self.names = decoder, list(sinks), list(names)
        self.frames_before, self.frames = frames_before, 0
        self._joined = [sink.frames for sink in self.sinks]

    @torch.no_grad()
    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode and write [B, C, n, h, w] (VAE space); the pictures [B, t, H, W, 3], for a preview.

        If it raises, the decoder stands before the chunk and the chunk does not count as written.
        """
        before = self.decoder.mark()
        try:
            pictures = self.decoder.step(latents)
            for item, sink in zip(pictures, self.sinks, strict=True):
                sink.write(to_bytes(item))
        except BaseException:
            self.decoder.rewind(before)
            raise
        self.frames += pictures.shape[1]
        return pictures

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps of the stream: the decoder's cache, the frames since frame 0, and the files."""
        return self.decoder.snapshot() | {
            "frames_written": self.frames_before + self.frames,
            "file_frames": [joined + self.frames for joined in self._joined],
            "files": self.names,
        }

    def sync(self) -> None:
        """Have the system put every file on the disk as far as it is written: before a state that counts its frames."""
        for sink in self.sinks:
            sink.sync()

    def close(self) -> list[str]:
        """Finish every file; sentences about those that could not be finished and stay as they grew."""
        try:
            for sink in self.sinks:
                sink.close()
        except BaseException:
            for sink in self.sinks:
                with contextlib.suppress(Exception):
                    sink.stop()
            raise
        return [sink.warning for sink in self.sinks if sink.warning]
