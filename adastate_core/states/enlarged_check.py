"""Whether what a state keeps of an enlarged stream is whole (video/enlarging.py)."""

from __future__ import annotations

import torch

from ..files.header_check import Damage, Fields, Tensors, shown
from ..spec import RolloutSpec
from ..video.enlarging import HELD, MODELS, MULTIPLIER, SINGLY, SIZE, TILE

_MOST_SIDE, _MOST_TIMES = 2**20, 2**10


def check_enlarged(stream: Fields, tensors: Tensors, spec: RolloutSpec) -> None:
    """Damage unless it is all there, if there is any of it."""
    if stream.has(TILE):
        stream.whole(TILE, 1)
    if stream.has(SINGLY):
        stream.yes_no(SINGLY)
    if stream.has(SIZE):
        sides = stream.wholes(SIZE, 1, _MOST_SIDE)
        if len(sides) != 2:
            raise Damage(f"stream.{SIZE} is {shown(list(sides))}, not a width and a height")
        multiplier = stream.whole(MULTIPLIER, 1, _MOST_TIMES)
        models = stream.listed(MODELS)
        if len(models) != 2 or not all(isinstance(name, str) for name in models):
            raise Damage(f"stream.{MODELS} are {shown(list(models))}, not two names")
        if tensors.has(f"stream.{HELD}") and multiplier == 1:
            raise Damage(f"stream.{HELD} is there, and there are no in-betweens to make from it")
    if tensors.has(f"stream.{HELD}"):
        stride = spec.geometry.space.stride
        tensors.take(f"stream.{HELD}", (spec.batch, stride * spec.height, stride * spec.width, 3), torch.float32)
