"""Sound for the demo: one voice of tones, in syllables and pauses, whose loudness and pitch are known.

Loudness is 0 at -50 dB of full scale (RMS) and 1 at -10 dB, pitch 0 at 200 Hz and 1 at 800 Hz, on a logarithmic scale; both
are what demo_ear.py hears.
"""

from __future__ import annotations

import math

import torch

from .demo_ear import HOP, LOUDEST_DB, LOWEST_HZ, OCTAVES, RATE, SOFTEST_DB, frames_heard

# seconds; how long syllables and the pauses after them are, and how fast the voice swells and fades
_SYLLABLE, _PAUSE, _EDGE = (0.19, 0.75), (0.12, 0.60), 0.05
# one syllable in so many is followed by no pause, and one by a silence
_NO_PAUSE, _FALLS_SILENT, _SILENCE = 3, 12, (1.0, 3.0)
# amplitudes of the fundamental and its overtones
_OVERTONES = (1.0, 0.5, 0.25)


def tones(seconds: float, seed: int, rate: int = RATE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A voice that nobody has: (waveform [1, 1, N] float32, loudness [T50], pitch [T50], both 0..1).

    T50 is as `demo_ear.heard` gives. Loudness is 0 in pauses, where pitch stays at what it was last. ValueError for less
    sound than the ear hears.
    """
    samples = round(seconds * rate)
    count = frames_heard(round(samples * RATE / rate))
    loudness, pitch = _syllables(seconds, rate, samples, torch.Generator().manual_seed(seed))
    frequency = LOWEST_HZ * 2 ** (OCTAVES * pitch)
    phase = 2 * math.pi * (frequency / rate).cumsum(0)
    voice = sum(share * torch.sin((i + 1) * phase) for i, share in enumerate(_OVERTONES))
    rms = math.sqrt(sum(share**2 for share in _OVERTONES) / 2)
    gain = 10 ** ((SOFTEST_DB + (LOUDEST_DB - SOFTEST_DB) * loudness) / 20) * (loudness > 0)
    middles = ((torch.arange(count) * HOP + HOP * 5 / 8) * rate / RATE).long().clamp(max=samples - 1)
    return (gain * voice / rms).float()[None, None], loudness[middles].float(), pitch[middles].float()


def _syllables(
    seconds: float, rate: int, samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loudness and pitch of every sample, [samples] float64."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    loudness, pitch = torch.zeros(2, samples, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64) / rate
    # a sample's number from which on pitch stays as it is, and what it is
    done, last = 0, 0.5
    at = draw(0, _PAUSE[1])
    while at < seconds:
        length, loud = draw(*_SYLLABLE), draw(0.25, 1.0)
        target, glide = draw(0, 1), draw(-0.15, 0.15)
        end = at + length
        first, behind = (int(torch.searchsorted(time, each)) for each in (at, end))
        pitch[done:first] = last
        inside = time[first:behind]
        share = ((inside - at) / length).clamp(0, 1)
        edges = (torch.minimum(inside - at, end - inside) / _EDGE).clamp(0, 1)
        loudness[first:behind] = loud * edges * (1 - 0.3 * share)
        pitch[first:behind] = (target + glide * share).clamp(0, 1)
        done, last = behind, min(1.0, max(0.0, target + glide))
        chance = draw(0, 1)
        if chance < 1 / _FALLS_SILENT:
            at = end + draw(*_SILENCE)
        else:
            at = end if chance > 1 - 1 / _NO_PAUSE else end + draw(*_PAUSE)
    pitch[done:] = last
    return loudness, pitch
