"""Where the frames of a rollout go, as Stream To Video sets it, and whether a state can go on into such a stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..adastate_core.audio.track import Sound
from ..adastate_core.geometry import WAN21
from ..adastate_core.rollout import RolloutState
from ..adastate_core.video.encoder import CODECS, check_encoder
from ..adastate_core.video.frame_folder import FrameFolder
from ..adastate_core.video.frame_formats import check_format
from ..adastate_core.video.picture_forms import deepest
from .enlarged_stream import Enlarging, FileForm
from .host.codec import HostDecoder
from .sound import sound_notes


@dataclass(frozen=True)
class FrameSettings:
    """A folder of frames, as AdaStateStreamFrames sets it; `format` is one of FRAME_FORMATS."""

    filename_prefix: str
    format: str
    join: bool = False


@dataclass(frozen=True)
class StreamSettings:
    """What AdaStateStreamOutput and AdaStateStreamFrames set: where the frames of a rollout go. `video`: whether to a video, too;
    if not, filename_prefix, codec, quality and join are nobody's. `fps` 0: as many frames a second as the model makes, which a run
    puts there (builder.Request.at_rate). `sound`: what its files carry, `sound_offset` seconds of it before the video's first
    picture."""

    vae: Any = field(repr=False)
    filename_prefix: str
    fps: float
    codec: str
    quality: int
    preview: bool
    autosave_seconds: float = 60.0
    join: bool = False
    latent_space: str = "auto"
    history_chunks: int = 0
    history_states: int = 8
    keep_state: bool = False
    video: bool = True
    frames: tuple[FrameSettings, ...] = ()
    enlarging: Enlarging | None = None
    sound: Sound | None = field(default=None, repr=False)
    sound_offset: float = 0.0

    def form(self, width: int, height: int) -> FileForm:
        """What the files are of a rollout of this size."""
        return FileForm.of(self.enlarging, width, height, self.fps)

    def check_files(self, form: FileForm) -> None:
        """ValueError, in a sentence, where an encoder does not take pictures of this size and rate."""
        if self.video:
            tried = self.enlarging is not None
            check_encoder(form.width, form.height, form.rate, self.codec, self.quality, tried)
        for frames in self.frames:
            check_format(form.width, form.height, frames.format)

    @property
    def joins(self) -> bool:
        """Whether anything of it is put behind files that are there."""
        return (self.video and self.join) or any(frames.join for frames in self.frames)

    @property
    def takes(self) -> str:
        """The form in which pictures go to the files."""
        return deepest([*([CODECS[self.codec].takes] if self.video else []), *(FrameFolder.takes for _ in self.frames)])

    @property
    def prefixes(self) -> list[str]:
        """Of all that is written."""
        return [*([self.filename_prefix] if self.video else []), *(frames.filename_prefix for frames in self.frames)]

    def joined(self) -> StreamSettings:
        """The same with what is there put in front."""
        return replace(self, join=True, frames=tuple(replace(frames, join=True) for frames in self.frames))

    def carrying(self, sound: Sound, offset: float = 0.0) -> StreamSettings:
        """The same with a sound in its files, `offset` seconds of it before the first picture, unless it has one of its own."""
        return self if self.sound is not None else replace(self, sound=sound, sound_offset=offset)

    def sound_notes(self, pictures: int | None) -> list[str]:
        """What may surprise about its sound beside a video of so many decoded pictures, None without an end; ValueError where
        nothing of it is left."""
        if self.sound is None:
            return []
        seconds = None if pictures is None else pictures / self.fps
        # no length fits better than to a latent frame
        return sound_notes(self.sound, self.sound_offset, seconds, WAN21.temporal_stride / self.fps)

    @property
    def keeps_state(self) -> bool:
        """Whether a whole video leaves the state at its end: somebody asked for it, or for a history to go back into."""
        return self.keep_state or self.history_chunks > 0


def check_streamable(state: RolloutState, decoder: HostDecoder) -> None:
    """ValueError unless a stream through `decoder` can go on where `state` ends."""
    seen = state.stream.get("vae_latents_seen")
    if seen is not None and seen != state.emitted:
        raise ValueError(
            "the state's decoder cache belongs to another frame: it is damaged; resume it without a stream"
        )
    if seen is None and state.latents is None and state.emitted:
        raise ValueError(
            "the state was made without a stream and without keep_latents, so its video cannot be decoded further; "
            "resume it without a stream, or make it again with one"
        )
    if seen and state.latents is None and (reason := decoder.foreign(state.stream)):
        raise ValueError(f"{reason}; connect a VAE of the same kind, or resume without a stream")
