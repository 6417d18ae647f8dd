"""Pictures from the host's IMAGE and VIDEO, and its own scaling of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import Input

from ...adastate_core.video_tail import NO_FRAMES, tail_frames, tail_indices

SCALERS = ("lanczos", "bicubic", "bilinear", "area", "nearest-exact")
CROPS = ("center", "disabled")


def video_tail(video: Any, frames: int, fps: float = 0.0) -> torch.Tensor:
    """The last `frames` frames of a VIDEO, [n, H, W, 3] float32 in 0..1, fewer where it is shorter.

    `fps` above 0 takes those on screen at steps of 1 / fps. Of a file the end alone is held. ValueError for one without frames.
    """
    if _in_memory(video):
        return _tail_of_components(video.get_components(), frames, fps)
    since, until = _trim(video)
    found = tail_frames(video.get_stream_source(), frames, fps, since, until)
    if tuple(found.shape[2:0:-1]) != tuple(video.get_dimensions()):  # a host that crops or turns what it reads
        return _tail_of_components(video.get_components(), frames, fps)
    return torch.from_numpy(found) / 255.0


def _in_memory(video: Any) -> bool:
    """Whether the frames lie in memory: then the host would encode them to make a file of them."""
    own = getattr(type(video), "get_stream_source", None)
    return own is None or own is Input.Video.get_stream_source


def _trim(video: Any) -> tuple[float, float | None]:
    """From when until when a VIDEO counts, in seconds of its file; hosts that cannot cut give all of it."""
    if not hasattr(video, "get_active_trim_window"):
        start, length = (getattr(video, f"_VideoFromFile__{name}", 0) or 0 for name in ("start_time", "duration"))
        if start < 0:
            start = max(0.0, float(video.get_duration()) + start)
    else:
        start, length = video.get_active_trim_window()
    return float(start), float(start) + float(length) if length else None


def _tail_of_components(components: Any, frames: int, fps: float) -> torch.Tensor:
    images, rate = components.images, Fraction(components.frame_rate or 16)
    if not len(images):
        raise ValueError(NO_FRAMES)
    times = [number / rate for number in range(len(images))]
    return images[tail_indices(times, frames, Fraction(fps).limit_denominator(1001))][..., :3]


def scaled(pictures: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """[n, H, W, 3] to [n, height, width, 3] as the host's Upscale Image does it; of that size already, unchanged."""
    if tuple(pictures.shape[1:3]) == (height, width):
        return pictures
    return comfy.utils.common_upscale(pictures.movedim(-1, 1), width, height, method, crop).movedim(1, -1)
