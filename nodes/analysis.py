"""Nodes that measure: where a rollout's attention goes, and what sets videos apart."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.audio.placed import PlacedSound
from ..adastate_core.measure.attention_share import measure_shares, share_table
from ..adastate_core.measure.compare import Comparison
from ..adastate_core.video.sink import VideoSink
from .builder import Request
from .host import api
from .host.api import io, schema, ui, widget
from .host.model import family_of_model
from .host.node import Node, shown
from .host.output_files import Target, new_file, save_metadata
from .host.pictures import clip
from .host.progress import Progress
from .host.refusals import check_model
from .inputs import check_size, number
from .job import Job
from .plots import share_plot
from .sound import video_sound

CATEGORY = "AdaState/analysis"
MAX_WINDOWS = 8
MAX_CHUNKS = 256
SHARES = ("all", "past")
LENGTH = 81  # any: as many chunks are made as a window takes


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
                io.Model.Input("model", tooltip="A causal Wan text-to-video model, from Load Diffusion Model."),
                io.Conditioning.Input("positive", tooltip="One plain text prompt."),
                number(io.Int, "width", auto=False, default=832, tooltip="Width in pixels."),
                number(io.Int, "height", auto=False, default=480, tooltip="Height in pixels."),
                widget(
                    io.String,
                    "windows",
                    default="3, 6, 9",
                    tooltip="Window sizes in latent frames. Each is rolled out until it is full, and measured in the chunk "
                    "after.",
                ),
                number(io.Int, "seed", default=0, tooltip="Seed of the rollouts."),
                api.Anchor.Input(
                    "anchor",
                    optional=True,
                    tooltip="Whose share is wanted. Empty: what the checkpoint was trained with, else none.",
                ),
                widget(
                    io.Combo,
                    "share_of",
                    options=list(SHARES),
                    default=SHARES[0],
                    optional=True,
                    advanced=True,
                    tooltip="all = of everything a new frame attends to, itself included; past = of what is cached alone, as in "
                    "the figure on AdaState's project page.",
                ),
                widget(
                    io.Int,
                    "chunks",
                    default=0,
                    min=0,
                    max=MAX_CHUNKS,
                    optional=True,
                    advanced=True,
                    tooltip="Measures in each of so many chunks, and draws what anchor and window get over them. 0 = only in the "
                    "chunk after the window is full.",
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
        cls,
        model: Any,
        positive: Any,
        width: int,
        height: int,
        windows: str,
        seed: int,
        anchor: Anchor | None = None,
        share_of: str = SHARES[0],
        chunks: int = 0,
    ) -> io.NodeOutput:
        check_model(model)
        if (family := family_of_model(model)).driven_by_sound:
            raise ValueError(
                f"a model of {family.name} is driven by sound and shows a reference, which this node has no input for; use a "
                "text-to-video model"
            )
        jobs = []
        for window in parse_windows(windows):
            request = Request(
                model=model, positive=positive, width=width, height=height, length=LENGTH, seed=seed, window_frames=window,
                anchor=anchor, keep_latents=False,
            )  # fmt: skip
            job = Job(request)
            kept = job.spec.anchor.frames - job.spec.anchor.state_frames
            until_full = -(-(window + kept) // job.spec.chunk_frames) + 1
            jobs.append((window, job, chunks or until_full, 0 if chunks else until_full - 1))
        progress = Progress(sum(count * (len(job.schedule.sigmas) + 1) for _, job, count, _ in jobs))
        found = []
        for window, job, count, first in jobs:
            rollout = job.rollout(progress)
            try:
                found.append((window, measure_shares(rollout, count, first)))
            finally:
                rollout.close()
        if share_of == "past":
            found = [(window, [one.past for one in shares]) for window, shares in found]
        last, curves = [(window, shares[-1]) for window, shares in found], [shares for _, shares in found]
        table = share_table(last)
        for row, curve in zip(table, curves if chunks else (), strict=False):
            row["by_chunk"] = [{"labels": one.labels, "share": one.mean} for one in curve]
        return io.NodeOutput(share_plot(last, curves if chunks else ()), json.dumps(table, indent=1))


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
                io.Video.Input("video_a", tooltip="The first video; its frame rate and its sound are the result's."),
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
        videos = {"video_a": video_a, "video_b": video_b, "video_c": video_c, "video_d": video_d}
        clips = [clip(video, name) for name, video in videos.items() if video is not None]
        names = [name.strip() for name in labels.split(",")][: len(clips)]
        names += [""] * (len(clips) - len(names))
        comparison = Comparison(clips, names)
        try:
            target = cls._written(comparison, video_sound(video_a))
        finally:
            comparison.close()
        shown = ui.PreviewVideo([target.result()]).as_dict()
        numbers = json.dumps(comparison.numbers(), indent=1)
        return io.NodeOutput(api.InputImpl.VideoFromFile(str(target.path)), numbers, ui=shown)

    @classmethod
    def _written(cls, comparison: Comparison, sound: PlacedSound | None) -> Target:
        """The comparison's file, with a sound if there is one; nothing is left of it after an error or an interrupt."""
        width, height = comparison.size
        target = new_file("AdaState_comparison", ".mp4", width, height, kind="temp")
        try:
            progress = Progress(comparison.count)
            metadata = save_metadata(cls.hidden)
            with VideoSink(target.path, width, height, comparison.rate, metadata=metadata, sound=sound) as sink:
                for frame in comparison:
                    sink.write(torch.from_numpy(frame)[None])
                    progress.step()
        except BaseException:  # newer hosts' interrupts are no Exception
            with contextlib.suppress(OSError):
                target.path.unlink(missing_ok=True)
            raise
        return target


NODES = [AttentionShareNode, CompareNode]
