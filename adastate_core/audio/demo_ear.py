"""The demo's ear: what it hears is given in the shape of a speech encoder's features, without any weights.

Every 20 ms the sound's loudness and pitch become weights over six levels each, and every level is a fixed random vector. A code
that is linear in loudness would be useless: the layer norms of a sound encoder drown its small moving part. In place of
wav2vec2's features, which the host's AudioEncoderEncode gives; speech needs that one.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F

RATE = 16_000
# samples of a frame and between frames, as wav2vec2's convolutions have them at 16 kHz
FRAME, HOP = 400, 320
WIDTH, LEVELS = 1024, 6
SOFTEST_DB, LOUDEST_DB = -50.0, -10.0
LOWEST_HZ, OCTAVES = 200.0, 2.0
# of a level's bell, in units of loudness or pitch
_BELL = 0.12
# loudness from which a pitch begins to be heard, and from which it is heard fully
_VOICED = (0.05, 0.15)


def frames_heard(samples: int) -> int:
    """Frames in so many samples at 16 kHz. ValueError below one frame."""
    if samples < FRAME:
        raise ValueError(f"the sound is {samples / RATE:.4g} s long; the ear needs at least {FRAME / RATE:g} s of it")
    return (samples - FRAME) // HOP + 1


def heard(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    """[B, C, N] in -1..1 at `rate` Hz to features [B, T50, 1024] float32 on the CPU, 50 a second; channels are averaged.

    ValueError for less sound than one frame.
    """
    return codes(waveform, rate) @ vectors()


def vectors() -> torch.Tensor:
    """[12, 1024] float32 standard normal, from SHA-256 of "loudness/0" .. "pitch/5"."""
    rows = []
    for name in (f"{what}/{level}" for what in ("loudness", "pitch") for level in range(LEVELS)):
        seed = int.from_bytes(hashlib.sha256(f"demo ear/{name}".encode("ascii")).digest()[:8], "big")
        rows.append(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def codes(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    """As `heard`, before the vectors: weights [B, T50, 12] of six levels of loudness (they sum to 1) and six of pitch (they sum
    to how well a pitch is heard)."""
    loudness, pitch, clear = loudness_and_pitch(waveform, rate)
    return torch.cat([_levels(loudness), _levels(pitch) * clear[..., None]], -1)


def _levels(value: torch.Tensor) -> torch.Tensor:
    """[..] in 0..1 to weights [.., LEVELS]."""
    away = value[..., None] - torch.linspace(0, 1, LEVELS)
    return (-away.square() / (2 * _BELL**2)).softmax(-1)


def loudness_and_pitch(waveform: torch.Tensor, rate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loudness, pitch and how clear the pitch is, each [B, T50] in 0..1, of [B, C, N] at `rate` Hz."""
    mono = at_16_khz(waveform.float().cpu().mean(1), rate)
    frames_heard(mono.shape[-1])
    frames = mono.unfold(-1, FRAME, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    level = 10 * frames.square().mean(-1).clamp(min=1e-10).log10()
    loudness = ((level - SOFTEST_DB) / (LOUDEST_DB - SOFTEST_DB)).clamp(0, 1)
    period, strength = _period(frames)
    pitch = ((RATE / period / LOWEST_HZ).log2() / OCTAVES).clamp(0, 1)
    clear = ((loudness - _VOICED[0]) / (_VOICED[1] - _VOICED[0])).clamp(0, 1)
    return loudness, pitch, clear * strength.clamp(0, 1)


def at_16_khz(mono: torch.Tensor, rate: int) -> torch.Tensor:
    """[B, N] at `rate` to [B, ceil(N * 16000 / rate)]: averaged over as many samples as fall on one, then linear."""
    if rate == RATE:
        return mono
    count = math.ceil(mono.shape[-1] * RATE / rate)
    if rate >= 2 * RATE:
        width = rate // RATE
        mono = F.pad(mono[:, None], (width // 2, (width - 1) // 2), mode="replicate")
        mono = F.avg_pool1d(mono, width, 1)[:, 0]
    place = (torch.arange(count, dtype=torch.float64) * rate / RATE).clamp(max=mono.shape[-1] - 1)
    low = place.long()
    high = (low + 1).clamp(max=mono.shape[-1] - 1)
    return torch.lerp(mono[:, low], mono[:, high], (place - low).float())


def _period(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The period of frames [B, T, FRAME] in samples and the autocorrelation at it, both [B, T]."""
    shortest, longest = int(RATE / (LOWEST_HZ * 2**OCTAVES)) - 2, math.ceil(RATE / LOWEST_HZ) + 2
    lags = range(shortest, longest + 1)
    likeness = torch.stack(
        [F.cosine_similarity(frames[..., :-lag], frames[..., lag:], dim=-1, eps=1e-6) for lag in lags], -1
    )
    # the first peak that is nearly as high as the highest: a multiple of the period fits as well as the period
    inner = likeness[..., 1:-1]
    peak = (inner >= likeness[..., :-2]) & (inner >= likeness[..., 2:])
    peak &= inner >= 0.95 * inner.amax(-1, keepdim=True)
    peak[..., -1] |= ~peak.any(-1)
    first = peak.byte().argmax(-1, keepdim=True)
    before, at, after = (likeness.gather(-1, first + i)[..., 0] for i in range(3))
    bend = (before - 2 * at + after).clamp(max=-1e-6)
    shift = (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
    return lags[1] + first[..., 0] + shift, at
