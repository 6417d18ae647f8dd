"""Files of many kinds, every pair of their properties at least once: Continue Video's tail, Video Metrics and Compare.

The colours are judged by arithmetic alone: known RGB is taken through the formulas of BT.601, 709 and 2020 in float64, and the
planes of YUV are handed to the encoder as they are. No converter of FFmpeg stands on either side.
"""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import odd_videos
import pytest

from adastate_core.measure.compare import Comparison
from adastate_core.measure.metrics import measure_video, read_pictures
from adastate_core.video.frames import FileClip
from adastate_core.video.tail import tail_frames

WIDTH, HEIGHT, FRAMES = 96, 64, 9  # no side below 64: older AV1 encoders take none
RGB = np.array([[[220, 30, 40], [40, 200, 60]], [[30, 60, 210], [0, 0, 0]]], np.float64)  # the last is grey, by frame
UNTAGGED, LIMITED, FULL = 2, 1, 2
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), UNTAGGED: (0.299, 0.114), 9: (0.2627, 0.0593)}
X264 = {"qp": "0", "preset": "ultrafast", "g": "4"}
# (ending, encoder): formats of pixels, options, whether the file keeps tags of colour, whether it can be turned
KINDS = {
    ("mp4", "libx264"): (("yuv420p", "yuv444p"), X264, True, True),
    ("mov", "libx264"): (("yuv420p", "yuv422p"), X264, True, True),
    ("mkv", "libx264"): (("yuv420p", "yuv420p10le"), X264, True, False),
    ("ts", "libx264"): (("yuv420p",), X264, True, False),
    ("flv", "libx264"): (("yuv420p",), X264, True, False),
    ("avi", "libx264"): (("yuv420p",), X264, True, False),
    ("mp4", "libx265"): (("yuv420p",), {"x265-params": "lossless=1:log-level=none", "preset": "ultrafast"}, True, True),
    ("mkv", "ffv1"): (("yuv420p", "yuv444p"), {}, True, False),
    ("webm", "libvpx-vp9"): (("yuv420p", "yuv444p"), {"lossless": "1", "cpu-used": "8"}, True, False),
    ("mp4", "libvpx-vp9"): (("yuv420p",), {"lossless": "1", "cpu-used": "8"}, True, True),
    ("webm", "libsvtav1"): (("yuv420p",), {"crf": "4", "preset": "12"}, True, False),
    ("mp4", "mpeg4"): (("yuv420p",), {"qmin": "1", "qmax": "1", "g": "4"}, False, True),
    ("avi", "mpeg4"): (("yuv420p",), {"qmin": "1", "qmax": "1", "g": "4"}, False, False),
    ("avi", "mjpeg"): (("yuvj420p",), {"qmin": "1", "qmax": "1"}, False, False),
    ("mov", "mjpeg"): (("yuvj420p", "yuvj444p"), {"qmin": "1", "qmax": "1"}, False, True),
    ("mkv", "mpeg2video"): (("yuv420p",), {"qmin": "1", "qmax": "1", "g": "4"}, False, False),
    ("avi", "ffv1"): (("yuv420p",), {}, False, False),
}
MATRICES = (1, 5, 6, UNTAGGED, 9)
RANGES = (LIMITED, FULL, 0)
TURNS = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))
RATES = (Fraction(16), Fraction(24000, 1001), Fraction(25), Fraction(60000, 1001), Fraction(50))


def cases() -> list[tuple]:
    """(kind, pixels, matrix, range, turn, rate): allowed ones, chosen until every allowed pair has come; the same always."""
    allowed = []
    for kind, (pixels, _, keeps, turns) in KINDS.items():
        full = pixels[0].startswith("yuvj")
        matrices = MATRICES if keeps else (UNTAGGED,)
        ranges = RANGES if keeps else (FULL,) if full else (0,)
        allowed += itertools.product([kind], pixels, matrices, ranges, TURNS if turns else TURNS[:1], RATES)
    random.Random(16).shuffle(allowed)

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    left, chosen = set().union(*map(pairs, allowed)), []
    for least in (15, 12, 9, 7, 5, 4, 3, 2, 1):
        for case in allowed:
            if len(pairs(case) & left) >= least:
                left -= pairs(case)
                chosen.append(case)
    return chosen


