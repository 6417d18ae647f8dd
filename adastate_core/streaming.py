"""Latents of a rollout to growing videos: a decoder that carries its cache, and one sink a batch item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .video_sink import VideoSink, to_bytes


class Decoder(Protocol):
    """A streaming decoder such as VaeStream behind a host's VAE."""

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, n, h, w] to pictures [B, t, H, W, 3] in 0..1."""
        ...

    def snapshot(self) -> dict[str, Any]: ...

    def restore(self, saved: dict[str, Any]) -> None: ...


class VideoStream:
    """Decodes chunks in order and writes item b's pictures to `sinks[b]`."""

    def __init__(self, decoder: Decoder, sinks: Sequence[VideoSink], frames_before: int = 0) -> None:
        self.decoder, self.sinks = decoder, list(sinks)
        self.frames_before, self.frames = frames_before, 0
        self._broken = False

    @torch.no_grad()
    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode and write [B, C, n, h, w] (VAE space); the pictures [B, t, H, W, 3], for a preview.

        If it raises, the decoder stands somewhere inside the chunk: `snapshot` then leaves its cache out.
        """
        self._broken = True
        pictures = self.decoder.step(latents)
        for item, sink in zip(pictures, self.sinks, strict=True):
            sink.write(to_bytes(item))
        self.frames += pictures.shape[1]
        self._broken = False
        return pictures

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps of the stream: the decoder's cache, the frames since frame 0, and the files."""
        return ({} if self._broken else self.decoder.snapshot()) | {
            "frames_written": self.frames_before + self.frames,
            "file_frames": [sink.frames for sink in self.sinks],
            "files": [sink.path.name for sink in self.sinks],
        }

    def close(self) -> None:
        """Finish every file; all are tried even if one fails."""
        errors = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001
                errors.append(error)
        if errors:
            raise errors[0]
