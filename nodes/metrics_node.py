"""What a video shows over its chunks, and how near it is to another one."""

from __future__ import annotations

import json
from typing import Any

from ..adastate_core.measure.metrics import measure_video, read_pictures
from .analysis import CATEGORY
from .host.api import io, schema, widget
from .host.node import Node, shown
from .host.pictures import clip
from .host.progress import Progress
from .plots import metrics_plot

MAX_CHUNK, MAX_EVERY = 4096, 1024


class VideoMetricsNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateVideoMetrics",
            display_name="Video Metrics",
            category=CATEGORY,
            description="Measures a video chunk by chunk: colour drift, contrast, sharpness, motion, flicker at the chunk's "
            "rate, and PSNR and SSIM to a reference.",
            search_aliases=["drift", "flicker", "PSNR", "SSIM", "AdaState"],
            inputs=[
                io.Video.Input("video", tooltip="The video to be measured."),
                io.Video.Input(
                    "reference",
                    optional=True,
                    tooltip="A video of the same size that it is compared with, picture by picture from the first.",
                ),
                widget(
                    io.Int,
                    "chunk_frames",
                    default=12,
                    min=1,
                    max=MAX_CHUNK,
                    optional=True,
                    tooltip="Pictures a chunk: 4 times the rollout's chunk_frames. The first chunk has 3 fewer.",
                ),
                widget(
                    io.Int,
                    "every",
                    default=1,
                    min=1,
                    max=MAX_EVERY,
                    optional=True,
                    tooltip="Measure every picture (1), every second one (2), ... Larger is faster and sees less.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="A plot over the chunks."),
                io.String.Output("json", display_name="JSON", tooltip="The numbers, by chunk and of the whole video."),
            ],
        )

    @classmethod
    def check(cls, chunk_frames: int | None = None, every: int | None = None) -> str | None:
        for name, value, most in (("chunk_frames", chunk_frames, MAX_CHUNK), ("every", every, MAX_EVERY)):
            if value is not None and not 1 <= value <= most:
                return f"{name} is {shown(value)}; it must be a number of pictures between 1 and {most}"
        return None

    @classmethod
    def execute(cls, video: Any, reference: Any = None, chunk_frames: int = 12, every: int = 1) -> io.NodeOutput:
        source = clip(video)
        progress = Progress(-(-source.count // every))
        others = None if reference is None else read_pictures(clip(reference, "reference"), every)
        pictures = read_pictures(source, every)
        found = measure_video(pictures, others, chunk_frames, every, progress.step)
        return io.NodeOutput(metrics_plot(found), json.dumps(found, indent=1))


NODES = [VideoMetricsNode]
