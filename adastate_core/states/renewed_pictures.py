"""The pictures that a state keeps for its past to be made anew with (remade.py), among what its stream holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..files.header_check import Damage, Fields, Tensors
from ..spec import RolloutSpec

FRAMES, PICTURES = "renewed_frames", "renewed_pictures"


def saved_pictures(kept: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    """Pictures [B, H, W, 3] float32 by their latent frame, as a state's `stream` holds them; nothing for none."""
    return {FRAMES: sorted(kept), PICTURES: torch.stack([kept[frame] for frame in sorted(kept)], 1)} if kept else {}


def pictures_of(stream: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """What `saved_pictures` saved."""
    return dict(zip(stream[FRAMES], stream[PICTURES].unbind(1), strict=True)) if FRAMES in stream else {}


def picture_bytes(spec: RolloutSpec) -> int:
    """The most bytes of the pictures that a state of this rollout keeps."""
    if spec.remade != "newest":
        return 0
    stride, frames = spec.geometry.space.stride, -(-spec.window_frames // spec.chunk_frames)
    return frames * 3 * 4 * spec.batch * spec.height * spec.width * stride**2


def check_pictures(stream: Fields, tensors: Tensors, spec: RolloutSpec, next_frame: int) -> None:
    """Damage unless they are pictures of frames that there are, if there are any."""
    if not stream.has(FRAMES):
        return
    frames, stride = stream.wholes(FRAMES), spec.geometry.space.stride
    if spec.remade != "newest" or list(frames) != sorted({*frames} & {*range(next_frame)}):
        raise Damage(f"stream.{FRAMES} are {list(frames)[:8]}, not frames before {next_frame} that are encoded anew")
    shape = (spec.batch, len(frames), stride * spec.height, stride * spec.width, 3)
    tensors.take(f"stream.{PICTURES}", shape, torch.float32)
