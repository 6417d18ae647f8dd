"""Frames out: streamed while a rollout runs, or decoded and rendered afterwards, never all at once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from ..adastate_core.audio.placed import PlacedSound
from ..adastate_core.geometry import LatentSpace
from ..adastate_core.video.frame_writer import FrameWriter
from ..adastate_core.video.picture_forms import VALUE_BYTES
from ..adastate_core.video.sink import CODECS, VideoSink
from .enlarged_stream import Enlarging, enlarging_widgets
from .host import api
from .host.api import io, schema, ui, widget
from .host.codec import LATENT_SPACES, HostDecoder
from .host.node import Node
from .host.output_files import VIDEO_SUFFIX, check_prefix, new_file, save_metadata
from .host.progress import Progress
from .host.vae_family import check_latent_shape, check_vae
from .inputs import check_fps, number
from .output import StreamSettings
from .sound import audio_input, sound_of

CATEGORY = "AdaState/video"


def fps_widget(follows: str = "as many as the model makes (Wan 2.1 16, Wan 2.2 5B 24)") -> io.Input:
    """`follows`: what 0 stands for."""
    return number(io.Float, "fps", default=0.0, step=0.001, tooltip=f"Frames a second; 0 = {follows}.")


def _file_widgets(prefix: str, fps: io.Input) -> list[io.Input]:
    return [
        widget(io.String, "filename_prefix", default=prefix, tooltip="Where the video goes, in the host's folder."),
        fps,
        widget(
            io.Combo,
            "codec",
            options=list(CODECS),
            default="h264",
            tooltip="h264 plays everywhere; hevc and av1 (8 or 10 bit) are smaller, for players that have them; prores (.mov) and "
            "ffv1 (.mkv, RGB in 16 bits) are for editors.",
        ),
        widget(
            io.Int,
            "quality",
            default=18,
            min=0,
            max=51,
            tooltip="Constant rate factor: lower is better and larger. Not used by prores and ffv1.",
        ),
    ]


def latent_space_widget() -> io.Input:
    """What a tiny VAE is fed; the same on every node that takes a vae."""
    return widget(
        io.Combo,
        "latent_space",
        options=list(LATENT_SPACES),
        default="auto",
        optional=True,
        advanced=True,
        tooltip="For a tiny VAE (TAEHV): the latents it was trained on, VAE Decode's (vae) or the model's own (model). auto takes "
        "model for a float16 file (taew2_1) and vae for any other (lighttaew2_1, lighttaew2_2); taew2_1 saved in another type, and "
        "taew2_2, need model.",
    )


def history_widgets() -> list[io.Input]:
    return [
        widget(
            io.Int,
            "history_chunks",
            default=0,
            min=0,
            max=2**20,
            optional=True,
            advanced=True,
            tooltip="Keeps a state every so many chunks, to make the video again from there (chunk on Load Rollout State). 0 = "
            "none. A state weighs the cached frames (0.27 GiB each at 832x480 with 1.3B), the VAE's cache (there 1.8 GiB; a tiny "
            "one's is small) and all latents if they are kept. It is written beside the rollout.",
        ),
        widget(
            io.Int,
            "history_states",
            default=8,
            min=1,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="At most so many are kept on disk: when one more would come, every other one goes and the distance doubles.",
        ),
    ]


def autosave_widget() -> io.Input:
    return widget(
        io.Float,
        "autosave_seconds",
        default=60.0,
        min=0.0,
        max=86400.0,
        step=1.0,
        optional=True,
        tooltip="Seconds between two states that are saved beside the video, at least; more where saving takes over "
        "1 % of the time, ten minutes at most. Always when a run ends early; 0 = only then. They go when the video is "
        "whole.",
    )


def keep_state_widget() -> io.Input:
    return widget(
        io.Boolean,
        "keep_state",
        default=False,
        optional=True,
        tooltip="A whole video leaves its state beside it too, so that it can be extended without making it again. A "
        "state weighs as much as with history_chunks.",
    )


def join_widget(how: str) -> io.Input:
    """`how`: a sentence on what is done with the old file."""
    return widget(io.Boolean, "join", default=False, optional=True, tooltip=f"When resuming: {how}")


def run_widgets() -> list[io.Input]:
    """The last inputs of every node that streams a rollout: what its VAE is fed, which states are left, what is enlarged."""
    return [latent_space_widget(), *history_widgets(), keep_state_widget(), *enlarging_widgets()]


def check_prefix_of(filename_prefix: str | None, kind: str) -> str | None:
    reason = check_prefix(filename_prefix, VIDEO_SUFFIX, kind) if filename_prefix is not None else None
    return reason and f"filename_prefix {reason}"


class StreamOutputNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateStreamOutput",
            display_name="Stream To Video",
            category=CATEGORY,
            description="Decodes a rollout while it runs and writes the frames to a video that plays even if the run is killed.",
            search_aliases=["stream", "mp4", "autosave", "prores", "hevc", "av1", "ffv1", "10 bit"],
            inputs=[
                io.Vae.Input("vae", tooltip="The Wan VAE that belongs to the model, full or tiny."),
                *_file_widgets("video/AdaState", fps_widget()),
                widget(io.Boolean, "preview", default=True, tooltip="Show the newest frames on the rollout node."),
                autosave_widget(),
                join_widget("copy the old video's packets in front, so that one file holds everything."),
                *run_widgets(),
                audio_input("Without it, the file carries the sound that drives the rollout, if any."),
            ],
            outputs=[api.Stream.Output("stream", display_name="STREAM", tooltip="Connect to a rollout's stream.")],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None, fps: float | None = None) -> str | None:
        return check_prefix_of(filename_prefix, "output") or check_fps(fps)

    @classmethod
    def execute(
        cls,
        vae: Any,
        filename_prefix: str,
        fps: float,
        codec: str,
        quality: int,
        preview: bool,
        autosave_seconds: float = 60.0,
        join: bool = False,
        latent_space: str = "auto",
        history_chunks: int = 0,
        history_states: int = 8,
        keep_state: bool = False,
        upscale_model: Any = None,
        interp_model: Any = None,
        frame_multiplier: int = 2,
        upscale_by: float = 0.0,
        audio: Any = None,
    ) -> io.NodeOutput:
        settings = StreamSettings(
            vae, filename_prefix, fps, codec, quality, preview, autosave_seconds, join, latent_space,
            history_chunks, history_states, keep_state,
            enlarging=Enlarging.asked(upscale_model, interp_model, frame_multiplier, upscale_by),
            sound=None if audio is None else sound_of(audio),
        )  # fmt: skip
        return io.NodeOutput(settings)


class DecodeNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDecode",
            display_name="Streaming VAE Decode",
            category=CATEGORY,
            description="Decodes a video latent frame by frame with the VAE's own cache: the pictures of VAE Decode, at a memory "
            "that does not grow with the length.",
            search_aliases=["VAE decode", "long video decode"],
            inputs=[
                io.Latent.Input("latent", tooltip="A Wan 2.1 or Wan 2.2 5B video latent."),
                io.Vae.Input(
                    "vae", tooltip="The Wan VAE that belongs to the latent, full or tiny (taew2_1, lighttaew2_1, ...)."
                ),
                widget(
                    io.Int,
                    "frames_per_call",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Latent frames a decoder call. 1 gives the bits of VAE Decode, but for long videos on several threads "
                    "(1e-5); more can be faster and is exact to rounding.",
                ),
                latent_space_widget(),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE", tooltip="Frames; batch items one after another.")],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], vae: Any, frames_per_call: int = 1, latent_space: str = "auto"
    ) -> io.NodeOutput:
        samples, space = _video_samples(latent, vae)
        batch, frames = samples.shape[0], samples.shape[2]
        pictures, progress = None, Progress(batch * frames)
        for item in range(batch):
            at = item * space.pictures(frames)
            for part in decoded(vae, samples[item : item + 1], progress, frames_per_call, latent_space):
                if pictures is None:
                    pictures = part.new_empty((batch * space.pictures(frames), *part.shape[2:]))
                pictures[at : at + part.shape[1]] = part[0]
                at += part.shape[1]
        return io.NodeOutput(pictures)


class RenderVideoNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateRenderVideo",
            display_name="Render Video",
            category=CATEGORY,
            description="Decodes a video latent straight into a video file, never holding all frames. Save Video keeps it.",
            has_intermediate_output=True,
            inputs=[
                io.Latent.Input("latent", tooltip="A Wan 2.1 or Wan 2.2 5B video latent."),
                io.Vae.Input(
                    "vae", tooltip="The Wan VAE that belongs to the latent, full or tiny (taew2_1, lighttaew2_1, ...)."
                ),
                *_file_widgets("AdaState", fps_widget("as many as the VAE's models make (Wan 2.1 16, Wan 2.2 5B 24)")),
                latent_space_widget(),
                audio_input("It begins with the first frame."),
            ],
            outputs=[io.Video.Output("video", display_name="VIDEO", tooltip="A file in the host's temp folder.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None, fps: float | None = None) -> str | None:
        return check_prefix_of(filename_prefix, "temp") or check_fps(fps)

    @classmethod
    def execute(
        cls,
        latent: dict[str, Any],
        vae: Any,
        filename_prefix: str,
        fps: float,
        codec: str,
        quality: int,
        latent_space: str = "auto",
        audio: Any = None,
    ) -> io.NodeOutput:
        samples, space = _video_samples(latent, vae)
        sound = None if audio is None else PlacedSound(sound_of(audio))
        height, width = (side * space.stride for side in samples.shape[3:])
        target = new_file(filename_prefix, CODECS[codec].suffix, width, height, kind="temp")
        progress = Progress(samples.shape[0] * samples.shape[2])
        rate = Fraction(fps or space.fps).limit_denominator(1001)
        metadata = save_metadata(cls.hidden)
        sink = VideoSink(target.path, width, height, rate, codec, quality, metadata, sound=sound)
        most = space.temporal_stride * height * width * 3 * VALUE_BYTES[sink.takes]
        try:
            with sink, FrameWriter([sink], most) as writer:
                for item in range(samples.shape[0]):
                    latents = samples[item : item + 1]
                    for part in decoded(
                        vae, latents, progress, latent_space=latent_space, takes=writer.takes, fast=True
                    ):
                        writer.give(part)
        except BaseException:
            if not sink.frames:  # it shows nothing
                target.path.unlink(missing_ok=True)
            raise
        return io.NodeOutput(
            api.InputImpl.VideoFromFile(str(target.path)), ui=ui.PreviewVideo([target.result()]).as_dict()
        )


def _video_samples(latent: dict[str, Any], vae: Any) -> tuple[torch.Tensor, LatentSpace]:
    """The samples of a video, and the space of the VAE that they belong to; ValueError where they do not."""
    samples, family = latent["samples"], check_vae(vae)
    check_latent_shape(samples.shape, family)
    return samples, family.space


def decoded(
    vae: Any,
    samples: torch.Tensor,
    progress: Progress,
    frames_per_call: int = 1,
    latent_space: str = "auto",
    takes: str | None = None,
    fast: bool = False,
) -> Any:
    """Pictures [1, t, H, W, 3] of one item's latents [1, C, n, h, w], call by call, as HostDecoder.step gives them."""
    decoder = HostDecoder(vae, frames_per_call, latent_space, fast)
    decoder.load(samples.shape)
    first, *rest = samples[:, :, :1], *samples[:, :, 1:].split(decoder.latents_a_call, dim=2)
    for part in (first, *rest):
        if part.shape[2]:
            yield decoder.step(part, takes)
            progress.step(part.shape[2])


NODES = [StreamOutputNode, DecodeNode, RenderVideoNode]
