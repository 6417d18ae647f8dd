"""Every measure of the journey on true renders, where the answer is known, and on videos made wrong on purpose."""

from __future__ import annotations

import math

import pytest
import torch

from adastate_core.measure.lab_colour import lab
from training import journey_measures as measures
from training.journey import Scene, render
from training.journey_streams import COLUMNS, stretch

FRAMES = torch.arange(201)


@pytest.fixture(scope="module")
def streams() -> list[tuple[Scene, torch.Tensor]]:
    drawn = [Scene.draw(torch.Generator().manual_seed(50 + i), 1) for i in range(3)]
    return [(scene, render(scene, FRAMES)) for scene in drawn]


def test_the_distance_is_the_truths_at_any_speed(streams):
    for scene, video in streams:
        truth = scene.truth(FRAMES)["pan"]
        for hop in (8, 12):
            assert (measures.travelled(video, hop) - truth[::hop]).abs().max() < 1.0
        twice = measures.travelled(video[::2])
        assert float(twice[-1]) == pytest.approx(float(truth[192]), rel=0.03)
        back = measures.travelled(video.flip(0))
        assert float(back[-1]) == pytest.approx(-float(truth[-1]), rel=0.05)
        assert measures.travelled(video[:1].expand(80, -1, -1, -1)).abs().max() < 0.02


def test_a_stream_that_stops_on_the_way_is_told_from_one_that_goes_on(streams):
    scene, video = streams[0]
    stopped = video[FRAMES.clamp(max=80)]
    found, truth = measures.travelled(stopped), scene.truth(FRAMES)["pan"]
    assert float(found[-1]) == pytest.approx(float(truth[80]), abs=0.6) and float(
        found[-1] - found[10]
    ) == pytest.approx(0, abs=0.05)


def test_the_ground_tells_the_region(streams):
    for scene, video in streams:
        kinds, off = measures.ground_reading(video)
        truth = scene.truth(FRAMES)
        read = measures.steady(kinds)
        assert (read == truth["kind"]).float().mean() > 0.9 and off.median() < 2
        assert abs(int(measures.borders(read)[-1]) - int(truth["borders"][-1])) <= 1
        faded = measures.ground_reading(0.5 * video + 0.25)[1]
        assert faded.mean() > off.mean() + 5
    short = torch.tensor([0] * 40 + [2] * 3 + [0] * 40 + [1] * 40)
    assert measures.borders(measures.steady(short))[-1] == 1, "what flickers is no border"


def test_the_sky_tells_how_much_of_the_day_has_passed(streams):
    for scene, video in streams:
        passed = measures.days(video)
        assert float(passed[-1]) == pytest.approx(float(scene.truth(FRAMES)["days"][-1]), abs=0.02)
        assert float(measures.days(video.flip(0))[-1]) == pytest.approx(-float(passed[-1]), abs=0.02)
        assert measures.days(video[:1].expand(80, -1, -1, -1))[-1] == 0


def test_a_return_to_the_first_picture_is_seen(streams):
    for _, video in streams:
        like = measures.likeness(video, video[0])
        assert like[0] == pytest.approx(1, abs=1e-5) and like[100:].mean() < 0.4
        darker = measures.likeness(0.5 * video[:1], video[0])
        assert darker[0] == pytest.approx(1, abs=1e-4), "by night it is the same place"
        returned = torch.cat([video[:150], video[:1].expand(50, -1, -1, -1)])
        assert measures.likeness(returned, video[0])[-1] == pytest.approx(1, abs=1e-5)


def test_errors_count_what_was_in_view(streams):
    scene, video = streams[0]
    columns = measures.in_view_since(scene, 8, FRAMES)
    gone = (FRAMES[-1] - 8) * scene.speed
    assert int(columns[-1].sum()) == math.floor(64 - float(gone)) and columns[8].all()
    assert measures.error(video, video, columns)[20] == 0
    wrong = video.clone()
    wrong[:, :, 60:] = 0.5
    assert measures.error(wrong, video, columns)[-1] == 0, "new columns are no error"
    wrong[:, :, 0] = 1 - wrong[:, :, 0]
    slow = [torch.dist(lab(wrong[-1, y, 0]), lab(video[-1, y, 0])) for y in range(64)]
    expected = float(sum(slow)) / 64 / int(columns[-1].sum())
    assert float(measures.error(wrong, video, columns)[-1]) == pytest.approx(expected, rel=1e-3)
    assert measures.picture_distance(video, video[0])[0] == 0 < measures.picture_distance(video, video[0])[-1]


def test_a_row_of_the_table_knows_a_frozen_stream(streams):
    scene, video = streams[1]
    last = range(120, 201)
    true = video[last.start : last.stop]
    right = stretch(video, true, scene, 8, last)
    assert list(right) == list(COLUMNS)
    assert right["distance, of the true"] == pytest.approx(1, abs=0.03)
    assert right["day, of the true"] == pytest.approx(1, abs=0.05)
    assert right["motion, of the true"] == right["sharpness, of the true"] == 1
    frozen = stretch(video[:9][FRAMES.clamp(max=8)], true, scene, 8, last)
    assert frozen["distance, of the true"] == pytest.approx(0, abs=0.01) and frozen["day, of the true"] == 0
    assert frozen["borders passed"] == 0 and frozen["motion, of the true"] == 0
    assert (
        frozen["like the first picture"] > 0.8 > right["like the first picture"]
        and frozen["still in the first region"] == 1
    )
