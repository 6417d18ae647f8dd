"""Interrupts, progress and previews, as the host's own samplers do them."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ...adastate_core.video_sink import to_bytes

PREVIEW_PIXELS = 512


class Progress:
    """A node's progress bar; every call also lets an interrupt through."""

    def __init__(self, total: int) -> None:
        self._bar, self._done = comfy.utils.ProgressBar(max(total, 1)), 0

    def step(self, count: int = 1) -> None:
        check_interrupt()
        self._done += count
        self._bar.update_absolute(self._done)

    def preview(self, picture: torch.Tensor) -> None:
        """Show [H, W, 3] in 0..1 on the node and in every client that watches."""
        image = Image.fromarray(to_bytes(picture).numpy())
        self._bar.update_absolute(self._done, preview=("JPEG", image, PREVIEW_PIXELS))


def check_interrupt() -> None:
    """Raise the host's interrupt if the user asked for one."""
    comfy.model_management.throw_exception_if_processing_interrupted()
