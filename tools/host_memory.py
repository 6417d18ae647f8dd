"""What a server of the host holds while a rollout runs: memory, files, threads. And how fast that grows, with an honest interval.

Reads /proc, so Linux only. Standard library only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.host_client import Server

BATCHES = 10
T_OF_8 = 2.306  # the 97.5 % point of Student's t for 8 degrees of freedom: those of BATCHES - 1 differences
# of a random walk: the variance of a least squares slope is 6/5 of that of (end - start) / length, and neighbouring batch means
# differ by only 2/3 of the variance that the walk has gathered from one batch to the next
WALK = 6 / 5 * 3 / 2


@dataclass(frozen=True)
class Held:
    """What the server held when `chunks` chunks were done; memory in KiB."""

    chunks: int
    resident: int
    anonymous: int
    handles: int
    threads: int


def held(server: Server, chunks: int) -> Held:
    """A sample of a server that runs."""
    process = Path(f"/proc/{server.process.pid}")
    lines = (line.partition(":") for line in (process / "status").read_text().splitlines())
    status = {name: value.split() for name, _, value in lines}
    memory = [int(status[name][0]) for name in ("VmRSS", "RssAnon")]
    return Held(chunks, *memory, len(list((process / "fd").iterdir())), int(status["Threads"][0]))


def newest_run(server: Server) -> dict[str, Any] | None:
    """The summary of the newest rollout, or None before there is one."""
    runs = server.request("/adastate/runs")["runs"]
    return runs[-1] if runs else None


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """How fast `ys` grow with `xs`: (least squares, half the width of its 95 % interval), both per unit of x.

    Resident memory is no line with independent noise: the allocator takes memory in steps and hardly gives it back, so that what a
    sample is off the line, the next ones are too, and the interval of ordinary least squares is far too narrow. Here the
    samples are averaged in ten batches of equal width, and the interval is that of a random walk, the worst that such steps can do,
    whose steps are as large as the batches' rises say. Where the noise is independent it comes out wider than it need be.
    ValueError for a batch without a sample.
    """
    low, width = min(xs), (max(xs) - min(xs)) / BATCHES
    batches: list[list[float]] = [[] for _ in range(BATCHES)]
    for x, y in zip(xs, ys, strict=True):
        batches[min(BATCHES - 1, int((x - low) / width))].append(y)
    if not all(batches):
        raise ValueError(f"there are too few samples for {BATCHES} batches: {len(xs)}")
    means = [statistics.fmean(batch) for batch in batches]
    rises = [after - before for before, after in zip(means[:-1], means[1:], strict=True)]
    half = T_OF_8 * (WALK / len(rises)) ** 0.5 * statistics.stdev(rises) / width
    return statistics.linear_regression(xs, ys).slope, half
