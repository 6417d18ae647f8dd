"""A talking file is measured: true pictures follow its sound to the picture, shifted ones as late as they are."""

from __future__ import annotations

import pytest
import torch

from adastate_core.audio.demo_ear import RATE
from adastate_core.audio.placed import PlacedSound
from adastate_core.audio.track import Sound
from adastate_core.video.sink import VideoSink
from training.talking_watch import LAGS, draw, half_way, lagged, onsets, table, watched
from training.talking_world import TalkingScene
from training.world import FPS, render

FRAMES = 320


def talking_video(path, late):
    """A file of the world's own pictures, `late` pictures behind their sound."""
    scene = TalkingScene.drawn(5, FRAMES // 12 + 1, up=True)
    pictures = render(scene, (torch.arange(FRAMES) - late).clamp(min=0))
    sound = PlacedSound(Sound(scene.waveform[0], RATE))
    with VideoSink(path, 64, 64, FPS, sound=sound) as sink:
        for part in (pictures * 255).round().to(torch.uint8).split(64):
            sink.write(part)
    return scene


@pytest.mark.parametrize("late", [0, 3])
def test_true_pictures_are_as_late_as_they_are(tmp_path, late):
    scene = talking_video(tmp_path / "true.mp4", late)
    found = watched(tmp_path / "true.mp4", scene.balloon)
    by_lag = {lag: lagged(found["size"], found["loudness"], lag) for lag in LAGS}
    assert max(by_lag, key=by_lag.get) == late and by_lag[late] > 0.97
    behind = onsets(found)
    assert len(behind) >= 3 and torch.tensor(behind).median() == pytest.approx(late, abs=0.6)
    assert lagged(found["height"], found["pitch"], late) > 0.8
    text = table(found)
    assert f"| {late} |" in text and f"{len(behind)} tones" in text
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_half_way_is_between_two_pictures():
    track = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    assert half_way(track, 0, 5) == pytest.approx(2.5)
    assert half_way(torch.zeros(5), 0, 5) is None
    assert half_way(torch.tensor([0.0, 4.0, 4.0]), 0, 3) == pytest.approx(0.5)
