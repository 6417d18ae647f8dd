"""What the sections share: sizes, the random model, rollouts of a configuration, the two ways, and medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from host import random_model, synchronise

ENDLESS = 1 << 20
PLAIN, FUSED = WAYS = ("plain", "fused")


@dataclass(frozen=True)
class Size:
    """A model's geometry, a picture in pixels, and how often things are repeated."""

    model: str = "1.3b"
    layers: int | None = None
    width: int = 832
    height: int = 480
    text: int = 512
    rounds: int = 5
    drift_chunks: int = 300
    drift_width: int = 480
    drift_height: int = 272
    clip_chunks: int = 20
    absorbed_window: int = 60


# the same code in seconds on a CPU, for the tests
TINY = Size(
    "demo", 2, 64, 64, 4, rounds=1, drift_chunks=3, drift_width=64, drift_height=64, clip_chunks=3, absorbed_window=12
)


@dataclass
class Section:
    """A table of the report."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # lines of Markdown after the notes, such as a picture
    more: list[str] = field(default_factory=list)


class NotOffered(Exception):
    """The product, the host or the machine does not have what a row is about; the message says why."""


def configurations() -> dict[str, dict[str, Any]]:
    """Name -> what differs from chunks of 3 latent frames, packed positions."""
    from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic

    return {
        "adaptive, window 3": {"anchor": AnchorAdaptive(1), "window": 3},
        "none, 7 frames": {"anchor": Anchor(), "window": 4},
        "LongLive, sink 3, window 6": {"anchor": AnchorStatic(3), "window": 6},
        "Self-Forcing, window 18": {"anchor": Anchor(), "window": 18},
        "frame-wise, window 20": {"anchor": Anchor(), "window": 20, "chunk": 1},
    }


class Bench:
    """One process's models and rollouts of a Size."""

    def __init__(self, size: Size, until: float) -> None:
        """`until`: the moment (time.monotonic) after which no more is begun."""
        self.size, self.until = size, until
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.context = torch.randn(1, size.text, 4096, generator=torch.Generator().manual_seed(0))

    @cached_property
    def patcher(self) -> Any:
        return random_model(self.size.model, self.size.layers, device=self.device)

    @cached_property
    def host(self) -> Any:
        return self.host_of(self.patcher)

    def host_of(self, patcher: Any) -> Any:
        from adastate_pack.nodes.host.model import HostModel

        return HostModel(patcher, self.context, 1)

    @property
    def time_left(self) -> float:
        return self.until - time.monotonic()

    def spec(self, anchor: Any, window: int, chunk: int = 3, width: int = 0, height: int = 0, **more: Any) -> Any:
        from adastate_pack.adastate_core.rollout import RolloutSpec

        host = more.pop("host", None) or self.host
        rows, columns = (height or self.size.height) // 8, (width or self.size.width) // 8
        return RolloutSpec(host.geometry, 1, rows, columns, chunk, window, anchor, "packed", host.dtype, **more)

    def rollout(self, spec: Any, way: str = PLAIN, host: Any = None, **more: Any) -> Any:
        """A rollout of a loaded model, this way. NotOffered if the fused one cannot be gone, or no time is left."""
        from adastate_pack.adastate_core.rollout import Rollout, Settings
        from adastate_pack.adastate_core.schedules.schedule import Schedule

        if self.time_left <= 0:
            raise NotOffered("the time was used up before (--minutes)")
        host = host or self.host
        plan = spec.plan(self.size.text, length=more.get("length"))
        host.load(plan)
        go(host, spec, plan, way)
        return Rollout(host, spec, Settings(0, Schedule.shifted(4, 5.0)), text_tokens=self.size.text, **more)


def go(host: Any, spec: Any, plan: Any, way: str) -> None:
    """Compile what the fused way needs, or choose the plain one. NotOffered."""
    from adastate_pack.adastate_core.fused import SWITCH

    with variable(SWITCH, "0" if way == PLAIN else os.environ.get(SWITCH, "1")):
        host.fuse(spec, plan)
    if way == FUSED and not host.fused_blocks.compiled_layers:
        raise NotOffered("; ".join(host.fused_blocks.why) or "no block can use compiled functions")


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable within it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes, the device's part included."""
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def median_of(work: Callable[[], object], rounds: int, warm: int = 1) -> float:
    """Median seconds after `warm` rounds that are not counted."""
    for _ in range(warm):
        work()
    return statistics.median(seconds_of(work) for _ in range(rounds))


def filled(rollout: Any) -> Iterator[Any]:
    """The chunks of a rollout, once its window is full and its tables are made."""
    stream = rollout.chunks(ENDLESS)
    for _ in range(-(-rollout.spec.window_frames // rollout.spec.chunk_frames) + 2):
        next(stream)
    return stream


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def either(make: Callable[[], str]) -> str:
    """A cell, or why there is none."""
    try:
        return make()
    except NotOffered as error:
        return f"not offered: {error}"
