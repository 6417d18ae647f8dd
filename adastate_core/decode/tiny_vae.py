"""Tiny VAE (TAEHV) decode that carries its memory between calls, at a size that does not depend on length.

A TAEHV decoder is a plain sequence of 2-D layers over frames; only its memory blocks look back, each at the frame that
came into it last (github.com/madebyollin/taehv: taew2_1, taew2_2 and, with the same layers, lighttaew2_1, lighttaew2_2).
Those frames are the state. Every latent gives 4 pictures, of which the first 3 of a video are no part of it, so a latent
frame 0 gives 1. Where the last layer has more than 3 channels, each of its pixels is a patch of them (taew2_2: 2 by 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..files.header_check import Damage, Fields
from .carried_check import carried
from .wan_vae import require_finite

# What a snapshot of this decoder is told by; one of a full VAE has no such entry.
KIND = "taehv"


def cache_bytes(decoder: nn.Sequential, rows: int, columns: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the carried memory: 5376 values a latent pixel for the published decoders (256, 128, 64 channels).

    `rows` x `columns` is the latent picture.
    """
    values = sum(channels * scale**2 for channels, scale in _memories(decoder))
    return values * rows * columns * batch * dtype.itemsize


class TaehvStream:
    """One stream's tiny decoder: `step` latents through it in order; `snapshot` and `restore` move it to another run.

    `decoder` is the sequence of the decoder's layers. `frames_per_call` above 1 is faster on some devices and exact to
    rounding only. ValueError if no layer of it is a memory block.
    """

    def __init__(self, decoder: nn.Sequential, frames_per_call: int = 1) -> None:
        if frames_per_call < 1:
            raise ValueError(f"frames_per_call is {frames_per_call}; it must be at least 1")
        if not _memories(decoder):
            raise ValueError(f"the decoder is a {type(decoder).__name__} without memory blocks; TAEHV's has nine")
        self.decoder, self.frames_per_call = decoder, frames_per_call
        self._patch = _patch(decoder)
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self._memory: list[torch.Tensor] = []
        self.latents_seen = 0

    @property
    def reach(self) -> int:
        """Latent frames after which a stream that begins anew stands, to the bit, where one that has seen the whole video does:
        each memory block looks one frame back."""
        return len(_memories(self.decoder)) + 1

    def skip(self, latents: int) -> None:
        """Begin anew after so many latents of a video: what comes out is right once `reach` more were seen."""
        self.reset()
        self.latents_seen = latents

    @property
    def nbytes(self) -> int:
        """Bytes of the carried memory."""
        return sum(t.nbytes for t in self._memory)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, n, h, w] in the decoder's space, on its device and dtype, to pictures [B, t, H, W, 3] in 0..1.

        t is 4n, or 4n - 3 when these are the first latents of the video. If it raises, the stream is as before: so does
        NonFinitePicturesError, for a picture or a carried value that is not finite.
        """
        before = self.mark()
        try:
            pieces = [self._call(part) for part in latents.split(self.frames_per_call, dim=2)]
            pictures = torch.cat(pieces, dim=1)
            require_finite(latents, before[1], [pictures, *self._memory])
        except BaseException:
            self.rewind(before)
            raise
        return pictures.clamp_(0, 1).movedim(2, -1)

    def _call(self, latents: torch.Tensor) -> torch.Tensor:
        """One call of the decoder: pictures [B, t, 3, H, W] as it gives them, beyond 0..1 too."""
        batch, count = latents.shape[0], latents.shape[2]
        x, memory = latents.movedim(2, 1).flatten(0, 1), []
        for layer in self.decoder:
            if not _has_memory(layer):
                x = layer(x)
                continue
            frames = x.unflatten(0, (batch, -1))
            last = self._memory[len(memory)] if self._memory else torch.zeros_like(frames[:, 0])
            past = torch.cat([last[:, None], frames[:, :-1]], dim=1).flatten(0, 1)
            # A copy: the view would keep all frames of the call alive.
            memory.append(frames[:, -1].clone())
            x = layer(x, past)
        if self._patch > 1:
            x = nn.functional.pixel_shuffle(x, self._patch)
        pictures = x.unflatten(0, (batch, -1))
        if not self.latents_seen:
            pictures = pictures[:, pictures.shape[1] // count - 1 :]
        self._memory = memory
        self.latents_seen += count
        return pictures

    def mark(self) -> tuple[list, int]:
        """The stream as it stands, for `rewind`: references, no copies."""
        return self._memory, self.latents_seen

    def rewind(self, mark: tuple[list, int]) -> None:
        """Back to where `mark` was taken."""
        self._memory, self.latents_seen = mark

    def snapshot(self) -> dict[str, Any]:
        """The stream between two calls: its kind, a number, and copies on the CPU of the carried frames."""
        saved: dict[str, Any] = {"vae_kind": KIND, "vae_latents_seen": self.latents_seen}
        for i, frame in enumerate(self._memory):
            saved[f"taehv_memory_{i}"] = frame.detach().to("cpu", copy=True)
        return saved

    def restore(self, saved: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> None:
        """Go on from a snapshot; ValueError if there is none of a TAEHV in `saved` or it is damaged."""
        self.reset()
        if saved.get("vae_kind") != KIND or "vae_latents_seen" not in saved:
            raise ValueError(
                "the state holds no tiny VAE's memory; its stream was decoded by a full VAE, or not at all"
            )
        try:
            seen = Fields(saved).whole("vae_latents_seen")
            entries = list(carried(saved, "taehv_memory_", 4, seen).values())
            _check_fits(entries, _memories(self.decoder) if seen else [])
        except Damage as error:
            raise ValueError(
                f"the state's decoder memory is damaged: {error}; resume without a stream, or make it again"
            ) from error
        self._memory = [entry.to(device=device, dtype=dtype, copy=True) for entry in entries]
        self.latents_seen = seen


def _has_memory(layer: nn.Module) -> bool:
    """Whether a layer is called with the frames before: TAEHV's MemBlock, known by its parts."""
    return hasattr(layer, "conv") and hasattr(layer, "skip")


def _patch(decoder: nn.Sequential) -> int:
    """Pixels a side that a pixel of the last layer holds, by its channels."""
    channels = [layer.out_channels for layer in decoder if isinstance(layer, nn.Conv2d)]
    return math.isqrt(channels[-1] // 3) if channels else 1


def _memories(decoder: nn.Sequential) -> list[tuple[int, int]]:
    """Each memory block's channels, and how many times the latent picture's its rows and columns are."""
    found, scale = [], 1
    for layer in decoder:
        if isinstance(layer, nn.Upsample):
            scale *= int(layer.scale_factor)
        elif _has_memory(layer):
            found.append((layer.conv[0].in_channels // 2, scale))
    return found


def _check_fits(entries: list[torch.Tensor], layout: list[tuple[int, int]]) -> None:
    """Damage unless carried frames from a file belong to one another and to the decoder."""
    if len(entries) != len(layout):
        raise Damage(f"it holds {len(entries)} frames of the {len(layout)} that this decoder carries")
    pictures = set()
    for i, (entry, (channels, scale)) in enumerate(zip(entries, layout, strict=True)):
        _, width, rows, columns = entry.shape
        if width != channels or rows % scale or columns % scale:
            raise Damage(
                f"taehv_memory_{i} is {list(entry.shape)}, not {channels} channels of {scale} times the latent's size"
            )
        pictures.add((rows // scale, columns // scale))
    if len(pictures) > 1:
        raise Damage(f"its frames are of latents of {len(pictures)} sizes")
