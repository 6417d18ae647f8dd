"""A sound as a file has it: where the file begins in it, and its samples at any rate, with silence around them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy
import torch

from .track import Sound

_AT_ONCE = 2**16  # samples that are resampled in one call
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


@dataclass(frozen=True, eq=False)
class PlacedSound:
    """`start` seconds of the sound lie before the file's first frame; below 0 the file begins earlier, in silence."""

    sound: Sound
    start: Fraction = Fraction(0)

    @staticmethod
    def at(sound: Sound, offset: float, frame: int, rate: Fraction) -> PlacedSound:
        """For a file whose first frame is the video's `frame`, of `rate` frames a second, where `offset` seconds of the sound lie
        before the video's frame 0."""
        return PlacedSound(sound, Fraction(offset).limit_denominator(10**6) + frame / rate)

    def samples(self, first: int, count: int) -> torch.Tensor:
        """Samples `first` .. `first + count`, counted from the file's beginning: float32 [C, count]."""
        wave = self.sound.waveform
        begin = first + round(self.start * self.sound.rate)
        out = wave.new_zeros(wave.shape[0], count)
        since, until = max(begin, 0), min(begin + count, wave.shape[1])
        if since < until:
            out[:, since - begin : until - begin] = wave[:, since:until]
        return out

    def in_form(self, rate: int, channels: int) -> PlacedSound:
        """The same at another rate, of 1 or 2 channels."""
        return self if self._has(rate, channels) else PlacedSound(resampled(self.sound, rate, channels), self.start)

    def _has(self, rate: int, channels: int) -> bool:
        return self.sound.rate == rate and self.sound.waveform.shape[0] == channels


def resampled(sound: Sound, rate: int, channels: int) -> Sound:
    """A sound at another rate and of 1 or 2 channels, by FFmpeg's resampler; of more than eight channels their mean."""
    wave = sound.waveform
    if wave.shape[0] not in _LAYOUTS:
        wave = wave.mean(0, keepdim=True)
    layout = _LAYOUTS[wave.shape[0]]
    resampler = av.AudioResampler(format="fltp", layout=_LAYOUTS[channels], rate=rate)
    pieces = []
    for begin in range(0, wave.shape[1], _AT_ONCE):
        part = numpy.ascontiguousarray(wave[:, begin : begin + _AT_ONCE].numpy())
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = sound.rate, begin, Fraction(1, sound.rate)
        pieces += [each.to_ndarray() for each in resampler.resample(frame)]
    pieces += [each.to_ndarray() for each in resampler.resample(None)]
    out = numpy.concatenate(pieces, 1) if pieces else numpy.zeros((channels, 0), numpy.float32)
    return Sound(torch.from_numpy(numpy.ascontiguousarray(out, numpy.float32)), rate)
