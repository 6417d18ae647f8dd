"""Stream To Frames: the pictures of a rollout as files of their own, for editors and pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..adastate_core.video.frame_formats import FRAME_FORMATS, require_imageio
from .enlarged_stream import Enlarging
from .host import api
from .host.api import io, schema, widget
from .host.node import Node
from .inputs import check_fps
from .sound import audio_input, sound_of
from .stream import CATEGORY, autosave_widget, check_prefix_of, fps_widget, join_widget, run_widgets
from .stream_settings import FrameSettings, StreamSettings


class StreamFramesNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateStreamFrames",
            display_name="Stream To Frames",
            category=CATEGORY,
            description="Decodes a rollout while it runs and writes every frame to a file, from the decoder's own values.",
            search_aliases=["png", "exr", "tiff", "webp", "image sequence", "frames", "save image"],
            inputs=[
                widget(
                    io.String,
                    "filename_prefix",
                    default="frames/AdaState",
                    tooltip="Where the folder of frames goes, in the host's output folder.",
                ),
                widget(
                    io.Combo,
                    "format",
                    options=list(FRAME_FORMATS),
                    default=next(iter(FRAME_FORMATS)),
                    tooltip="png (8 bit) and png16 (16 bit), with prompt and workflow in every frame; tiff16 (16 bit); exr (32-bit "
                    "float, the values as decoded, not linear light); webp (one animated picture for a page).",
                ),
                fps_widget(),
                widget(io.Boolean, "preview", default=True, tooltip="Show the newest frames on the rollout node."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The Wan VAE that belongs to the model, full or tiny. Not needed with stream.",
                ),
                api.Stream.Input(
                    "stream",
                    optional=True,
                    tooltip="STREAM of Stream To Video (or of another Stream To Frames), to write both: then its settings count, "
                    "and of this node filename_prefix, format and join.",
                ),
                join_widget(
                    "put the old frames in front, so that the new folder holds the whole video. They are linked, which takes "
                    "no room."
                ),
                autosave_widget(),
                *run_widgets(),
                audio_input("It is written beside the frames, as sound.wav."),
            ],
            outputs=[api.Stream.Output("frames", display_name="STREAM", tooltip="Connect to a rollout's stream.")],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None, fps: float | None = None) -> str | None:
        return check_prefix_of(filename_prefix, "output") or check_fps(fps)

    @classmethod
    def execute(
        cls,
        filename_prefix: str,
        format: str,
        fps: float,
        preview: bool,
        vae: Any = None,
        stream: StreamSettings | None = None,
        join: bool = False,
        autosave_seconds: float = 60.0,
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
        require_imageio()
        sound = None if audio is None else sound_of(audio)
        own = FrameSettings(filename_prefix, format, join)
        enlarging = Enlarging.asked(upscale_model, interp_model, frame_multiplier, upscale_by)
        if stream is None:
            if vae is None:
                raise ValueError("neither vae nor stream is connected; connect the VAE, or STREAM of Stream To Video")
            stream = StreamSettings(
                vae, filename_prefix, fps, "", 0, preview, autosave_seconds, False, latent_space, history_chunks,
                history_states, keep_state, video=False, enlarging=enlarging, sound=sound,
            )  # fmt: skip
        elif enlarging is not None:
            raise ValueError(
                "upscale_model or interp_model is connected beside stream; connect it to the node that stream comes from, since "
                "both write the same frames"
            )
        elif sound is not None:
            raise ValueError(
                "audio is connected beside stream; connect it to the node that stream comes from, since both carry the same sound"
            )
        if format in {frames.format for frames in stream.frames}:
            raise ValueError(
                f"stream writes {format} frames already; choose another format, or connect Stream To Video itself"
            )
        return io.NodeOutput(replace(stream, frames=(*stream.frames, own)))


NODES = [StreamFramesNode]
