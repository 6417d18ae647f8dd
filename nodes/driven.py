"""What a model that hears is driven by and shows: its sound, the length that follows from it, and its reference picture."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..adastate_core.audio.driving import CHUNK, STRIDE, DrivingSound
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.bounds import BOUNDS
from ..adastate_core.families.family import Family
from ..adastate_core.geometry import LatentSpace
from .host import codec
from .host import model as host_model
from .host.pictures import CROPS, SCALERS, scaled
from .host.speech_model import sound_shape
from .host.vae_family import check_vae, is_tiny

# the length of a video that is as long as its sound
FOLLOWS_SOUND = -1
SILENT = "the model is driven by sound and audio is not connected, so it hears silence; connect AdaState Audio to audio"
# pictures of a still clip whose second latent frame stands for what stood still before the video
_STILL = 5


def check_track(model: Any, family: Family, audio: AudioTrack | None) -> None:
    """ValueError, in a sentence, for an ADASTATE_AUDIO that a MODEL is not driven by."""
    if audio is None:
        return
    if not family.driven_by_sound:
        raise ValueError(
            f"audio is connected, and a model of {family.name} hears nothing: connect the sound to the audio input of Stream To "
            "Video, whose file then carries it, or load a Wan 2.2 S2V model"
        )
    if not audio.layers:
        raise ValueError(
            "audio holds a sound and not what is heard in it; connect Audio Encoder Encode, or Demo Ear for the demo model, to "
            "encoded of AdaState Audio"
        )
    layers, channels = sound_shape(model)
    found = len(audio.layers), audio.layers[0].shape[2]
    if found != (layers, channels):
        raise ValueError(
            f"audio has {found[0]} layers of {found[1]} channels and the model hears {layers} of {channels}: encode the sound with "
            "wav2vec2 large (wav2vec2_large_english)"
        )


def rate_of(audio: AudioTrack | None, stream_fps: float) -> float:
    """Video frames a second that are asked for; 0 for the model's own. ValueError where sound and stream ask for two."""
    asked = 0.0 if audio is None else audio.fps
    if asked and stream_fps and not math.isclose(asked, stream_fps, rel_tol=1e-6):
        raise ValueError(
            f"fps is {asked:g} in AdaState Audio and {stream_fps:g} in the stream, so sound and pictures would part; set one of "
            "them to 0"
        )
    return asked or stream_fps


def driving_sound(family: Family, audio: AudioTrack | None, alignment: str, fps: float) -> DrivingSound | None:
    """What the passes are driven by, None for a model that hears nothing."""
    return DrivingSound(audio, fps, alignment) if family.driven_by_sound else None


def length_of(length: int, audio: AudioTrack | None, sound: DrivingSound | None, space: LatentSpace) -> int:
    """A rollout's length in pictures, FOLLOWS_SOUND resolved: whole latent frames that all of the sound is seen in. ValueError
    where there is no sound to follow."""
    if length != FOLLOWS_SOUND:
        return length
    if audio is None or sound is None:
        raise ValueError(
            f"length is {FOLLOWS_SOUND}, which stands for as long as the sound, and audio is not connected; connect AdaState "
            "Audio, or give a length"
        )
    heard = audio.frames(sound.fps)
    ahead = 0 if sound.alignment == CHUNK else STRIDE - 1  # one picture, or four, of the first latent frame
    length = space.pictures(max(1, -(-(heard + ahead) // STRIDE)))
    if length > (most := int(BOUNDS["length"].most)):
        raise ValueError(f"the sound lasts {heard} pictures, and a video has at most {most}; give a length")
    return length


def sound_told(sound: DrivingSound | None, pictures: int | None, carried: bool) -> list[str]:
    """What may surprise about the sound of a video of so many pictures (None: without an end), a sentence each. `carried`: its
    files carry the sound, and tell that it is shorter or longer."""
    if sound is None:
        return []
    if sound.track is None:
        return [SILENT]
    if carried or pictures is None:
        return []
    heard, shown = sound.track.frames(sound.fps) / sound.fps, pictures / sound.fps
    if abs(heard - shown) * sound.fps < 2 * STRIDE:
        return []
    if heard > shown:
        return [f"the sound lasts {heard:.6g} s and the video {shown:.6g} s: the rest of the sound drives nothing"]
    return [f"the sound lasts {heard:.6g} s and the video {shown:.6g} s: from its end on the model hears silence"]


class Reference:
    """A picture [n, H, W, 3], to be encoded by a stream's VAE, or a LATENT whose newest frame it is, of `size` (B, h, w) in latent
    pixels. ValueError, in a sentence, for what cannot be one."""

    def __init__(
        self, given: Any, space: LatentSpace, size: tuple[int, int, int], vae: Any = None, model: Any = None
    ) -> None:
        self.given, self.space, self.size, self.vae, self.model = given, space, size, vae, model
        self._check_latent() if isinstance(given, dict) else self._check_picture()

    def _check_latent(self) -> None:
        (batch, height, width), samples = self.size, self.given["samples"]
        shape = list(samples.shape)
        if len(shape) != 5 or shape[0] not in (1, batch) or shape[1] != self.space.channels or not shape[2]:
            raise ValueError(
                f"reference is a LATENT {shape}; it must be a {self.space.name} one [1 or {batch}, {self.space.channels}, frames, "
                "h, w]: connect the picture itself, or encode it with Continue Video"
            )
        if shape[3:] != [height, width]:
            found, wanted = (
                "x".join(str(self.space.stride * n) for n in hw[::-1]) for hw in (shape[3:], (height, width))
            )
            raise ValueError(
                f"reference is {found} and the rollout {wanted}; connect the picture itself, which is scaled"
            )

    def _check_picture(self) -> None:
        batch, count = self.size[0], len(self.given)
        if count not in (1, batch):
            raise ValueError(f"reference holds {count} pictures for batch_size {batch}; connect one")
        if self.vae is None:
            raise ValueError(
                "reference is a picture and there is no stream whose VAE could encode it: connect Stream To Video, or the "
                "picture's LATENT (Continue Video)"
            )
        if is_tiny(self.vae, family := check_vae(self.vae, self.space)):
            raise ValueError(
                "reference is a picture and the stream's VAE is a tiny one, which decodes only: connect the picture's LATENT "
                f"(Continue Video with the full VAE; {family.full_examples})"
            )

    def latent(self) -> torch.Tensor:
        """[B, C, 1, h, w] float32 in the model's space; a picture is encoded as a clip in which it stands still."""
        batch, height, width = self.size
        if isinstance(self.given, dict):
            found = self.given["samples"][:, :, -1:]
        else:
            sides = (self.space.stride * width, self.space.stride * height)
            pictures = scaled(self.given[..., :3], *sides, SCALERS[0], CROPS[0])
            stills = [codec.encode(self.vae, picture.expand(_STILL, -1, -1, -1)) for picture in pictures[:, None]]
            found = torch.cat([still[:, :, -1:] for still in stills])
        return host_model.to_model_space(self.model, found.float()).expand(batch, -1, -1, -1, -1).cpu()


def check_reference(model: Any, family: Family, given: Any, size: tuple[int, int, int], vae: Any) -> Reference | None:
    """What is connected as reference of a MODEL, checked; None where nothing is. ValueError, in a sentence, for a model that shows
    none, and for what cannot be one."""
    if given is None:
        return None
    if not family.driven_by_sound:
        raise ValueError(
            f"reference is connected, and a model of {family.name} shows none: connect the picture to start_latent through "
            "Continue Video, or load a Wan 2.2 S2V model"
        )
    return Reference(given, family.space, size, vae, model)
