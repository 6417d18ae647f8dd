"""What a rollout may start from besides noise: pictures, and the end of a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adastate_core.bounds import BOUNDS
from ..adastate_core.geometry import LatentSpace
from .host import codec
from .host.api import io, schema, widget
from .host.node import Node
from .host.pictures import CROPS, SCALERS, scaled, video_tail
from .host.vae_family import check_encoder
from .inputs import check_fps, check_size, number, require_multiples

MAX_FRAMES = 1025
MODELS_FPS = -1.0  # the frames a second that the models of the VAE's latent space make
AREAS = ("832x480", "1280x720", "64x64", "1280x704")  # the sizes that models are made for


class ContinueVideoNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateContinueVideo",
            display_name="Continue Video",
            category="AdaState",
            description="Encodes a picture, or the end of a video of any length and size, for a rollout to go on from.",
            search_aliases=["image to video", "video to video", "i2v", "v2v", "extend video", "AdaState"],
            inputs=[
                io.Vae.Input("vae", tooltip="The full Wan VAE that belongs to the model."),
                number(
                    io.Int,
                    "width",
                    default=832,
                    tooltip="Width of the rollout. 0 = as the shape of the picture wants it.",
                ),
                number(
                    io.Int,
                    "height",
                    default=480,
                    tooltip="Height of the rollout. 0 = as the shape of the picture wants it.",
                ),
                widget(
                    io.Int,
                    "frames",
                    default=13,
                    min=1,
                    max=MAX_FRAMES,
                    step=4,
                    tooltip="Frames to take from the end, 4n + 1 (else the oldest are left out); of a shorter video what there "
                    "is. More show the model more of the motion.",
                ),
                widget(
                    io.Combo,
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    tooltip="Where the shape differs: center cuts off what is too much, disabled stretches.",
                ),
                io.Video.Input(
                    "video", optional=True, tooltip="A video to go on from; of a file the end alone is held in memory."
                ),
                io.Image.Input("image", optional=True, tooltip="A picture, or frames in order, instead of a video."),
                number(
                    io.Float,
                    "fps",
                    default=MODELS_FPS,
                    min=MODELS_FPS,
                    step=0.001,
                    optional=True,
                    tooltip="Takes a video's frames at this many a second, so that motion keeps its pace. -1 = as many as the "
                    "VAE's models make (Wan 2.1 16, Wan 2.2 5B 24), 0 = every frame as it is. Not used for image.",
                ),
                widget(
                    io.Combo,
                    "upscale_method",
                    options=list(SCALERS),
                    default=SCALERS[0],
                    optional=True,
                    advanced=True,
                    tooltip="How frames are scaled, as in Upscale Image; of the right size they are not touched.",
                ),
                widget(
                    io.Combo,
                    "area",
                    options=list(AREAS),
                    default=AREAS[0],
                    optional=True,
                    tooltip="With width and height 0: the size that the model is made for. A picture of another shape gets as many "
                    "pixels. 64x64 is the demo model's, 1280x704 the 5B line's.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="Connect to a rollout's start_latent."),
                io.Image.Output("pictures", display_name="IMAGE", tooltip="The frames that were taken, scaled."),
                io.Int.Output(
                    "frame_count",
                    display_name="FRAMES",
                    tooltip="How many frames LATENT stands for; the rollout's length counts them, so it must be larger.",
                ),
            ],
        )

    @classmethod
    def check(cls, width: int | None = None, height: int | None = None, fps: float | None = None) -> str | None:
        return check_fps(fps, MODELS_FPS) or check_size(width, height, auto=True)

    @classmethod
    def execute(
        cls,
        vae: Any,
        width: int,
        height: int,
        frames: int,
        crop: str,
        video: Any = None,
        image: torch.Tensor | None = None,
        fps: float = MODELS_FPS,
        upscale_method: str = SCALERS[0],
        area: str = AREAS[0],
    ) -> io.NodeOutput:
        if (video is None) == (image is None):
            what = "neither video nor image is" if video is None else "both video and image are"
            raise ValueError(f"{what} connected; connect one of them, the one to go on from")
        space = check_encoder(vae).space
        require_multiples(space, width, height, "a model of this VAE")
        wanted, size_for = space.whole(frames), _follows(space, width, height, area)

        def fitted(pictures: torch.Tensor) -> torch.Tensor:
            return scaled(pictures, *size_for(pictures), upscale_method, crop)

        if video is not None:
            found = video_tail(video, wanted, space.fps if fps == MODELS_FPS else fps, fitted)
        elif len(image):
            found = fitted(image[-wanted:, ..., :3])
        else:
            raise ValueError("image holds no picture; connect one with pictures in it")
        kept = space.whole(len(found))
        pictures = found[-kept:]
        return io.NodeOutput({"samples": codec.encode(vae, pictures)}, pictures, kept)


def _follows(space: LatentSpace, width: int, height: int, area: str) -> Callable[[torch.Tensor], tuple[int, int]]:
    """(width, height) for pictures [n, H, W, 3]: as given, or in their shape where a side is 0."""
    across, down = map(int, area.split("x"))

    def size_for(pictures: torch.Tensor) -> tuple[int, int]:
        high, wide = pictures.shape[1:3]
        if width and height:
            return width, height
        if width or height:
            found = (
                (width, space.side_like(width, wide, high)) if width else (space.side_like(height, high, wide), height)
            )
        else:
            found = space.size_like(wide, high, across * down)
        return tuple(min(side, int(BOUNDS[name].most)) for name, side in zip(("width", "height"), found, strict=True))

    return size_for


NODES = [ContinueVideoNode]
