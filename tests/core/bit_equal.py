"""Whether two runs are the same: their states to the last bit, their pictures to a distance. Of host and core alike, so it imports
neither."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import numpy
import torch

# of a state: what names the run and its files, and how long something took
_OWN = ("run_id", "files", "frame_folders", "seconds")


def differences(one: Any, other: Any) -> list[str]:
    """Names of all that differs between two states."""
    return [field.name for field in fields(one) if not _same(getattr(one, field.name), getattr(other, field.name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        names = (one.keys() | other.keys()) - set(_OWN)
        return all(name in one and name in other and _same(one[name], other[name]) for name in names)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "tensors"):
        return all(_same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other or isinstance(one, float) and math.isnan(one) and math.isnan(other)


def decoded(path: Path) -> Iterator[numpy.ndarray]:
    """[H, W, 3] uint16 of every frame; strict."""
    with av.open(str(path)) as container:
        # FFmpeg's reader refuses the TIFFs of its own writer, which other programs read, where it is to be strict
        if path.suffix != ".tiff":
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        form = "gbrpf32le" if path.suffix == ".exr" else "rgb48le"
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format=form)


def distance(one: numpy.ndarray, two: numpy.ndarray) -> float:
    """Mean difference of two pictures, as a share of white; above 0 where a single value differs."""
    if (one == two).all():
        return 0.0
    most = {"uint8": 255, "uint16": 65535}.get(str(one.dtype), 1)
    return max(float(numpy.abs(one.astype(float) - two).mean()) / most, 1e-9)
