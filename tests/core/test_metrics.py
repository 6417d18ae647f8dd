"""Measures of a video against slow independent ways to get them, and on made-up videos where the answer is known."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator

import numpy
import pytest
import torch

from adastate_core.measure.metrics import displacement, flicker, measure_video, nearness, read_pictures
from adastate_core.video.sink import VideoSink

SIDE = 48


def texture(seed: int = 0, side: int = SIDE, smooth: int = 2) -> numpy.ndarray:
    """[side, side, 3] uint8: random blobs a few pixels wide."""
    noise = numpy.random.default_rng(seed).normal(size=(side, side, 3))
    for axis in (0, 1):
        noise = sum(numpy.roll(noise, shift, axis) for shift in range(-smooth, smooth + 1))
    return (127 + 40 * noise / noise.std()).clip(0, 255).astype(numpy.uint8)


def still(frames: int, level: int = 100) -> list[numpy.ndarray]:
    return [numpy.full((SIDE, SIDE, 3), level, numpy.uint8)] * frames


def lab_by_the_book(rgb: list[float]) -> list[float]:
    """CIE Lab of one sRGB colour in 0..1: IEC 61966-2-1 and CIE 15, one number at a time."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    rows = ([0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041])
    scaled = [
        sum(a * b for a, b in zip(row, linear, strict=True)) / w
        for row, w in zip(rows, (0.95047, 1.0, 1.08883), strict=True)
    ]
    x, y, z = (v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in scaled)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def test_a_constant_drift_is_the_distance_in_lab():
    """Red goes up by one level a picture: each chunk's mean colour is known, and so is the way from the first chunk's."""
    frames = []
    for i in range(9 + 12 * 3):
        frame = numpy.full((SIDE, SIDE, 3), 90, numpy.uint8)
        frame[..., 0] = 90 + i
        frames.append(frame)
    found = measure_video(frames)
    assert [c["first_picture"] for c in found["chunks"]] == [0, 9, 21, 33]
    means = []
    for start, stop in ((0, 9), (9, 21), (21, 33), (33, 45)):
        colours = [lab_by_the_book([(90 + i) / 255, 90 / 255, 90 / 255]) for i in range(start, stop)]
        means.append([sum(column) / len(column) for column in zip(*colours, strict=True)])
    for row, mean in zip(found["chunks"], means, strict=True):
        assert [row["lightness"], row["a"], row["b"]] == pytest.approx(mean, abs=0.05)
        assert row["drift"] == pytest.approx(math.dist(mean, means[0]), abs=0.05)
        assert row["contrast"] == pytest.approx(0, abs=1e-6) and row["displacement"] in (0, None)
        assert row["motion"] == pytest.approx(0.299 / 255, rel=1e-3)
    assert found["chunks"][3]["drift"] > found["chunks"][2]["drift"] > found["chunks"][1]["drift"] > 3
    assert found["seam"] == pytest.approx(1, abs=1e-3)


