"""Interrupts, progress and previews, as the host's own samplers do them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from PIL import Image

from ...adastate_core.video.picture_forms import to_bytes
from .server import has_client

PREVIEW_PIXELS = 512


class Progress:
    """A node's progress bar; every call also lets an interrupt through."""

    def __init__(self, total: int = 1) -> None:
        self._bar, self._done = comfy.utils.ProgressBar(max(total, 1)), 0
        self._previewer: Any = None
        self._previewer_made = False

    def expect(self, total: int) -> None:
        """How many steps there will be."""
        self._bar.total = max(total, 1)

    def begin(self, total: int) -> None:
        """Of work without an end: the next part of it begins, of so many steps."""
        # a new bar, since newer hosts show nothing of one that goes back
        self._bar, self._done = comfy.utils.ProgressBar(max(total, 1)), 0

    def compiling(self, done: int, total: int) -> None:
        """Before the steps: so many functions are compiled, of so many. They are no steps themselves."""
        check_interrupt()
        self._bar.update_absolute(done, total)

    def step(self, count: int = 1) -> None:
        check_interrupt()
        self._done += count
        self._bar.update_absolute(self._done)

    def preview(self, picture: torch.Tensor) -> None:
        """Show [H, W, 3], bytes or in 0..1, on the node, to the client that queued the prompt."""
        if not has_client():
            return
        image = Image.fromarray(to_bytes(picture).numpy())
        self._bar.update_absolute(self._done, preview=("JPEG", image, PREVIEW_PIXELS))

    def preview_latent(self, patcher: Any, latents: torch.Tensor) -> None:
        """Show the newest of [B, C, n, h, w] (model space) as the host's samplers would: only if previews are on, and only to the
        client that queued the prompt."""
        if not has_client():
            return
        if not self._previewer_made:
            self._previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
            self._previewer_made = True
        if self._previewer is not None:
            newest = latents[:1, :, -1:].to(patcher.load_device)
            self._bar.update_absolute(
                self._done, preview=self._previewer.decode_latent_to_preview_image("JPEG", newest)
            )


def check_interrupt() -> None:
    """Raise the host's interrupt if the user asked for one."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def soft_empty_cache() -> None:
    """Give memory that nothing uses back to the device."""
    comfy.model_management.soft_empty_cache()
