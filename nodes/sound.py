"""AUDIO as the host's nodes give it, as the pack takes it."""

from __future__ import annotations

from typing import Any

import torch

from ..adastate_core.audio.track import Sound


def sound_of(audio: Any, what: str = "audio") -> Sound:
    """An AUDIO, {"waveform": [1, channels, samples], "sample_rate"}, as a Sound. ValueError for what is no sound, or many."""
    waveform, rate = audio["waveform"], audio["sample_rate"]
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 3 or not waveform.shape[1]:
        shape = list(waveform.shape) if isinstance(waveform, torch.Tensor) else type(waveform).__name__
        raise ValueError(f"{what} has a waveform {shape}; it must be [1, channels, samples]: connect Load Audio")
    if waveform.shape[0] != 1:
        raise ValueError(f"{what} holds {waveform.shape[0]} sounds at once; connect one of them")
    if not isinstance(rate, int) or rate < 1:
        raise ValueError(f"{what} has a sample_rate of {rate!r}; it must be a whole number above 0: connect Load Audio")
    if not waveform.shape[2]:
        raise ValueError(f"{what} has no sample in it; connect a sound that lasts")
    return Sound(_floats(waveform[0].detach().cpu()), rate)


def _floats(waveform: torch.Tensor) -> torch.Tensor:
    """Samples of any type as float32; whole numbers are of their type's full scale."""
    if not waveform.is_floating_point():
        return (waveform.double() / -torch.iinfo(waveform.dtype).min).float()
    return waveform.float().nan_to_num().contiguous()