def planes(level: float, pixels: str, matrix: int, full: bool) -> list[np.ndarray]:
    """The planes of a picture of four colours, rounded from float64."""
    red, blue = LUMA[matrix]
    rgb = RGB.copy()
    rgb[1, 1] = level
    r, g, b = rgb.transpose(2, 0, 1) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red))
    bits = 10 if "10" in pixels else 8
    unit, most = 2 ** (bits - 8), 2**bits - 1
    y = luma * most if full else (16 + 219 * luma) * unit
    chroma = [128 * unit + c * (most if full else 224 * unit) for c in (cb, cr)]
    across, down = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}[pixels.replace("yuvj", "yuv")[3:6]]
    sizes = [(HEIGHT, WIDTH), *[(HEIGHT // down, WIDTH // across)] * 2]
    return [
        np.clip(np.round(plane), 0, most).astype("<u2" if bits > 8 else "u1").repeat(h // 2, 0).repeat(w // 2, 1)
        for plane, (h, w) in zip([y, *chroma], sizes, strict=True)
    ]


def write(path: Path, case: tuple) -> Path:
    (_, codec), pixels, matrix, colour_range, turn, rate = case
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.options = dict(KINDS[case[0]][1])
        stream.time_base = stream.codec_context.time_base = 1 / rate
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, colour_range
        for i in range(FRAMES):
            frame = av.VideoFrame(WIDTH, HEIGHT, pixels)
            frame.pts, frame.time_base = i, 1 / rate
            frame.colorspace, frame.color_range = matrix, colour_range
            parts = planes(40 + 20 * i, pixels, matrix, "j" in pixels or colour_range == FULL)
            for plane, part in zip(frame.planes, parts, strict=True):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                rows[:, : part.shape[1] * part.itemsize] = part.view(np.uint8)
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if turn != TURNS[0]:
        path.write_bytes(odd_videos.turned(path.read_bytes(), turn))
    return path


def shown(i: int, turn: tuple) -> np.ndarray:
    """The four colours of frame i as a player shows them."""
    rgb = RGB.copy()
    rgb[1, 1] = 40 + 20 * i
    return np.rot90(rgb, -TURNS.index(turn))


def far(picture: np.ndarray, i: int, turn: tuple) -> float:
    """How far the middles of the quarters are from the colours that were put in."""
    height, width = (HEIGHT, WIDTH) if TURNS.index(turn) % 2 == 0 else (WIDTH, HEIGHT)
    assert picture.shape == (height, width, 3)
    return float(np.abs(picture[height // 4 :: height // 2, width // 4 :: width // 2] - shown(i, turn)).max())


CASES = cases()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind))
def test_every_kind_of_file_comes_upright_in_its_colours_and_pace(tmp_path, kind):
    mine = [case for case in CASES if case[0] == kind]
    assert mine
    for case in mine:
        path, turn, rate = write(tmp_path / f"a.{kind[0]}", case), case[4], case[5]
        found = tail_frames(str(path), 4)
        assert max(far(picture, FRAMES - 4 + i, turn) for i, picture in enumerate(found)) <= 3, case
        slower = tail_frames(str(path), 4, rate / 2)
        assert max(far(picture, FRAMES - 7 + 2 * i, turn) for i, picture in enumerate(slower)) <= 3, case
        pictures = list(read_pictures(str(path)))
        assert len(pictures) == FRAMES and max(far(p, i, turn) for i, p in enumerate(pictures)) <= 3, case
        assert abs(float(FileClip(str(path)).rate / rate) - 1) < 0.01, case
        comparison = Comparison([str(path)], ["a"])
        assert far(comparison.sources[0].frame, 0, turn) <= 3, case
        comparison.close()
    assert measure_video(pictures)["pictures"] == FRAMES


def test_every_pair_that_there_can_be_has_its_case():
    def named(first: int, second: int) -> set:
        return {(case[first], case[second]) for case in CASES}

    assert {each[0] for each in CASES} == set(KINDS) and len(CASES) < 200
    for kind, (pixels, _, keeps, turns) in KINDS.items():
        assert {(kind, each) for each in pixels} <= named(0, 1) and {(kind, each) for each in RATES} <= named(0, 5)
        if keeps:
            assert {(kind, each) for each in MATRICES} <= named(0, 2)
            assert {(kind, each) for each in RANGES} <= named(0, 3)
        if turns:
            assert {(kind, each) for each in TURNS} <= named(0, 4)
    assert set(itertools.product(MATRICES, RANGES)) <= named(2, 3)
    assert set(itertools.product(TURNS, RATES)) <= named(4, 5) and set(itertools.product(MATRICES, TURNS)) <= named(
        2, 4
    )
