"""Videos side by side in one, labelled, each with running meters beneath; frame by frame, at a memory of a few frames.

Meters are plain picture measures, the same for every video: `motion` (mean change of luma from the frame before),
`sharpness` (mean step between neighbouring pixels), `contrast` (standard deviation of luma), `colour` (mean chroma), all
of values in 0..1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy
from PIL import Image, ImageDraw, ImageFont

from ..video.frames import CLOCK, FileClip, MemoryClip, Source, clip
from .metrics import METERS, frame_meters

_COLOURS = ((237, 174, 73), (94, 187, 220), (240, 240, 240), (209, 73, 91))
_LABEL, _METER, _GAP = 22, 26, 4
_LEAST_SIDE, _MOST_SIDE = 192, 8192
_LONGEST_STILL = 10  # seconds that a frame stays; a jump beyond is damage


@dataclass
class _Source:
    """One video read in step with the others; after its end its last frame stays."""

    clip: FileClip | MemoryClip
    label: str
    frames: int = 0
    frame: numpy.ndarray | None = None
    before: numpy.ndarray | None = None
    curves: dict[str, deque] = field(default_factory=dict)
    sums: list[dict[str, float]] = field(default_factory=list)

    def open(self) -> None:
        """Read the first frame. ValueError if there is none."""
        self._pictures = self.clip.pictures()
        self._slack = min(CLOCK, 1 / (4 * self.clip.rate))
        self._start, self._next = next(self._pictures)
        self._due = self._ends = self._start
        self.advance(Fraction(0))

    def advance(self, time: Fraction) -> bool:
        """Read on to the frame that is on screen `time` seconds after the first; False once the video has ended."""
        while self._next is not None and self._due <= self._start + time + self._slack:
            self.before, self.frame = self.frame, self._next
            self._ends = self._due + 1 / self.clip.rate
            self.frames += 1
            due, self._next = next(self._pictures, (self._ends, None))
            self._start += max(due - self._ends - _LONGEST_STILL, Fraction(0))
            self._due = due
        return self._next is not None or self._start + time + self._slack < self._ends

    def close(self) -> None:
        if hasattr(self, "_pictures"):
            self._pictures.close()


class Comparison:
    """Two or more videos as one. Iterate over frames [h, w, 3] uint8; `rate` is the first video's.

    `videos` are paths, binary streams or clips; a video of another shape is stretched to the first one's. ValueError for
    videos without frames.
    """

    def __init__(self, videos: Sequence[Source | FileClip | MemoryClip], labels: Sequence[str]) -> None:
        self.sources: list[_Source] = []
        self._highest = dict.fromkeys(METERS, 1e-6)
        try:
            for i, (video, label) in enumerate(zip(videos, labels, strict=True)):
                self.sources.append(_Source(clip(video, label or f"video {i + 1}"), label))
                self.sources[-1].open()
        except BaseException:
            self.close()
            raise
        self.rate = self.sources[0].clip.rate
        height, width = self.sources[0].frame.shape[:2]
        self._cell = self._fitting(width, height)
        self._font = ImageFont.load_default(14)
        for source in self.sources:
            source.curves = {name: deque(maxlen=self._cell[0]) for name in METERS}

    def _fitting(self, width: int, height: int) -> tuple[int, int]:
        """The size of one video in the result: large enough to be read, and all of them small enough to be encoded."""
        zoom = max(1, -(-_LEAST_SIDE // min(height, width)))
        most = _MOST_SIDE // len(self.sources) - _GAP, _MOST_SIDE - _LABEL - len(METERS) * _METER
        less = min(1.0, *(limit / (side * zoom) for limit, side in zip(most, (width, height), strict=True)))
        width, height = (max(2, int(side * zoom * less)) for side in (width, height))
        return width + width % 2, height

    @property
    def count(self) -> int:
        """How many frames it should have, a guess."""
        return max(int(source.clip.count / source.clip.rate * self.rate) for source in self.sources)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the made frames, both even."""
        width = len(self.sources) * (self._cell[0] + _GAP) - _GAP
        height = _LABEL + self._cell[1] + len(METERS) * _METER
        return width + width % 2, height + height % 2

    def __iter__(self) -> Iterator[numpy.ndarray]:
        number = 0
        while True:
            alive = [source.advance(number / self.rate) for source in self.sources]
            if not any(alive):
                return
            for source, running in zip(self.sources, alive, strict=True):
                self._measure(source, running, number)
            yield self._drawn(alive)
            number += 1

    def _measure(self, source: _Source, running: bool, number: int) -> None:
        if not running:
            return
        second = int(number / self.rate)
        values = frame_meters(source.frame, source.before)
        while len(source.sums) <= second:
            source.sums.append(dict.fromkeys((*METERS, "frames"), 0.0))
        source.sums[second]["frames"] += 1
        for name, value in values.items():
            source.curves[name].append(value)
            source.sums[second][name] += value
            self._highest[name] = max(self._highest[name], value)

    def _drawn(self, alive: list[bool]) -> numpy.ndarray:
        page = Image.new("RGB", self.size, (24, 24, 28))
        draw = ImageDraw.Draw(page)
        for i, (source, running) in enumerate(zip(self.sources, alive, strict=True)):
            left, (width, height) = i * (self._cell[0] + _GAP), self._cell
            picture = Image.fromarray(source.frame).resize((width, height), Image.Resampling.NEAREST)
            page.paste(picture, (left, _LABEL))
            title = source.label if running else f"{source.label} (ended)"
            draw.text((left + 4, 2), title, fill=(235, 235, 235), font=self._font)
            for j, name in enumerate(METERS):
                self._curve(draw, source.curves[name], name, left, _LABEL + height + j * _METER, _COLOURS[j])
        return numpy.array(page)

    def _curve(self, draw: ImageDraw.ImageDraw, values: deque, name: str, left: int, top: int, colour: tuple) -> None:
        room = _METER - 4
        points = [(left + x, top + _METER - 2 - room * v / self._highest[name]) for x, v in enumerate(values)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=1)
        draw.text((left + 4, top), name, fill=colour, font=self._font)

    def numbers(self) -> list[dict]:
        """JSON-able: for every video its label, frames, and each meter's mean by second."""
        out = []
        for source in self.sources:
            seconds = [{n: s[n] / s["frames"] for n in METERS} for s in source.sums if s["frames"]]
            out.append({"label": source.label, "frames": source.frames} | {n: [s[n] for s in seconds] for n in METERS})
        return out

    def close(self) -> None:
        for source in self.sources:
            source.close()
