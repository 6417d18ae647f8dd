"""AdaState Rollout: the model rolled out chunk by chunk."""

from __future__ import annotations

from typing import Any

from ..adastate_core.anchors import Anchor
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.cache.byte_plan import CACHE_DEVICES, CACHE_DTYPES
from ..adastate_core.rope import POSITION_MODES
from ..adastate_core.schedules.schedule import Schedule
from ..adastate_core.video.encoder import CODECS
from . import endless
from .absorption_request import AbsorptionRequest
from .builder import ON_DEMAND, START_MODES, Request
from .driven import FOLLOWS_SOUND
from .host import api, links, rerun
from .host.api import ExecutionBlocker, io, schema, ui, widget
from .host.frame_folders import shown_frames
from .host.live_runs import live_run
from .host.node import Node
from .host.output_files import save_metadata
from .inputs import check_size, number
from .job import Result
from .kept_result import run
from .preflight import NO_LATENT
from .report import report_text

NO_VIDEO = (
    "VIDEO comes from Stream To Video, and this stream writes frames alone: connect Stream To Video to Stream To Frames' stream "
    "input to have both."
)
NO_STREAM = "VIDEO comes from a stream: connect Stream To Video to the rollout's stream input, or use Render Video."
OUTPUTS = ("LATENT", "STATE", "REPORT", "VIDEO")
_ON_DEMAND = frozenset(OUTPUTS.index(name) for name in ON_DEMAND)
_ONLY_LINKED = (
    "Made only if linked. If it is linked after a run, the rollout runs again from the newest state that is kept beside its video, "
    "else from the start."
)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="A causal Wan text-to-video model (2.1, or 2.2's 5B), from Load Causal Video Model."
        ),
        io.MultiType.Input(
            "positive",
            types=[io.Conditioning, api.Prompts],
            tooltip="One plain text prompt, or a Prompt Timeline (the few-step causal models use no negative).",
        ),
        number(
            io.Int,
            "width",
            default=832,
            tooltip="Width of the video in pixels; 0 = that of start_latent or of the state.",
        ),
        number(
            io.Int,
            "height",
            default=480,
            tooltip="Height of the video in pixels; 0 = that of start_latent or of the state.",
        ),
        number(
            io.Int,
            "length",
            default=81,
            min=FOLLOWS_SOUND,
            tooltip="Video frames since the first frame, also when resuming (4n + 1; 481 is 30 s at 16 fps). Memory does "
            "not depend on it. 0 = rolls until it is stopped, into a stream. -1 = as long as the sound in audio.",
        ),
        number(io.Int, "batch_size", default=1, tooltip="Videos made side by side, each from its own noise."),
        number(
            io.Int,
            "seed",
            default=0,
            control_after_generate=True,
            tooltip="The same seed gives the same video, in one run or in many.",
        ),
        number(
            io.Int,
            "steps",
            default=0,
            tooltip="Denoising steps a chunk; 0 = what the checkpoint wants (4).",
        ),
        number(
            io.Float,
            "shift",
            default=0.0,
            step=0.1,
            tooltip="Shift of the noise levels; 0 = what the checkpoint wants (5). The model's own sampling shift is not used.",
        ),
        number(
            io.Int,
            "chunk_frames",
            default=0,
            tooltip="Latent frames made at once; 0 = what the checkpoint wants (3; frame-wise models 1).",
        ),
        number(
            io.Int,
            "window_frames",
            default=-1,
            tooltip="Past latent frames that stay in the cache; -1 = what the checkpoint wants (3). Memory and time grow "
            "with it; 0 forgets everything but the anchor.",
        ),
        widget(
            io.Combo,
            "positions",
            options=["auto", *POSITION_MODES],
            default="auto",
            tooltip="How time is numbered: packed = by place in the cache, fixed = the same numbers at every chunk, "
            "absolute = by frame of the video.",
        ),
        api.Anchor.Input(
            "anchor",
            optional=True,
            tooltip="What is looked back to beyond the window. Empty: what the checkpoint was trained with, else none.",
        ),
        api.Absorption.Input(
            "absorption", optional=True, tooltip="Lets some layers forget their history; pays with long windows."
        ),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels of the steps; beats steps and shift."),
        io.Latent.Input(
            "start_latent",
            optional=True,
            tooltip="Pictures, a video (Continue Video, VAE Encode) or latents to go on from: they become the first frames.",
        ),
        api.State.Input(
            "resume", optional=True, tooltip="A rollout to go on from, from another rollout or Load Rollout State."
        ),
        api.Stream.Input(
            "stream", optional=True, tooltip="Writes the frames to a video, or to pictures, while the rollout runs."
        ),
        widget(
            io.Boolean,
            "keep_latents",
            default=True,
            optional=True,
            tooltip="Hold all latents for LATENT and in the state. Off with a stream: memory does not grow at all.",
        ),
        widget(
            io.Combo,
            "cache_dtype",
            options=list(CACHE_DTYPES),
            default=CACHE_DTYPES[0],
            optional=True,
            advanced=True,
            tooltip="How the past is held: model = in the model's own dtype; int8 and fp8 take half the memory or less, "
            "cost time and change the video, int8 less than fp8.",
        ),
        widget(
            io.Combo,
            "cache_device",
            options=list(CACHE_DEVICES),
            default=CACHE_DEVICES[0],
            optional=True,
            advanced=True,
            tooltip="Where the past is held: host memory frees the GPU of it, and copies each layer's there when it is read.",
        ),
        number(
            io.Float,
            "max_seconds",
            default=0.0,
            step=1.0,
            optional=True,
            advanced=True,
            tooltip="Stops and keeps, as the button does, once so many seconds have passed since this node began, loading "
            "included: after the chunk under way, so at least one is made. 0 = no limit.",
        ),
        widget(
            io.Combo,
            "start_mode",
            options=list(START_MODES.values()),
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Where start_latent stands: before = cached as it is, and the first chunk follows; inside = as the first "
            "frames of the first chunk, for models that were trained so. auto = as the model's preset says, else before.",
        ),
        api.AudioTrack.Input(
            "audio",
            optional=True,
            tooltip="Of Wan 2.2 S2V: the sound that drives the video, from AdaState Audio; a stream's file carries it. Without it "
            "the model hears silence.",
        ),
        io.MultiType.Input(
            "reference",
            types=[io.Image, io.Latent],
            optional=True,
            tooltip="Of Wan 2.2 S2V: the picture of who or what is seen. A picture is scaled and encoded by the stream's full VAE; "
            "of a LATENT the last frame is taken.",
        ),
    ]


class RolloutNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateRollout",
            display_name="AdaState Rollout",
            category="AdaState",
            description="Rolls a causal Wan model out chunk by chunk, at a memory that does not grow with the length.",
            search_aliases=["autoregressive", "long video", "self forcing", "causal", "AdaState"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip=f"The latents, for Streaming VAE Decode. {_ONLY_LINKED}"
                ),
                api.State.Output(
                    "state", display_name="STATE", tooltip=f"The rollout to go on from, or to save. {_ONLY_LINKED}"
                ),
                io.String.Output("report", display_name="REPORT", tooltip="What was planned and used, as JSON."),
                io.Video.Output("video", display_name="VIDEO", tooltip="The streamed file (batch item 0)."),
            ],
        )

    @classmethod
    def check(cls, width: int | None = None, height: int | None = None, length: int | None = None) -> str | None:
        return check_size(width, height, auto=True) or (endless.refused_when_queued() if length == 0 else None)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return rerun.fingerprint(inputs, _ON_DEMAND)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        width: int,
        height: int,
        length: int,
        batch_size: int,
        seed: int,
        steps: int,
        shift: float,
        chunk_frames: int,
        window_frames: int,
        positions: str,
        anchor: Anchor | None = None,
        absorption: AbsorptionRequest | None = None,
        sigmas: Any = None,
        start_latent: dict[str, Any] | None = None,
        resume: Any = None,
        stream: Any = None,
        keep_latents: bool = True,
        cache_dtype: str = CACHE_DTYPES[0],
        cache_device: str = CACHE_DEVICES[0],
        max_seconds: float = 0.0,
        start_mode: str = "auto",
        audio: AudioTrack | None = None,
        reference: Any = None,
    ) -> io.NodeOutput:
        place = rerun.executing()
        linked = rerun.linked_outputs(place, _ON_DEMAND)
        if length == 0:
            if place is not None and endless.LATENT in links.plainly_linked_slots(*place):
                raise ValueError(endless.LATENT_LINKED)
            linked -= {endless.LATENT}
        request = Request(
            model=model,
            positive=positive,
            width=width,
            height=height,
            length=length,
            batch_size=batch_size,
            seed=seed,
            steps=steps,
            shift=shift,
            chunk_frames=chunk_frames,
            window_frames=window_frames,
            positions=positions,
            anchor=anchor,
            sigmas=None if sigmas is None else Schedule.from_sigmas(sigmas).sigmas,
            start_latent=start_latent,
            start=next(start for start, words in START_MODES.items() if words == start_mode),
            resume=resume,
            stream=stream,
            keep_latents=keep_latents,
            cache_dtype=cache_dtype,
            cache_device=cache_device,
            absorption=absorption,
            max_seconds=max_seconds,
            metadata=save_metadata(cls.hidden) if stream is not None else {},
            linked=frozenset(OUTPUTS[slot] for slot in linked),
            audio=audio,
            reference=reference,
        )
        with live_run(cls.hidden) as (view, end):
            result = run(request, rerun.take_kept_files(place), view)
            end.files = [target.path for target in result.videos or result.frame_folders]
            stopped = result.report.get("stopped")
            end.stopped = stopped is not None
            end.short = end.stopped and not (request.endless and stopped["by"] in endless.WANTED)
            end.outputs = _never_empty(result)
        text = report_text(result.report)
        shown: dict[str, Any] = {"adastate_report": [text]}
        if result.videos:
            shown |= ui.PreviewVideo([target.result() for target in result.videos]).as_dict()
            if stream.codec != "h264":  # which every page plays
                shown["adastate_video"] = [{"codec": stream.codec, "mime": CODECS[stream.codec].mime}]
        elif pictures := shown_frames(result.frame_folders):
            shown |= pictures
        if result.reports:
            shown["adastate_report_files"] = [dict(target.result()) for target in result.reports]
        return io.NodeOutput(
            ExecutionBlocker(result.why_not["LATENT"]) if result.latents is None else {"samples": result.latents},
            ExecutionBlocker(result.why_not["STATE"]) if result.state is None else result.state,
            text,
            api.InputImpl.VideoFromFile(str(result.videos[0].path))
            if result.videos
            else ExecutionBlocker(NO_STREAM if stream is None or stream.video else NO_VIDEO),
            ui=shown,
        )


def _never_empty(result: Result) -> frozenset[int]:
    """The outputs on demand that may be taken from this result: those that were made, and those that no run with these inputs
    would make."""
    empty = {name for name, why in result.why_not.items() if why not in (NO_LATENT, endless.NO_LATENT)}
    return frozenset(OUTPUTS.index(name) for name in ON_DEMAND - empty)


NODES = [RolloutNode]