def share_at(series: list[float], period: int) -> float:
    """The share of the variation at a period and its overtones, by sums of sines and cosines."""
    n = len(series) // period * period
    mean = sum(series[:n]) / n
    power = []
    for k in range(1, n // 2 + 1):
        c = sum((v - mean) * math.cos(2 * math.pi * k * i / n) for i, v in enumerate(series[:n]))
        s = sum((v - mean) * math.sin(2 * math.pi * k * i / n) for i, v in enumerate(series[:n]))
        power.append(c * c + s * s)
    return sum(p for k, p in enumerate(power, 1) if k % (n // period) == 0) / sum(power)


def test_flicker_is_the_share_at_the_chunks_period():
    noise = torch.rand(131, generator=torch.Generator().manual_seed(0))
    for period in (2, 5, 12, 65):
        assert flicker(noise, period) == pytest.approx(share_at(noise.tolist(), period), rel=1e-4)
    long = torch.rand(40, 1200, generator=torch.Generator().manual_seed(1))
    shares = [flicker(row, 12) for row in long]
    assert sum(shares) / len(shares) == pytest.approx(1 / 100, rel=0.15), "one over the number of periods"
    assert math.isnan(flicker(noise, 66)) and math.isnan(flicker(noise, 1)) and math.isnan(flicker(noise[:0], 12))


def test_temporal_flickering_is_vbenchs():
    """One less the mean over neighbouring pictures of their mean absolute difference, pixel by pixel."""
    frames = [texture(i, 16) for i in range(5)]
    means = []
    for one, other in zip(frames, frames[1:], strict=False):
        levels = [abs(int(a) - int(b)) for a, b in zip(one.flat, other.flat, strict=True)]
        means.append(sum(levels) / len(levels))
    expected = (255 - sum(means) / len(means)) / 255
    assert 0.6 < expected < 0.9
    assert measure_video(frames)["temporal_flickering"] == pytest.approx(expected, abs=1e-12)
    assert measure_video(still(3))["temporal_flickering"] == 1
    assert measure_video(frames[::2], every=2)["temporal_flickering"] is None, "it is of neighbouring pictures"
    assert measure_video(frames[:1])["temporal_flickering"] is None


def test_a_video_that_jumps_at_every_chunk_flickers_and_has_seams():
    frames = []
    for i in range(9 + 12 * 8):
        frames.append(numpy.full((SIDE, SIDE, 3), 100 + i % 2 + 30 * ((i + 3) // 12 % 2), numpy.uint8))
    jumping = measure_video(frames)
    assert jumping["flicker"] > 0.95 and jumping["seam"] > 20
    assert measure_video(frames, chunk_frames=7)["flicker"] < 0.3
    assert measure_video(frames, chunk_frames=7)["seam"] < 3
    third = measure_video(frames[::3], every=3)
    assert third["flicker"] > 0.9 and third["seam"] is None and third["pictures"] == 35
    assert [c["first_picture"] for c in third["chunks"]][:3] == [0, 9, 21]
    assert measure_video(frames[::5], every=5)["flicker"] is None, "5 pictures are no part of a chunk"
    assert measure_video(still(60))["flicker"] == 0 and measure_video(still(60))["seam"] is None


def tones(clip: int, picture: int) -> tuple[list[int], list[int]]:
    """The colours of the two halves of a picture of a chain whose clips grow red and rich in contrast; every other picture of a
    clip is a level lighter."""
    light = picture % 2
    return [100 + light + 4 * clip, 100 + light, 100 + light], [150 + light + 12 * clip] + 2 * [150 + light + 8 * clip]


def chain(lengths: list[int]) -> list[numpy.ndarray]:
    """A video put together from clips of so many pictures."""
    pictures = []
    for clip, length in enumerate(lengths):
        for picture in range(length):
            pictures.append(numpy.zeros((SIDE, SIDE, 3), numpy.uint8))
            for half, tone in enumerate(tones(clip, picture)):
                pictures[-1][:, half * SIDE // 2 : (half + 1) * SIDE // 2] = tone
    return pictures


def test_a_chain_of_clips_climbs_clip_by_clip_as_it_was_made():
    """Against the numbers that the two tones of each half have by the book, a clip at a time."""
    lengths = [13, 12, 12, 12, 5]
    luma = lambda tone: (0.299 * tone[0] + 0.587 * tone[1] + 0.114 * tone[2]) / 255  # noqa: E731
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    lab = lambda clip, picture: [  # noqa: E731
        mean(column)
        for column in zip(*(lab_by_the_book([c / 255 for c in tone]) for tone in tones(clip, picture)), strict=True)
    ]
    colours = [
        [mean(column) for column in zip(*(lab(clip, i) for i in range(n)), strict=True)]
        for clip, n in enumerate(lengths)
    ]
    contrast = [
        mean([abs(luma(tones(clip, i)[1]) - luma(tones(clip, i)[0])) / 2 for i in range(n)])
        for clip, n in enumerate(lengths)
    ]
    jumps = [
        mean(
            [
                abs(luma(a) - luma(b))
                for a, b in zip(tones(clip, 0), tones(clip - 1, lengths[clip - 1] - 1), strict=True)
            ]
        )
        for clip in range(1, 5)
    ]
    found = measure_video(chain(lengths), clip_frames=12, first_clip_frames=13)
    rows = found["chunks"]
    assert [row["first_picture"] for row in rows] == [0, 13, 25, 37, 49] and found["pictures"] == 54
    for clip, row in enumerate(rows):
        assert row["drift"] == pytest.approx(math.dist(colours[clip], colours[0]), abs=0.05)
        assert row["contrast"] == pytest.approx(contrast[clip], rel=1e-3)
        if clip:
            assert row["seam"] == pytest.approx(jumps[clip - 1] * 255, rel=1e-3), (
                "a clip's own pictures move by one level"
            )
            step = math.dist(lab(clip, 0), lab(clip - 1, lengths[clip - 1] - 1))
            assert row["seam_colour"] == pytest.approx(step, abs=0.05)
    assert rows[0]["seam"] is rows[0]["seam_colour"] is None and found["seam"] == pytest.approx(
        mean(jumps) * 255, rel=1e-3
    )
    for name in ("drift", "contrast", "colour", "seam", "seam_colour"):
        line = numpy.polyfit(
            range(name.startswith("seam"), 4), [row[name] for row in rows[name.startswith("seam") : 4]], 1
        )
        assert found["per_clip"][name] == pytest.approx(line[0], rel=1e-6, abs=1e-9), (
            "without the clip that is cut short"
        )
    assert found["per_clip"]["drift"] > 2 and found["per_clip"]["contrast"] > 0.01
    json.dumps(found, allow_nan=False)


def test_clips_are_measured_where_they_begin_and_only_if_asked_for():
    frames = chain([12, 12, 12])
    sparse = measure_video(frames[::4], every=4, clip_frames=12)
    assert [row["first_picture"] for row in sparse["chunks"]] == [0, 12, 24]
    assert sparse["per_clip"]["drift"] > 2 and sparse["per_clip"]["seam"] is None and sparse["seam"] is None
    wrong = measure_video(frames, clip_frames=10)
    assert wrong["seam"] < 1.5 < 4 < measure_video(frames, clip_frames=12)["seam"], (
        "a border beside the seam finds none"
    )
    plain = measure_video(frames)
    assert "per_clip" not in plain and not any("seam" in row for row in plain["chunks"])
    alone = measure_video(frames[:12], clip_frames=12)
    assert alone["per_clip"]["drift"] is None and alone["chunks"][0]["seam"] is None


@pytest.mark.parametrize("shift", [(0, 0), (0, 1), (3, 0), (-2, 4), (5, -5)])
def test_displacement_is_how_far_a_texture_was_moved(shift):
    picture = texture()
    moved = numpy.roll(picture, shift, (0, 1))
    assert displacement(moved, picture) == pytest.approx(math.hypot(*shift), abs=0.15)


def test_displacement_between_pixels_and_on_large_pictures():
    fine = texture(1, 8 * SIDE, smooth=16)
    before, after = (
        numpy.stack([f.reshape(SIDE, 8, SIDE, 8, 3).mean((1, 3)) for f in (fine, numpy.roll(fine, 20, 1))])
        .round()
        .astype(numpy.uint8)
    )
    assert displacement(after, before) == pytest.approx(2.5, abs=0.25)
    large = texture(2, 384, smooth=12)
    assert displacement(numpy.roll(large, 9, 0), large) == pytest.approx(9, abs=0.6)


def test_displacement_does_not_take_noise_for_motion():
    random = numpy.random.default_rng(0)
    noisy = [
        (texture() + random.normal(0, 4, (SIDE, SIDE, 3))).clip(0, 255).round().astype(numpy.uint8) for _ in range(2)
    ]
    assert displacement(*noisy) < 0.3
    unrelated = displacement(texture(3, smooth=0), texture(4, smooth=0))
    assert math.isnan(unrelated), "nothing of one is in the other"
    bright = numpy.minimum(texture(), 200) + 40
    assert displacement(bright.astype(numpy.uint8), numpy.minimum(texture(), 200)) == pytest.approx(0, abs=0.05)


def test_noise_is_seen_in_sharpness_and_motion():
    """Independent levels of a known spread: neighbours in space and in time differ by 2 sigma / sqrt(pi) in the mean."""
    random = numpy.random.default_rng(1)
    frames = [numpy.repeat(random.normal(128, 10, (64, 64, 1)), 3, 2).round().astype(numpy.uint8) for _ in range(21)]
    rows = measure_video(frames)["chunks"]
    for row in rows:
        assert row["sharpness"] == pytest.approx(2 * 10 / math.sqrt(math.pi) / 255, rel=0.02)
        assert row["motion"] == pytest.approx(row["sharpness"], rel=0.02)
        assert row["contrast"] == pytest.approx(10 / 255, rel=0.02) and row["drift"] < 0.3


def ssim_by_hand(a: numpy.ndarray, b: numpy.ndarray, window: int) -> float:
    """Wang et al. 2004, pixel by pixel with mirrored borders, of [h, w] in 0..1."""
    half = window // 2
    line = numpy.exp(-(numpy.arange(-half, half + 1) ** 2) / (2 * 1.5**2))
    weights = numpy.outer(line, line) / line.sum() ** 2
    a, b = (numpy.pad(x, half, mode="reflect") for x in (a, b))
    values = []
    for y in range(a.shape[0] - 2 * half):
        for x in range(a.shape[1] - 2 * half):
            p, q = (t[y : y + window, x : x + window] for t in (a, b))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(numpy.mean(values))


def test_nearness_is_psnr_and_ssim():
    first, second = texture(0, 20), texture(5, 20)
    noise, similar = nearness(*(torch.from_numpy(t)[None].float() / 255 for t in (first, second)))
    error = ((first.astype(float) - second) ** 2).mean() / 255**2
    assert float(noise) == pytest.approx(-10 * math.log10(error), abs=1e-3)
    by_hand = [ssim_by_hand(first[..., c] / 255, second[..., c] / 255, 11) for c in range(3)]
    assert float(similar) == pytest.approx(sum(by_hand) / 3, abs=2e-3)


def test_a_reference_is_compared_picture_by_picture():
    frames = [texture(i) for i in range(21)]
    other = [f if i < 9 else (f.astype(int) // 2 * 2).astype(numpy.uint8) for i, f in enumerate(frames)]
    found = measure_video(frames, other[:15])
    assert found["compared"] == 15
    first, second = found["chunks"]
    assert first["psnr"] == 100 and first["ssim"] == pytest.approx(1)
    expected = [((f.astype(float) - o) ** 2).mean() / 255**2 for f, o in zip(frames[9:15], other[9:15], strict=True)]
    assert second["psnr"] == pytest.approx(sum(-10 * math.log10(e) for e in expected) / 6, abs=1e-3)
    assert 0.9 < second["ssim"] < 1 and "ssim" not in measure_video(frames)["chunks"][0]
    shifted = measure_video(frames[:9], frames[1:])
    assert shifted["chunks"][0]["ssim"] < 0.5, "the picture's number decides"
    json.dumps(found, allow_nan=False)


class Counted:
    """Makes pictures on demand and counts how many are alive."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __iter__(self) -> Iterator[numpy.ndarray]:
        for i in range(self.count):
            picture = texture(i % 3, 16)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(picture, self._gone)
            yield picture
            del picture

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("frames", [30, 120])
def test_no_more_pictures_are_held_for_a_longer_video(frames):
    mine, others = Counted(frames), Counted(frames)
    assert measure_video(mine, others)["pictures"] == frames
    assert mine.most <= 3 and others.most <= 2


@pytest.mark.parametrize(
    ("pictures", "reference", "words"),
    [
        ([], None, "the video has no frame in it"),
        ([numpy.zeros((8, 40, 3), numpy.uint8)], None, "the video is 40x8; it must be at least 16x16"),
        (still(2), [numpy.zeros((32, 64, 3), numpy.uint8)], "reference is 64x32 and the video 48x48; both must have"),
        ([*still(1), numpy.zeros((32, 64, 3), numpy.uint8)], None, "the video changes its size on the way"),
    ],
)
def test_what_cannot_be_measured_is_said(pictures, reference, words):
    with pytest.raises(ValueError, match=words):
        measure_video(pictures, reference)


def test_a_file_is_read_in_steps(tmp_path):
    levels = [20 + 10 * i for i in range(10)]
    with VideoSink(tmp_path / "a.mp4", 32, 32, 16) as sink:
        sink.write(torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3))
    found = [p.mean() for p in read_pictures(str(tmp_path / "a.mp4"), 3)]
    assert found == pytest.approx([levels[i] for i in (0, 3, 6, 9)], abs=3)
