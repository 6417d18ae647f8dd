"""Sound for tests: a waveform with clicks at known times, and what of it a file plays, read apart from the pack's own readers."""

from __future__ import annotations

from pathlib import Path

import av
import numpy

CLICKS = (0.013, 0.7, 1.37, 2.03, 2.6)


def siren(rate: int, seconds: float = 3.0, channels: int = 1, seed: int = 0) -> numpy.ndarray:
    """A tone that slowly goes up and down, another a channel, and a click of 3 ms at each of CLICKS: float32 [channels, N]."""
    time = numpy.arange(round(rate * seconds)) / rate
    rows = []
    for channel in range(channels):
        high = 250 + 90 * channel + 40 * seed
        row = 0.25 * numpy.sin(2 * numpy.pi * high * time + 3 * numpy.sin(2 * numpy.pi * (1.3 + channel) * time))
        for click in CLICKS:
            begin, width = round(click * rate), round(0.003 * rate)
            if begin < len(row):
                row[begin : begin + width] += 0.5
        rows.append(row)
    return numpy.stack(rows).astype(numpy.float32)


def sound(rate: int, seconds: float = 3.0, channels: int = 1, seed: int = 0):
    """The same as the core takes it."""
    import torch

    from adastate_core.audio.track import Sound

    return Sound(torch.from_numpy(siren(rate, seconds, channels, seed)), rate)


def played(path: Path | str) -> tuple[numpy.ndarray, int]:
    """What a player plays of a file's sound, float64 [channels, N] from time 0 on, and its rate. Every decoded piece stands where
    its time says, to the tick of the file's clock; nothing was played between pieces that do not meet."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        tick = 0 if stream.time_base.denominator >= rate else float(stream.time_base) * rate
        pieces, end = [], 0
        for frame in container.decode(stream):
            piece = frame.to_ndarray().astype(numpy.float64)
            if frame.format.name.startswith("s"):
                piece /= 2.0 ** (8 * frame.format.bytes - 1)
            piece = piece if frame.format.is_planar else piece.reshape(-1, channels).T
            begin = float(frame.pts * frame.time_base * rate)
            begin = end if abs(begin - end) <= tick else round(begin)
            assert begin >= end, f"sound is played twice at {begin / rate:.4f} s of {path}"
            pieces += [numpy.zeros((channels, begin - end)), piece]
            end = begin + piece.shape[1]
    return numpy.concatenate(pieces, 1), rate


def given(heard, start: float, count: int) -> numpy.ndarray:
    """A sound's own samples from `start` seconds on, float64 [channels, count]; silence outside."""
    return around(heard.waveform.double().numpy(), heard.rate, start, count)


def around(wave: numpy.ndarray, rate: int, start: float, count: int) -> numpy.ndarray:
    """The same of a waveform [channels, N]."""
    places = numpy.arange(count) + round(start * rate)
    inside = (places >= 0) & (places < wave.shape[1])
    return numpy.where(inside, wave[:, places.clip(0, wave.shape[1] - 1)], 0)


def lag(found: numpy.ndarray, wanted: numpy.ndarray, most: int = 6000) -> int:
    """How many samples later one signal [N] is than another, by their cross-correlation."""
    size = min(len(found), len(wanted))
    spectrum = numpy.fft.rfft(found[:size], 2 * size) * numpy.conj(numpy.fft.rfft(wanted[:size], 2 * size))
    likeness = numpy.fft.irfft(spectrum, 2 * size)
    most = min(most, size)
    lags = numpy.r_[0:most, -most:0]
    return int(lags[likeness[lags].argmax()])


def click_time(found: numpy.ndarray, rate: int, near: float, within: float = 0.1) -> float:
    """When a click is heard, in seconds: where the fast part of a signal [N] is loudest around `near`."""
    fast = numpy.abs(numpy.diff(found))
    begin = max(0, round((near - within) * rate))
    return (begin + int(fast[begin : round((near + within) * rate)].argmax()) + 1) / rate
