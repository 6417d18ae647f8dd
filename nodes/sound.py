"""AUDIO and the sound of a VIDEO as the host's nodes give them, as the pack takes them; what is told of a sound beside a video."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import torch

from ..adastate_core.audio.placed import PlacedSound
from ..adastate_core.audio.track import Sound
from ..adastate_core.video.sound_file import RATES, NoSound, read_sound
from .host.api import io
from .host.node import shown
from .host.pictures import sound_source

log = logging.getLogger("adastate")
_LOUDEST = 1024.0  # 60 dB above full scale; what is far beyond no encoder takes for a sample


def audio_input(what: str) -> io.Input:
    """The last input of a node that writes files with sound; `what` says more of it, in a sentence."""
    return io.Audio.Input(
        "audio",
        optional=True,
        tooltip=f"The sound of the video, from Load Audio or any node that gives AUDIO: cut where the video ends, silence where it "
        f"is shorter. {what}",
    )


def told_at_once(sentences: list[str]) -> list[str]:
    """The same, in the server's log by now: a report comes when all is over."""
    for sentence in sentences:
        log.warning("%s", sentence)
    return sentences


def sound_notes(sound: Sound, offset: float, seconds: float | None, least: float) -> list[str]:
    """What may surprise about a sound, `offset` seconds of it before the first picture, beside a video of so many seconds (None:
    without an end): a sentence, or none where they differ by less than `least` seconds. ValueError where nothing of the sound is
    left."""
    left = sound.seconds - offset
    if left <= 0:
        raise ValueError(
            f"the sound lasts {sound.seconds:.6g} s and offset is {offset:g}, so nothing of it is left; give a smaller offset"
        )
    begins = f", {offset:g} s of it before the first picture" if offset else ""
    told = f"the sound lasts {sound.seconds:.6g} s{begins}"
    if seconds is None:
        return [f"{told}, and the video has no end: it is silent from {left:.6g} s on"]
    if abs(left - seconds) < least:
        return []
    if left > seconds:
        return [f"{told}, and the video {seconds:.6g} s: the last {left - seconds:.3g} s of the sound are cut off"]
    return [f"{told}, and the video {seconds:.6g} s: its last {seconds - left:.3g} s are silent"]


def sound_of(audio: Any, what: str = "audio") -> Sound:
    """An AUDIO, {"waveform": [1, channels, samples], "sample_rate"}, as a Sound. ValueError for what is no sound, or many."""
    waveform, rate = audio["waveform"], audio["sample_rate"]
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 3 or not waveform.shape[1]:
        shape = list(waveform.shape) if isinstance(waveform, torch.Tensor) else type(waveform).__name__
        raise ValueError(f"{what} has a waveform {shape}; it must be [1, channels, samples]: connect Load Audio")
    if waveform.shape[0] != 1:
        raise ValueError(f"{what} holds {waveform.shape[0]} sounds at once; connect one of them")
    if not isinstance(rate, int) or not RATES[0] <= rate <= RATES[1]:
        raise ValueError(
            f"{what} has a sample_rate of {shown(rate)}; it must be a whole number, {RATES[0]} to {RATES[1]}: connect Load Audio"
        )
    if not waveform.shape[2]:
        raise ValueError(f"{what} has no sample in it; connect a sound that lasts")
    return Sound(_floats(waveform[0].detach().cpu()), rate)


def video_sound(video: Any) -> PlacedSound | None:
    """The sound of a VIDEO as another one's of the same pictures has it; None, and a line in the log, where it cannot be read."""
    source, since, until = sound_source(video)
    if source is None:
        return None
    try:
        sound = sound_of(source) if isinstance(source, dict) else read_sound(source)
    except ValueError as error:
        if not isinstance(error, NoSound):
            log.warning("A video's sound is left out: %s", error)
        return None
    heard = sound.waveform if until is None else sound.waveform[:, : round(until * sound.rate)]
    return PlacedSound(Sound(heard, sound.rate), Fraction(since).limit_denominator(10**6))


def _floats(waveform: torch.Tensor) -> torch.Tensor:
    """Samples of any type as float32, all of them numbers that an encoder takes; whole ones are of their type's full scale."""
    if not waveform.is_floating_point():
        return (waveform.double() / -torch.iinfo(waveform.dtype).min).float()
    return waveform.float().nan_to_num().clamp_(-_LOUDEST, _LOUDEST).contiguous()
