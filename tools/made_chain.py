"""A video as chained clips drift: made up, so that what the measures say of it can be known."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image

from adastate_core.video.sink import VideoSink
from tools.workflow_titles import thumbnail

CLIP, CLIPS, SIDE = 32, 7, 128
NAME = "chain of clips.mp4"


def write_chain(folder: Path) -> Path:
    """The file in `folder`: a still of the demo that moves on by a pixel a picture.

    Each clip adds CLIP pictures, the first has one more. Each is redder, richer in contrast, and jumps further where it begins.
    """
    with Image.open(thumbnail("long_video")) as card:
        still = card.crop((0, 0, card.width // 2, card.height // 2)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    still = numpy.asarray(still.convert("RGB"), dtype=numpy.float32)
    middle = still.mean((0, 1))
    pictures = []
    for clip in range(CLIPS):
        drifted = middle + (still - middle) * (1 + 0.05 * clip) + numpy.array([3.0, 0.0, -1.5]) * clip
        for _ in range(CLIP + (clip == 0)):
            step = len(pictures) + 2 * sum(range(clip + 1))
            pictures.append(numpy.roll(drifted, -step, 1).clip(0, 255).round().astype(numpy.uint8))
    folder.mkdir(parents=True, exist_ok=True)
    with VideoSink(folder / NAME, SIDE, SIDE, 16, quality=12) as sink:
        sink.write(torch.from_numpy(numpy.stack(pictures)))
    return folder / NAME
