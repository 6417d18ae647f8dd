"""Nodes that measure: where a rollout's attention goes, and what sets videos apart."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.attention_share import measure_share, share_table
from ..adastate_core.video_compare import Comparison
from ..adastate_core.video_sink import VideoSink
from .host import api
from .host.api import io, schema, ui, widget
from .host.files import new_file, save_metadata
from .host.node import Node, shown
from .host.progress import Progress
from .job import Job, Request, check_size
from .plots import share_plot

CATEGORY = "AdaState/analysis"
MAX_WINDOWS = 8


def parse_windows(text: str) -> list[int]:
    """Window sizes from "3, 6, 9"; ValueError in one sentence for anything else."""
    words = text.replace(",", " ").split()
    if (
        not words
        or len(words) > MAX_WINDOWS
        or not all(w.isdecimal() and len(w) < 9 and 1 <= int(w) <= 512 for w in words)
    ):
        raise ValueError(
            f"windows is {shown(text)}; give one to {MAX_WINDOWS} window sizes in latent frames, each 1 to 512, such as 3, 6, 9"
        )
    return list(dict.fromkeys(int(w) for w in words))


class AttentionShareNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAttentionShare",
            display_name="Attention Share",
            category=CATEGORY,
            description="Measures how much attention each cached frame gets, for windows of several sizes.",
            search_aliases=["attention sink", "kv cache", "AdaState"],
            inputs=[
                io.Model.Input("model", tooltip="A causal Wan 2.1 text-to-video model, from Load Diffusion Model."),
                io.Conditioning.Input("positive", tooltip="One plain text prompt."),
                widget(io.Int, "width", default=832, min=16, max=8192, step=16, tooltip="Width in pixels."),
                widget(io.Int, "height", default=480, min=16, max=8192, step=16, tooltip="Height in pixels."),
                widget(
                    io.String,
                    "windows",
                    default="3, 6, 9",
                    tooltip="Window sizes in latent frames. Each is rolled out until it is full, and measured in the chunk "
                    "after.",
                ),
                widget(io.Int, "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Seed of the rollouts."),
                api.Anchor.Input(
                    "anchor",
                    optional=True,
                    tooltip="Whose share is wanted. Empty: what the checkpoint was trained with, else none.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="A plot, one panel a window."),
                io.String.Output("json", display_name="JSON", tooltip="The numbers, by frame and by layer."),
            ],
        )

    @classmethod
    def check(cls, width: int | None = None, height: int | None = None, windows: str | None = None) -> str | None:
        if windows is not None:
            try:
                parse_windows(windows)
            except ValueError as error:
                return str(error)
        return check_size(width, height)

    @classmethod
    def execute(
        cls, model: Any, positive: Any, width: int, height: int, windows: str, seed: int, anchor: Anchor | None = None
    ) -> io.NodeOutput:
        jobs = []
        for window in parse_windows(windows):
            request = Request(
                model, positive, width, height, 81, 1, seed, 0, 0.0, 0, window, "auto", anchor,
                sigmas=None, start_latent=None, resume=None, stream=None, keep_latents=False,
            )  # fmt: skip
            job = Job(request)
            kept = job.spec.anchor.frames - job.spec.anchor.state_frames
            jobs.append((window, job, -(-(window + kept) // job.spec.chunk_frames) + 1))
        progress = Progress(sum(chunks * (len(job.schedule.sigmas) + 1) for _, job, chunks in jobs))
        found = [(window, measure_share(job.rollout(progress), chunks)) for window, job, chunks in jobs]
        return io.NodeOutput(share_plot(found), json.dumps(share_table(found), indent=1))


class CompareNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateCompare",
            display_name="Compare Videos",
            category=CATEGORY,
            description="Puts two to four videos side by side into one, with running meters under each. Save Video keeps it.",
            has_intermediate_output=True,
            inputs=[
                io.Video.Input("video_a", tooltip="The first video; its frame rate is the result's."),
                io.Video.Input("video_b", tooltip="The second video."),
                io.Video.Input("video_c", optional=True, tooltip="A third video."),
                io.Video.Input("video_d", optional=True, tooltip="A fourth video."),
                widget(
                    io.String,
                    "labels",
                    default="A, B, C, D",
                    tooltip="What is written above each, separated by commas, in the order of the inputs.",
                ),
            ],
            outputs=[
                io.Video.Output("video", display_name="VIDEO", tooltip="A file in the host's temp folder."),
                io.String.Output("json", display_name="JSON", tooltip="The meters of every video, by second."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, video_a: Any, video_b: Any, labels: str, video_c: Any = None, video_d: Any = None
    ) -> io.NodeOutput:
        videos = [video for video in (video_a, video_b, video_c, video_d) if video is not None]
        names = [name.strip() for name in labels.split(",")][: len(videos)]
        names += [""] * (len(videos) - len(names))
        comparison = Comparison([video.get_stream_source() for video in videos], names)
        try:
            width, height = comparison.size
            target = new_file("AdaState_comparison", ".mp4", width, height, kind="temp")
            progress = Progress(max(video.get_frame_count() for video in videos))
            with VideoSink(target.path, width, height, comparison.rate, metadata=save_metadata(cls.hidden)) as sink:
                for frame in comparison:
                    sink.write(torch.from_numpy(frame)[None])
                    progress.step()
        finally:
            comparison.close()
        shown = ui.PreviewVideo([target.result()]).as_dict()
        numbers = json.dumps(comparison.numbers(), indent=1)
        return io.NodeOutput(api.InputImpl.VideoFromFile(str(target.path)), numbers, ui=shown)


NODES = [AttentionShareNode, CompareNode]
