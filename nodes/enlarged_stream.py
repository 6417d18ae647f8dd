"""Streams that are enlarged on their way to the files: the widgets, what is asked for, and what a state says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..adastate_core.geometry import LatentSpace
from ..adastate_core.rollout import RolloutState
from ..adastate_core.video.enlarging import HELD, MODELS, MULTIPLIER, SIZE, file_frames
from ..adastate_core.video.picture_forms import VALUE_BYTES
from .host import api
from .host.api import io, widget
from .host.enlarger import HostEnlarger

_MOST_TIMES = 8.0


def enlarging_widgets() -> list[io.Input]:
    """The inputs of every node that streams a rollout; last, so that saved workflows keep their widgets."""
    return [
        io.UpscaleModel.Input(
            "upscale_model",
            optional=True,
            tooltip="Load Upscale Model's: every frame is enlarged by it before it is written. Previews, meters and what the model "
            "looks back to stay as they are.",
        ),
        api.InterpModel.Input(
            "interp_model",
            optional=True,
            tooltip="Load Frame Interpolation Model's, on hosts that have it: makes in-betweens, so that the file shows more "
            "frames a second and lasts as long.",
        ),
        widget(
            io.Int,
            "frame_multiplier",
            default=2,
            min=2,
            max=16,
            optional=True,
            advanced=True,
            tooltip="With interp_model: the file's frames a second are fps times this.",
        ),
        widget(
            io.Float,
            "upscale_by",
            default=0.0,
            min=0.0,
            max=_MOST_TIMES,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="With upscale_model: how many times as wide and high the file is, to the nearest even size; what the model "
            "makes is scaled to it. 0 = as the model makes it. 832x480 by 2.25 is 1872x1080.",
        ),
    ]


@dataclass(frozen=True)
class Enlarging:
    """What of a stream is enlarged: at least one of the models is given."""

    upscale_model: Any = field(repr=False)
    interp_model: Any = field(repr=False)
    frame_multiplier: int = 2
    upscale_by: float = 0.0

    @staticmethod
    def asked(upscale_model: Any, interp_model: Any, frame_multiplier: int, upscale_by: float) -> Enlarging | None:
        """None where no model is connected."""
        if upscale_model is None and interp_model is None:
            return None
        return Enlarging(upscale_model, interp_model, frame_multiplier, upscale_by)

    @property
    def multiplier(self) -> int:
        """Pictures in the file for each of the decoder's."""
        return 1 if self.interp_model is None else self.frame_multiplier

    def size(self, width: int, height: int) -> tuple[int, int]:
        """What pictures of this size become."""
        if self.upscale_model is None:
            return width, height
        if not self.upscale_by:
            return width * self.upscale_model.scale, height * self.upscale_model.scale
        return tuple(max(2, 2 * round(side * self.upscale_by / 2)) for side in (width, height))

    def enlarger(self, width: int, height: int) -> HostEnlarger:
        """What does it, for decoded pictures of this size. ValueError for models that cannot be used."""
        target = self.size(width, height)
        return HostEnlarger(self.upscale_model, self.interp_model, self.multiplier, (width, height), target)


@dataclass(frozen=True)
class FileForm:
    """What a stream's files are: their pictures' size, their rate, and how many stand for one of the decoder's."""

    width: int
    height: int
    rate: Fraction
    multiplier: int = 1

    @staticmethod
    def of(enlarging: Enlarging | None, width: int, height: int, fps: float) -> FileForm:
        rate = Fraction(fps).limit_denominator(1001)
        if enlarging is None:
            return FileForm(width, height, rate)
        return FileForm(*enlarging.size(width, height), rate * enlarging.multiplier, enlarging.multiplier)

    def frames(self, pictures: int) -> int:
        """In a file of the first so many decoded pictures."""
        return file_frames(pictures, self.multiplier)

    def first(self, pictures: int, looks_back: bool) -> int:
        """The number, from frame 0, of the first file frame that comes after so many decoded pictures."""
        return self.frames(pictures) if looks_back else pictures * self.multiplier

    def said(self, pictures: int | None) -> dict[str, Any]:
        """JSON-able, of a video of so many decoded pictures; None where nobody knows how many they will be."""
        return {
            "width": self.width, "height": self.height, "fps": float(self.rate),
            "frames": None if pictures is None else self.frames(pictures), "frames_for_one": self.multiplier,
        }  # fmt: skip

    def in_words(self, pictures: int | None) -> str:
        frames = "as many frames as are made" if pictures is None else f"{self.frames(pictures)} frames"
        return f"{self.width}x{self.height} at {float(self.rate):g} fps, {frames}"


