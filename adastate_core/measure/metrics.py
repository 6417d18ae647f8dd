"""What a video shows, measured picture by picture: colour, contrast, sharpness, motion, flicker, nearness to another video.

Nothing here judges. A sunset moves the colour as well as drift does; what the numbers mean is for whoever knows the video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from ..video.frames import FileClip, MemoryClip, Source, clip
from .dense_flow import FLOW_MEANS, DenseFlow
from .lab_colour import mean_lab

METERS = ("motion", "sharpness", "contrast", "colour")
LEAST_SIDE = 16
HIGHEST_PSNR = 100.0
_LUMA = numpy.array([0.299, 0.587, 0.114], dtype=numpy.float32)
_BLOCK, _FLOW_SIDE, _FOLLOWED = 32, 128, 0.15


def frame_meters(frame: numpy.ndarray, before: numpy.ndarray | None) -> dict[str, float]:
    """The meters of one frame [h, w, 3] uint8 and the one before it (None: no motion)."""
    picture = frame.astype(numpy.float32) / 255
    luma = picture @ _LUMA
    steps = (numpy.abs(numpy.diff(luma, axis=0)).mean() + numpy.abs(numpy.diff(luma, axis=1)).mean()) / 2
    last = luma if before is None else before.astype(numpy.float32) @ _LUMA / 255
    return {
        "motion": float(numpy.abs(luma - last).mean()),
        "sharpness": float(steps),
        "contrast": float(luma.std()),
        "colour": float(numpy.abs(picture - luma[..., None]).mean()),
    }


def sharpness(video: torch.Tensor) -> torch.Tensor:
    """[T] mean absolute difference of neighbouring pixels of [T, h, w, 3]."""
    return 0.5 * (video.diff(dim=2).abs().mean((1, 2, 3)) + video.diff(dim=1).abs().mean((1, 2, 3)))


def motion(video: torch.Tensor) -> torch.Tensor:
    """[T - 1] mean absolute difference of neighbouring frames of [T, h, w, 3]."""
    return video.diff(dim=0).abs().mean((1, 2, 3))


def mean_difference(picture: numpy.ndarray, before: numpy.ndarray) -> float:
    """Mean absolute difference of two pictures [h, w, 3] uint8, in levels of 255 over pixels and colours."""
    return float(numpy.abs(picture.astype(numpy.int16) - before).mean())


def temporal_flickering(differences: Sequence[float]) -> float:
    """VBench's measure of that name (arXiv 2311.17982), 0..1, higher is steadier: 1 less the mean of neighbouring pictures' mean
    absolute differences (levels of 255). NaN for fewer than two pictures."""
    return 1 - sum(differences) / len(differences) / 255 if differences else math.nan


def flicker(series: torch.Tensor, period: int) -> float:
    """Share, 0..1, of the variation of a series [n] that has this period and its overtones; n is cut to whole periods.

    This pack's own measure: it is about what repeats with every chunk, which VBench's temporal flickering is not.
    NaN for fewer than two periods or a period below 2. White noise has one over the number of periods there, in the mean.
    """
    whole = len(series) // max(period, 1)
    if period < 2 or whole < 2:
        return math.nan
    series = series[: whole * period]
    power = torch.fft.rfft(series - series.mean()).abs().square()
    return float(power[whole::whole].sum() / power.sum().clamp(min=1e-20))


def nearness(video: torch.Tensor, reference: torch.Tensor, window: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """PSNR in dB (at most 100) and SSIM of every picture of [t, h, w, 3] in 0..1 to the reference's, [t] each.

    SSIM with a Gaussian window of `window` pixels, sigma 1.5 (Wang et al. 2004), a mean over pixels and colours.
    """
    from kornia.metrics import psnr, ssim

    a, b = (t.permute(0, 3, 1, 2) for t in (video, reference))
    similar = ssim(a, b, window_size=window).mean((1, 2, 3))
    noise = torch.stack([psnr(x, y, 1.0) for x, y in zip(a, b, strict=True)])
    return noise.clamp(max=HIGHEST_PSNR), similar


def displacement(frame: numpy.ndarray, before: numpy.ndarray) -> float:
    """How far the picture moved, in pixels: the mean over blocks of each one's shift by phase correlation.

    Two frames [h, w, 3] uint8. Found at 128 pixels or fewer on the long side, in blocks of 32 that overlap by half, to a
    fraction of a pixel; shifts beyond a quarter of a block are not seen. Blocks without a clear match are left out; NaN if
    all are.
    """
    pair = torch.from_numpy(numpy.stack([before, frame]).astype(numpy.float32) @ _LUMA)
    scale = max(1, math.ceil(max(pair.shape[1:]) / _FLOW_SIDE))
    pair = torch.nn.functional.avg_pool2d(pair[None], scale)[0]
    side = min(_BLOCK, *pair.shape[1:])
    if side < 4:
        return math.nan
    blocks = pair.unfold(1, side, max(side // 2, 1)).unfold(2, side, max(side // 2, 1)).flatten(1, 2)
    hann = torch.hann_window(side, periodic=False)
    blocks = (blocks - blocks.mean((-2, -1), keepdim=True)) * (hann[:, None] * hann)
    first, second = torch.fft.rfft2(blocks)
    cross = second * first.conj()
    match = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-3), s=(side, side))
    height, place = match.flatten(1).max(-1)
    return scale * _mean_shift(match, height, place, side)


def _mean_shift(match: torch.Tensor, height: torch.Tensor, place: torch.Tensor, side: int) -> float:
    """Mean length of the blocks' shifts in match [blocks, side, side]; NaN without a block that has a clear peak."""
    row, column = place // side, place % side
    each = torch.arange(len(match))
    parts = []
    for along, indices in (
        (row, lambda d: (each, (row + d) % side, column)),
        (column, lambda d: (each, row, (column + d) % side)),
    ):
        low, high = match[indices(-1)].clamp(min=0), match[indices(1)].clamp(min=0)
        # the true peak lies between its two highest neighbours, nearer the higher one
        between = torch.where(high > low, high / (high + height), -low / (low + height))
        shift = torch.where(along > side // 2, along - side, along) + between.nan_to_num()
        parts.append(shift)
    clear = (height > _FOLLOWED) & (torch.stack(parts).abs().amax(0) <= side / 4)
    return float(torch.stack(parts).norm(dim=0)[clear].mean())


def read_pictures(
    source: Source | FileClip | MemoryClip, every: int = 1, what: str = "the video"
) -> Iterator[numpy.ndarray]:
    """Every `every`-th picture [h, w, 3] uint8 of a video, one at a time, upright and in the size of the first one.

    UnreadableVideo, a ValueError, if there is none.
    """
    for _, picture in clip(source, what).pictures(every):
        yield picture
        del picture


class _Sums:
    """Means of named numbers that come one by one; those that are NaN do not count."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, name: str) -> int:
        return self._counts.get(name, 0)

    def mean(self, name: str) -> float | None:
        return self._sums[name] / self._counts[name] if name in self._sums else None


@dataclass(frozen=True)
class Parts:
    """Where the parts of a video begin: the second after `first` pictures, each other one `each` pictures later."""

    first: int
    each: int

    def of(self, index: int) -> int:
        """The part that a picture is in."""
        return max(0, (index - self.first) // self.each + 1)

    def begin(self, index: int) -> bool:
        """Whether a part but the first begins with this picture."""
        return index >= self.first and (index - self.first) % self.each == 0

    def size(self, part: int) -> int:
        """How many pictures a part has."""
        return self.each if part else self.first


def parts_of(chunk_frames: int, clip_frames: int = 0, first_clip_frames: int = 0) -> Parts:
    """A rollout's chunks, whose first has 3 pictures fewer (a causal video VAE makes one picture of the first latent); or with
    `clip_frames` the clips that a video was put together from."""
    if clip_frames:
        return Parts(first_clip_frames or clip_frames, clip_frames)
    return Parts(max(1, chunk_frames - 3), chunk_frames)


CHUNK_MEANS = ("lightness", "a", "b", "contrast", "sharpness", "colour", "motion", "displacement")
# those that a row has only where they were asked for
ASKED_MEANS = ("psnr", "ssim", *FLOW_MEANS)


@dataclass
class _Series:
    """What is known of each picture, in order: how much it moved, its difference in levels, its mean Lab colour."""

    moved: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    colours: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, values: dict[str, float], picture: numpy.ndarray, before: numpy.ndarray | None) -> None:
        self.colours.append((values["lightness"], values["a"], values["b"]))
        if before is not None:
            self.moved.append(values["motion"])
            self.differences.append(mean_difference(picture, before))


def measure_video(
    pictures: Iterable[numpy.ndarray],
    reference: Iterable[numpy.ndarray] | None = None,
    chunk_frames: int = 12,
    every: int = 1,
    on_picture: Callable[[], object] | None = None,
    flow: DenseFlow | None = None,
    clip_frames: int = 0,
    first_clip_frames: int = 0,
) -> dict[str, Any]:
    """JSON-able: measures of a video [h, w, 3] uint8 part by part, holding two of its pictures at a time.

    `pictures` and `reference` are every `every`-th picture of their videos, as `read_pictures` gives them. The parts are the
    chunks of a rollout, or with `clip_frames` the clips of a video that was put together from them (`parts_of`); these have their
    seams in their rows, and what each clip adds in `per_clip`. `drift` is the distance of a part's mean Lab colour from the first
    part's. `flow`: measure dense flow with it, too.
    ValueError for no picture, pictures below 16x16, and a reference of another size.
    """
    parts, series = parts_of(chunk_frames, clip_frames, first_clip_frames), _Series()
    chunks: list[tuple[int, int, _Sums]] = []
    before, others, compared = None, iter(reference or ()), 0
    for number, picture in enumerate(pictures):
        index = number * every
        _check_size(picture)
        if not chunks or chunks[-1][0] != parts.of(index):
            chunks.append((parts.of(index), index, _Sums()))
        values = _picture_values(picture, before)
        series.add(values, picture, before)
        if flow is not None:
            values |= flow.add(picture)
        if (other := next(others, None)) is not None:
            values |= _nearness_values(picture, other)
            compared += 1
        chunks[-1][2].add(values | {"pictures": 1.0})
        before = picture
        if on_picture:
            on_picture()
    if before is None:
        raise ValueError("the video has no frame in it; connect a VIDEO with frames in it")
    rows, moved = _chunk_table(chunks), series.moved
    return {
        "pictures": len(series.colours),
        "size": [before.shape[1], before.shape[0]],
        "chunk_frames": chunk_frames,
        "every": every,
        "compared": compared,
        "flicker": _number(flicker(torch.tensor(moved), parts.each // every)) if parts.each % every == 0 else None,
        "temporal_flickering": _number(temporal_flickering(series.differences)) if every == 1 else None,
        "seam": _seam(moved, parts) if every == 1 else None,
        **(_clips(rows, chunks, series, parts, every) if clip_frames else {}),
        "chunks": rows,
    }


def _check_size(picture: numpy.ndarray, expected: tuple[int, ...] | None = None) -> None:
    height, width = picture.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"the video is {width}x{height}; it must be at least {LEAST_SIDE}x{LEAST_SIDE} to be measured")
    if expected and expected != picture.shape:
        raise ValueError(
            f"reference is {width}x{height} and the video {expected[1]}x{expected[0]}; both must have the same size"
        )


def _picture_values(picture: numpy.ndarray, before: numpy.ndarray | None) -> dict[str, float]:
    if before is not None and before.shape != picture.shape:
        raise ValueError("the video changes its size on the way; connect one with frames of one size")
    colour = mean_lab([picture]).tolist()
    values = frame_meters(picture, before) | dict(zip(("lightness", "a", "b"), colour, strict=True))
    if before is None:
        return values | {"motion": math.nan}
    return values | {"displacement": displacement(picture, before)}


def _nearness_values(picture: numpy.ndarray, other: numpy.ndarray) -> dict[str, float]:
    _check_size(other, picture.shape)
    noise, similar = nearness(*(torch.from_numpy(p)[None].float() / 255 for p in (picture, other)))
    return {"psnr": float(noise), "ssim": float(similar)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _seam(moved: list[float], parts: Parts) -> float | None:
    """Motion into the first picture of a part against motion elsewhere; 1 without seams."""
    series = torch.tensor(moved)
    border = torch.tensor([parts.begin(index) for index in range(1, len(moved) + 1)], dtype=torch.bool)
    inside = series[~border].mean()
    return _number(float(series[border].mean() / inside)) if inside > 1e-6 else None


# what a clip adds is told of these
CLIMBING = ("drift", "colour", "contrast", "sharpness", "seam", "seam_colour")


def _clips(
    rows: list[dict[str, Any]], chunks: list[tuple[int, int, _Sums]], series: _Series, parts: Parts, every: int
) -> dict[str, Any]:
    """The seam at which each clip begins, into `rows`; what a clip adds in the mean, as the slope of the line through the clips.

    `seam` is the motion into a clip's first picture against the motion inside clips, `seam_colour` the distance in Lab of its
    first picture from the one before. Both are of neighbouring pictures, so None where not every one was measured. A last clip
    that is cut short has no part in the line.
    """
    inside = [m for i, m in enumerate(series.moved, 1) if not parts.begin(i)]
    usual = sum(inside) / len(inside) if inside else 0.0
    for row in rows:
        index = row["first_picture"]
        jumps = every == 1 and index > 0
        row["seam"] = series.moved[index - 1] / usual if jumps and usual > 1e-6 else None
        row["seam_colour"] = math.dist(series.colours[index], series.colours[index - 1]) if jumps else None
    whole = [
        row
        for row, (part, _, sums) in zip(rows, chunks, strict=True)
        if sums.count("pictures") * every >= parts.size(part)
    ]
    return {
        "clip_frames": parts.each,
        "first_clip_frames": parts.first,
        "per_clip": {name: _slope([(row["chunk"], row[name]) for row in whole]) for name in CLIMBING},
    }


def _slope(points: list[tuple[int, float | None]]) -> float | None:
    """Of the straight line that is nearest to the points (least squares); None for fewer than two."""
    known = [(x, y) for x, y in points if y is not None]
    if len(known) < 2:
        return None
    middle = sum(x for x, _ in known) / len(known)
    return sum((x - middle) * y for x, y in known) / sum((x - middle) ** 2 for x, _ in known)


def _chunk_table(chunks: list[tuple[int, int, _Sums]]) -> list[dict[str, Any]]:
    start = [chunks[0][2].mean(name) for name in ("lightness", "a", "b")]
    rows = []
    for chunk, index, sums in chunks:
        row = {"chunk": chunk, "first_picture": index} | {
            name: sums.mean(name) for name in (*CHUNK_MEANS, *ASKED_MEANS)
        }
        row["drift"] = math.dist([row["lightness"], row["a"], row["b"]], start)
        rows.append({name: value for name, value in row.items() if name not in ASKED_MEANS or value is not None})
    return rows
