"""What a video shows over its chunks, and how near it is to another one."""

from __future__ import annotations

import json
from typing import Any

from ..adastate_core.measure.dense_flow import DenseFlow
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
            description="Measures any video, chunk by chunk or clip by clip: colour drift, contrast, sharpness, motion, seams, "
            "flicker at the chunk's rate, and PSNR and SSIM to a reference.",
            search_aliases=[
                "drift",
                "color drift",
                "color shift",
                "chained clips",
                "seams between clips",
                "quality loss",
                "oversaturation",
                "flicker",
                "VBench",
                "temporal flickering",
                "optical flow",
                "PSNR",
                "SSIM",
                "AdaState",
            ],
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
                widget(
                    io.Boolean,
                    "dense_flow",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also follow every pixel (OpenCV's DIS): motion of the camera and of objects apart, and how smooth it "
                    "is. Needs OpenCV, and takes a few times as long.",
                ),
                widget(
                    io.Int,
                    "clip_frames",
                    default=0,
                    min=0,
                    max=MAX_CHUNK,
                    optional=True,
                    tooltip="For a video that was put together from clips, by any model: the pictures that each clip adds. It is "
                    "measured clip by clip, with the seams. 0 = chunk by chunk.",
                ),
                widget(
                    io.Int,
                    "first_clip_frames",
                    default=0,
                    min=0,
                    max=MAX_CHUNK,
                    optional=True,
                    tooltip="Pictures of the first clip where it has others: 81, if each later one adds 80. 0 = as the others.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="A plot over the chunks."),
                io.String.Output("json", display_name="JSON", tooltip="The numbers, by chunk and of the whole video."),
            ],
        )

    @classmethod
    def check(
        cls,
        chunk_frames: int | None = None,
        every: int | None = None,
        clip_frames: int | None = None,
        first_clip_frames: int | None = None,
    ) -> str | None:
        for name, value, most in (("chunk_frames", chunk_frames, MAX_CHUNK), ("every", every, MAX_EVERY)):
            if value is not None and not 1 <= value <= most:
                return f"{name} is {shown(value)}; it must be a number of pictures between 1 and {most}"
        if clip_frames == 0 and first_clip_frames is not None and 0 < first_clip_frames <= MAX_CHUNK:
            return f"first_clip_frames is {first_clip_frames} and clip_frames 0; give what each later clip adds in clip_frames"
        return None

    @classmethod
    def execute(
        cls,
        video: Any,
        reference: Any = None,
        chunk_frames: int = 12,
        every: int = 1,
        dense_flow: bool = False,
        clip_frames: int = 0,
        first_clip_frames: int = 0,
    ) -> io.NodeOutput:
        flow = DenseFlow() if dense_flow else None
        source = clip(video)
        progress = Progress(-(-source.count // every))
        others = None if reference is None else read_pictures(clip(reference, "reference"), every)
        pictures = read_pictures(source, every)
        found = measure_video(
            pictures, others, chunk_frames, every, progress.step, flow, clip_frames, first_clip_frames
        )
        return io.NodeOutput(metrics_plot(found), json.dumps(found, indent=1))


NODES = [VideoMetricsNode]