def kept_of(form: FileForm, models: list[str]) -> dict[str, Any]:
    """What a state says of the files of its enlarged stream."""
    return {SIZE: [form.width, form.height], MULTIPLIER: form.multiplier, MODELS: models}


def check_joined(resume: RolloutState, form: FileForm, decoded: tuple[int, int]) -> None:
    """ValueError, with both values, if frames as `form` cannot be put behind those of a state's files."""
    (width, height), multiplier = resume.stream.get(SIZE, decoded), resume.stream.get(MULTIPLIER, 1)
    theirs, ours = f"{width}x{height}", f"{form.width}x{form.height}"
    if theirs != ours:
        raise ValueError(
            f"join is on, but the state's files hold frames of {theirs} and this stream makes {ours}; connect the upscale_model "
            "(and upscale_by) that they were made with, or turn join off"
        )
    if multiplier != form.multiplier:
        raise ValueError(
            f"join is on, but the state's files hold {_frames(multiplier)} for each that is decoded and this stream makes "
            f"{form.multiplier}; connect the interp_model (and frame_multiplier) that they were made with, or turn join off"
        )


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def resume_notes(
    resume: RolloutState, form: FileForm, models: list[str], joins: bool, looks_back: bool, space: LatentSpace
) -> list[str]:
    """What may surprise about an enlarged stream that goes on from a state, a sentence each."""
    before, told = resume.stream.get(MODELS), []
    frame = space.pictures(resume.emitted)
    if joins and before is not None:
        for name, old, new in zip(("upscale_model", "interp_model"), before, models, strict=True):
            if old != new:
                told.append(
                    f"the state's files were made with {name} {old or 'none'} and this stream has {new or 'none'}: the frames look "
                    f"different from frame {frame} on"
                )
    if form.multiplier > 1 and resume.emitted and not looks_back:
        told.append(
            f"the state keeps no frame to make in-betweens from, so there are none of the frames {frame - 1} and {frame}"
        )
    return told


def stream_bytes(
    form: FileForm,
    takes: str,
    pictures: int,
    decoded: tuple[int, int, int],
    decoder_bytes: int,
    enlarger: HostEnlarger | None,
) -> dict[str, Any]:
    """What a memory plan's Beside has of a stream whose files take pictures in the form `takes`. `pictures`: that a chunk decodes
    to, of `decoded` batch, width and height. `decoder_bytes`: what a decode takes beside its cache."""
    (batch, width, height), betweens = decoded, form.multiplier > 1
    told = {
        "streams": True,
        "pictures": pictures * form.multiplier,
        "picture_bytes": 3 * batch * form.width * form.height * VALUE_BYTES[takes],
        "decoder_bytes": decoder_bytes,
    }
    if enlarger is None:
        return told
    picture = 12 * form.width * form.height
    return told | {
        "enlarging_bytes": enlarger.weight_bytes + max(0, enlarger.working_bytes - decoder_bytes),
        # the last one of each item, two under way, and the decoder's own of a chunk for previews
        "enlarging_host_bytes": picture * (2 + (batch if betweens else 0)) + 3 * pictures * batch * width * height,
        "held_bytes": 12 * batch * width * height if betweens else 0,
    }


def holds_frame(stream: Mapping[str, Any]) -> bool:
    """Whether a state keeps the last decoded picture for in-betweens."""
    return HELD in stream
