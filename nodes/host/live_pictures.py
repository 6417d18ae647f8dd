"""Small pictures and meters of decoded frames, made in a thread of their own that never holds a rollout up."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from PIL import Image

from ...adastate_core.measure.live_meters import LiveMeters
from ...adastate_core.video.picture_forms import to_bytes

log = logging.getLogger("adastate")
A_SECOND = 4  # pictures, on average
A_CHUNK = 12  # pictures at most
WIDTH = 320
QUALITY = 75
_MEASURED = 3  # frames of a chunk that meters are taken of
_METER_SIDE = 160
_AT_ONCE = 2**20  # values that are turned into bytes together: fewer calls for small frames, no copies of large ones

Facts = dict[str, Any]


class Encoder:
    """A thread with room for one waiting chunk. A chunk that comes while another waits takes its place.

    `show(facts, meters)` is called for every chunk, with meters None for one that was dropped; `show_pictures(chunk,
    [{"frame", "url"}], hidden)` for those that bring pictures, with the hidden state's as a URL or None.
    """

    def __init__(
        self,
        show: Callable[[Facts, dict[str, float] | None], None],
        show_pictures: Callable[[int, list[dict[str, Any]], str | None], None],
    ) -> None:
        self._show, self._show_pictures = show, show_pictures
        self._changed, self._closing, self._busy = threading.Condition(), False, False
        self._waiting: tuple[Facts, torch.Tensor, torch.Tensor | None] | None = None
        self._after: Callable[[], None] | None = None
        self._meters, self._allowed, self._asked = LiveMeters(), float(A_SECOND), time.monotonic()
        threading.Thread(target=self._work, name="adastate-live", daemon=True).start()

    def offer(self, facts: Facts, pictures: torch.Tensor, hidden: torch.Tensor | None = None) -> None:
        """Hand over a chunk's facts (`chunk`, `first_frame` among them), frames [t, H, W, 3], bytes or in 0..1, never written to,
        and perhaps a picture [h, w, 3] of the hidden state."""
        with self._changed:
            dropped, self._waiting = self._waiting, (facts, pictures, hidden)
            self._changed.notify()
        if dropped is not None:
            self._show(dropped[0], None)

    def close(self, after: Callable[[], None]) -> None:
        """End the thread once what waits is done, and call `after` there."""
        with self._changed:
            self._after, self._closing = after, True
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Wait until all that was offered is shown, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._busy, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                taken, self._waiting = self._waiting, None
                self._busy = taken is not None
            if taken is None:
                self._after()
                return
            try:
                self._make(*taken)
            except Exception as error:  # noqa: BLE001  a preview is never worth a rollout
                log.warning("a chunk's preview could not be made: %s", error)
                self._show(taken[0], None)

    def _make(self, facts: Facts, pictures: torch.Tensor, hidden: torch.Tensor | None) -> None:
        measured, chosen = spread(len(pictures), _MEASURED), spread(len(pictures), self._allowance())
        frames = _Frames(pictures, {*measured, *chosen, *(i - 1 for i in measured if i)})
        pairs = [(frames.small(i - 1) if i else None, frames.small(i)) for i in measured]
        self._show(facts, {name: round(value, 5) for name, value in self._meters.measure(pairs).items()})
        state = None if hidden is None else as_url(_Frames(hidden[None], {0}).picture(0))
        if chosen or state:
            made = [{"frame": facts["first_frame"] + i, "url": as_url(frames.picture(i))} for i in chosen]
            self._show_pictures(facts["chunk"], made, state)

    def _allowance(self) -> int:
        """How many pictures may be made now."""
        now = time.monotonic()
        self._allowed = min(A_CHUNK, self._allowed + A_SECOND * max(0.0, now - self._asked))
        self._asked = now
        taken = int(self._allowed)
        self._allowed -= taken
        return taken


class _Frames:
    """Some frames of [t, H, W, 3], at the sizes that are wanted."""

    def __init__(self, pictures: torch.Tensor, wanted: set[int]) -> None:
        indices, self._made = sorted(wanted), {}
        step = max(1, _AT_ONCE // pictures[0].numel())
        for some in (indices[i : i + step] for i in range(0, len(indices), step)):
            for index, frame in zip(some, to_bytes(pictures[some]).numpy(), strict=True):
                self._made[index] = self._fitting(Image.fromarray(frame))

    @staticmethod
    def _fitting(image: Image.Image) -> Image.Image:
        if image.width <= WIDTH:
            return image
        size = (WIDTH, max(1, round(image.height * WIDTH / image.width)))
        return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)

    def picture(self, index: int) -> Image.Image:
        """At most 320 pixels wide."""
        return self._made[index]

    def small(self, index: int) -> numpy.ndarray:
        """For the meters: [h, w, 3] uint8, no side longer than 160."""
        image = self.picture(index)
        factor = -(-max(image.size) // _METER_SIDE)
        return numpy.asarray(image.reduce(factor) if factor > 1 else image)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0..count-1, evenly, the last one among them."""
    wanted = min(count, wanted)
    return [(i + 1) * count // wanted - 1 for i in range(wanted)]


def as_url(image: Image.Image) -> str:
    """A JPEG as a data URL."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
