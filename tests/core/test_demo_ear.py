"""The demo's voice and ear: what is said is heard, in the shape of a speech encoder's features."""

from __future__ import annotations

import math

import pytest
import torch

from adastate_core.audio.demo_ear import codes, frames_heard, heard, loudness_and_pitch, vectors
from adastate_core.audio.demo_tones import tones


def sine(hertz: float, decibels: float, seconds: float = 0.5, rate: int = 16_000) -> torch.Tensor:
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (math.sqrt(2) * 10 ** (decibels / 20) * torch.sin(2 * math.pi * hertz * time)).float()[None, None]


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("hertz", [200.0, 283.0, 400.0, 731.0, 800.0])
def test_a_tone_is_heard_as_it_is(hertz, rate):
    loudness, pitch, clear = loudness_and_pitch(sine(hertz, -26.0, rate=rate), rate)
    # tolerance: a frame of 25 ms does not hold whole periods
    assert (loudness - 0.6).abs().max() < 0.02
    assert (pitch - math.log2(hertz / 200) / 2).abs().max() < 0.01
    assert clear.min() > 0.95


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_the_voice_is_heard_as_it_was_meant(rate):
    waveform, loudness, pitch = tones(4.0, seed=5, rate=rate)
    said, sung, _ = loudness_and_pitch(waveform, rate)
    assert waveform.shape == (1, 1, 4 * rate) and waveform.abs().max() <= 1
    assert loudness.shape == pitch.shape == said[0].shape == (frames_heard(64_000),)
    assert (said[0] - loudness).abs().mean() < 0.01
    voiced = loudness > 0.2
    assert (sung[0] - pitch)[voiced].abs().max() < 0.02
    # pauses are silence, and there are both
    assert 0.1 < (loudness == 0).float().mean() < 0.7 and said[0][loudness == 0].median() == 0


def test_the_voice_is_the_seeds():
    again, other = tones(1.0, seed=1)[0], tones(1.0, seed=2)[0]
    assert torch.equal(tones(1.0, seed=1)[0], again) and not torch.equal(again, other)


def test_features_are_sums_of_the_levels_vectors():
    waveform = torch.cat([sine(400.0, -26.0), torch.zeros(1, 1, 8000)], -1).expand(2, 2, -1)
    features, weights = heard(waveform, 16_000), codes(waveform, 16_000)
    assert features.shape == (2, frames_heard(16_000), 1024) and features.dtype == torch.float32
    torch.testing.assert_close(weights[..., :6].sum(-1), torch.ones(2, 49))
    # loudness .6 and pitch .5: level 3 of loudness, and both middle ones of pitch
    assert weights[0, 5, :6].argmax() == 3 and abs(weights[0, 5, 8] - weights[0, 5, 9]) < 0.03
    assert weights[0, -1, 0] > 0.75 and weights[0, -1, 6:].abs().max() == 0  # silence has no pitch
    table = vectors().double()
    torch.testing.assert_close(
        features[1, 5].double(), (weights[1, 5].double()[:, None] * table).sum(0), atol=1e-4, rtol=1e-4
    )
    similar = torch.corrcoef(table) - torch.eye(12)
    assert similar.abs().max() < 0.15


def test_channels_are_averaged():
    loud = sine(300.0, -20.0)
    assert torch.allclose(heard(torch.cat([loud, -loud], 1), 16_000), heard(torch.zeros_like(loud), 16_000))


def test_too_little_sound_is_refused():
    with pytest.raises(ValueError, match=r"the sound is 0\.02494 s long; the ear needs at least 0\.025 s"):
        heard(torch.zeros(1, 1, 399), 16_000)
    assert heard(torch.zeros(1, 1, 400), 16_000).shape == (1, 1, 1024)


def test_a_longer_voice_begins_as_a_shorter_one():
    """It is drawn syllable by syllable, whatever comes later; two minutes are made at once, not in one."""
    for seed in (0, 4):
        long, short = tones(120.0, seed), tones(7.0, seed)
        for whole, part in zip(long, short, strict=True):
            assert torch.equal(whole[..., : part.shape[-1]], part)
        assert float(long[1].max()) <= 1 and float(long[2].max()) <= 1 and float(long[1][-500:].max()) > 0.2
