"""Names for what made a rollout fail, which do not change whatever the host, torch and PyAV call it: listed in docs/api.md."""

from __future__ import annotations

import errno
import re

import av
import torch

from ...adastate_core.attention.cached import LayerOrderError
from ...adastate_core.decode.wan_vae import NonFinitePicturesError
from ...adastate_core.passes import NonFiniteError
from ...adastate_core.past import UnfinishedError
from .safely import reason

_LONGEST = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate|not enough memory", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(CUDA|HIP|MPS|cuDNN|cuBLAS|NCCL|device-side)\b.*\b(error|assert|failed|failure)", re.IGNORECASE
)
_AcceleratorError = getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)
OTHER = "internal_error"

# (name, classes, what the text has to hold or None); the first row that fits counts
ERRORS: tuple[tuple[str, tuple[type[BaseException], ...], re.Pattern[str] | None], ...] = (
    ("out_of_memory", (torch.cuda.OutOfMemoryError, MemoryError), None),
    ("out_of_memory", (RuntimeError, OSError), _NO_MEMORY),
    ("device_error", (_AcceleratorError,), None),
    ("non_finite", (NonFiniteError, NonFinitePicturesError), None),
    ("layer_order", (LayerOrderError,), None),
    ("unfinished_chunk", (UnfinishedError,), None),
    ("device_error", (RuntimeError,), _DEVICE),
    ("file_error", (OSError,), None),
    ("video_error", (av.error.FFmpegError,), None),
    ("refused_input", (ValueError,), None),
)
NAMES = ("disk_full", *dict.fromkeys(name for name, *_ in ERRORS), OTHER)


def error_type(error: BaseException) -> str:
    """The name of what went wrong; `internal_error` for what no row of the table knows."""
    if getattr(error, "errno", None) in _FULL:
        return "disk_full"
    for name, classes, words in ERRORS:
        if isinstance(error, classes) and (words is None or words.search(str(error))):
            return name
    return OTHER


def describe_error(error: BaseException) -> dict[str, str]:
    """JSON-able: the name, and what was said, without the path of a file. It never fails."""
    try:
        return {"type": error_type(error), "message": reason(error, _LONGEST)}
    except Exception:  # noqa: BLE001  an exception that cannot be printed
        return {"type": OTHER, "message": type(error).__name__}
