"""Pictures from the host's IMAGE and VIDEO, and its own scaling of them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import comfy.utils
import numpy
import torch
from comfy_api.latest import Input

from ...adastate_core.video.frames import FileClip, MemoryClip, UnreadableVideo
from ...adastate_core.video.tail import tail, tail_indices
from .progress import check_interrupt

SCALERS = ("lanczos", "bicubic", "bilinear", "area", "nearest-exact")
CROPS = ("center", "disabled")
Scale = Callable[[torch.Tensor], torch.Tensor]


def clip(video: Any, what: str = "the video") -> FileClip | MemoryClip:
    """What a VIDEO shows, to be read from its beginning; `what` names it in errors. ValueError for one without frames.

    A file is read by the pack's own door, the part that the host cut out of it alone; what lies in memory is taken as it is.
    """
    if _in_memory(video):
        return _components(video, what)
    found = FileClip(video.get_stream_source(), what)
    since, until = _trim(video)
    if since or until is not None:
        found = FileClip(found.source, what, since, until)
    # A host that crops what it shows says another size than the file's, and how it does it is its own. Of a file that the host
    # cannot read it shows nothing else.
    try:
        seen = tuple(video.get_dimensions())
    except (av.error.FFmpegError, OSError, ValueError):
        return found
    return found if seen in found.sizes or seen == found.first().size else _components(video, what)


def sound_source(video: Any) -> tuple[Any, float, float | None]:
    """(where a VIDEO's sound is, from when and until when it counts in seconds): a file, or of what lies in memory an AUDIO, None
    where it has none."""
    if _in_memory(video):
        return video.get_components().audio, 0.0, None
    return video.get_stream_source(), *_trim(video)


def video_tail(video: Any, frames: int, fps: float = 0.0, scale: Scale = lambda pictures: pictures) -> torch.Tensor:
    """The last `frames` frames of a VIDEO, [n, H, W, 3] float32 in 0..1, fewer where it is shorter.

    `fps` above 0 takes those on screen at steps of 1 / fps. `scale` is given frames [1, H, W, 3]; of a file they are held
    in the size that it makes, and the end alone. ValueError for one without frames.
    """
    found = clip(video)
    if isinstance(found, MemoryClip):
        times = [number / found.rate for number in range(found.count)]
        chosen = tail_indices(times, frames, Fraction(fps).limit_denominator(1001))
        return scale(found.images[chosen][..., :3])

    def each(picture: numpy.ndarray) -> torch.Tensor:
        return scale(torch.from_numpy(picture)[None] / 255.0)

    return torch.cat(tail(found.source, frames, fps, found.since, found.until, each=each, on_frame=check_interrupt))


def _components(video: Any, what: str) -> MemoryClip:
    try:
        parts = video.get_components()
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise UnreadableVideo(f"{what} cannot be read: it is damaged; connect a VIDEO of a file that plays") from error
    return MemoryClip(parts.images, parts.frame_rate, what)


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


def scaled(pictures: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """[n, H, W, 3] to [n, height, width, 3] as the host's Upscale Image does it; of that size already, unchanged."""
    if tuple(pictures.shape[1:3]) == (height, width):
        return pictures
    return comfy.utils.common_upscale(pictures.movedim(-1, 1), width, height, method, crop).movedim(1, -1)
