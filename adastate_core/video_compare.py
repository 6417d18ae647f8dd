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
from typing import IO

import av
import numpy
from PIL import Image, ImageDraw, ImageFont

from .metrics import METERS, frame_meters

_COLOURS = ((237, 174, 73), (94, 187, 220), (240, 240, 240), (209, 73, 91))
_LABEL, _METER, _GAP = 22, 26, 4
_LEAST_SIDE = 192


@dataclass
class _Source:
    """One video read in step with the others; after its end its last frame stays."""

    file: str | IO[bytes]
    label: str
    frames: int = 0
    frame: numpy.ndarray | None = None
    before: numpy.ndarray | None = None
    curves: dict[str, deque] = field(default_factory=dict)
    sums: list[dict[str, float]] = field(default_factory=list)

    def open(self) -> None:
        self.container = av.open(self.file)
        if not self.container.streams.video:
            raise ValueError(f"{self.label or 'a video'} has no picture track; connect a VIDEO with frames in it")
        self.stream = self.container.streams.video[0]
        self.rate = Fraction(self.stream.average_rate or 16)
        self._decoded = self.container.decode(self.stream)

    def advance(self, number: int) -> bool:
        """Read on to frame `number`; False once the video has ended."""
        while self.frames <= number:
            found = next(self._decoded, None)
            if found is None:
                return False
            self.before, self.frame = self.frame, found.to_ndarray(format="rgb24")
            self.frames += 1
        return True


class Comparison:
    """Two or more videos as one. Iterate over frames [h, w, 3] uint8; `rate` is the first video's.

    `files` are paths or binary streams. ValueError for files without frames.
    """

    def __init__(self, files: Sequence[str | IO[bytes]], labels: Sequence[str]) -> None:
        self.sources = [_Source(file, label) for file, label in zip(files, labels, strict=True)]
        self._highest = dict.fromkeys(METERS, 1e-6)
        try:
            for source in self.sources:
                source.open()
                if not source.advance(0):
                    raise ValueError(
                        f"{source.label or 'a video'} has no frame in it; connect a VIDEO with frames in it"
                    )
        except BaseException:
            self.close()
            raise
        self.rate = self.sources[0].rate
        height, width = self.sources[0].frame.shape[:2]
        zoom = max(1, -(-_LEAST_SIDE // min(height, width)))
        self._cell = (width * zoom + width * zoom % 2, height * zoom)
        self._font = ImageFont.load_default(14)
        for source in self.sources:
            source.curves = {name: deque(maxlen=self._cell[0]) for name in METERS}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the made frames, both even."""
        width = len(self.sources) * (self._cell[0] + _GAP) - _GAP
        height = _LABEL + self._cell[1] + len(METERS) * _METER
        return width + width % 2, height + height % 2

    def __iter__(self) -> Iterator[numpy.ndarray]:
        number = 0
        while True:
            alive = [s.advance(int(number * s.rate / self.rate)) for s in self.sources]
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
            if hasattr(source, "container"):
                source.container.close()
