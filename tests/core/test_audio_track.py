"""Features of sound at the times of video frames, against loops over single values and what the host's interpolation gives."""

from __future__ import annotations

import math

import pytest
import torch

from adastate_core.audio.resampling import frame_features, seconds_of
from adastate_core.audio.track import AudioTrack, Sound


def slowly(features: list[float], fps: float, frame: int, offset: float = 0.0) -> float:
    """One value of one frame: 50 a second made 30, of which the nearest, half to even; nothing outside."""
    count = int(len(features) / 50.0 * 30)
    nearest = round((max(frame, 0) / fps + offset) * 30)
    if not 0 <= nearest < count:
        return 0.0
    place = nearest * (len(features) - 1) / (count - 1) if count > 1 else 0.0
    low = math.floor(place)
    high = min(low + 1, len(features) - 1)
    return features[low] + (features[high] - features[low]) * (place - low)


def drawn(length: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [2, 3, 49, 99, 499])
@pytest.mark.parametrize("fps", [16, 25, 30, 23.976, 60])
def test_every_frame_has_the_feature_of_its_time(length, fps):
    features = drawn(length)
    for first, offset in ((0, 0.0), (7, 0.0), (-3, 0.0), (0, 0.35), (0, -0.5)):
        found = frame_features(features, fps, 40, first, offset)
        assert found.shape == (40, 3) and found.dtype == torch.float32
        for channel in range(3):
            track = features[:, channel].double().tolist()
            wanted = [slowly(track, fps, first + n, offset) for n in range(40)]
            torch.testing.assert_close(found[:, channel], torch.tensor(wanted).float(), atol=1e-5, rtol=1e-5)


def test_thirty_a_second_are_torchs_own_interpolation():
    features = drawn(499)
    count = int(499 / 50 * 30)
    whole = torch.nn.functional.interpolate(features.T[None].double(), size=count, align_corners=True, mode="linear")[
        0
    ].T
    torch.testing.assert_close(frame_features(features, 30, count), whole.float())
    assert not frame_features(features, 30, 5, first=count).any()


def test_an_empty_track_and_a_single_feature_are_silence():
    for length in (0, 1):
        assert not frame_features(torch.ones(length, 4), 16, 3).any()
    with pytest.raises(ValueError, match="fps is 0; it must be above 0"):
        frame_features(drawn(9), 0, 3)
    assert seconds_of(99) == 1.98


@pytest.mark.parametrize("same", [False, True])
def test_folded_layers_are_their_weighted_sum_whichever_part_is_asked_for(same):
    """Equal objects are added once, with all their weight."""
    layers = tuple(drawn(199, seed=0 if same else i)[None] for i in range(5))
    layers = (layers[0],) * 5 if same else layers
    weights = torch.randn(5, generator=torch.Generator().manual_seed(9)).softmax(0)
    track = AudioTrack(None, layers, offset=0.12)
    total = sum(weight * layer[0].double() for weight, layer in zip(weights.double(), layers, strict=True))
    whole = frame_features(total, 25, 120, offset=0.12)
    parts = [track.folded(weights, 25, first, 12) for first in range(0, 120, 12)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(track.folded(weights, 25, -4, 8)[:5], whole[:1].expand(5, -1), atol=1e-5, rtol=1e-5)
    assert not track.folded(weights, 25, 10_000, 3).any()
    with pytest.raises(ValueError, match="there are 4 weights for 5 layers"):
        track.folded(weights[:4], 25, 0, 3)


def test_a_track_knows_how_long_it_is_and_what_it_says():
    sound = Sound(torch.randn(1, 32_000, generator=torch.Generator().manual_seed(1)), 16_000)
    layers = (drawn(99)[None],) * 3
    track = AudioTrack(sound, layers, 16.0)
    assert track.seconds == 2.0 and track.frames(16) == 32 and track.frames(25) == 50
    assert AudioTrack(sound, layers, offset=0.5).frames(16) == 24
    assert AudioTrack(sound, layers, offset=-0.5).frames(16) == 40
    assert AudioTrack(None, layers).seconds == 1.98 and AudioTrack(sound, layers, offset=9.0).frames(16) == 0
    others = [
        AudioTrack(sound, layers, 25.0), AudioTrack(sound, layers, 16.0, 0.1), AudioTrack(None, layers, 16.0),
        AudioTrack(sound, (), 16.0), AudioTrack(sound, layers[:2], 16.0), AudioTrack(sound, (layers[0] + 1,) * 3, 16.0),
        AudioTrack(Sound(sound.waveform, 8_000), layers, 16.0), AudioTrack(Sound(-sound.waveform, 16_000), layers, 16.0),
        AudioTrack(sound, (layers[0].half(),) * 3, 16.0),
    ]  # fmt: skip
    digests = {one.digest() for one in (track, *others)}
    assert len(digests) == 10
    same = AudioTrack(Sound(sound.waveform.clone(), 16_000), (layers[0].clone(),) * 3, 16.0)
    assert same.digest() == track.digest()


def test_what_is_no_track_is_refused():
    with pytest.raises(ValueError, match="a track needs a sound, or what an audio encoder made of it"):
        AudioTrack(None)
    with pytest.raises(ValueError, match=r"the layers are \(1, 4, 3\), \(1, 5, 3\); all must be"):
        AudioTrack(None, (torch.zeros(1, 4, 3), torch.zeros(1, 5, 3)))
    for waveform, rate, words in (
        (torch.zeros(9), 9, "must be float32"),
        (torch.zeros(1, 9).double(), 9, "must be float32"),
        (torch.zeros(1, 9), 0, "has 0 samples a second"),
    ):
        with pytest.raises(ValueError, match=words):
            Sound(waveform, rate)
