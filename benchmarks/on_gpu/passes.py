"""One pass, plain and fused: its time, its heaviest kernels, and how much of it the device is idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rollout import Bare
from torch.profiler import ProfilerActivity, profile

from on_gpu.bench import FUSED, PLAIN, Bench, NotOffered, Section, configurations, filled, median_of, ms, seconds_of

HEAVIEST = 15


def one_pass(rollout: Any) -> Callable[[], object]:
    """A noisy pass over the full cache of a rollout, which changes nothing."""
    frames = rollout.spec.anchor.state_frames + rollout.spec.chunk_frames
    x = torch.randn(rollout.past.shape(frames), device=rollout.model.device)
    rollout.past.start_chunk()
    rollout.past.place(rollout.past.layout())
    return lambda: rollout._passes.noisy(x, 500.0, rollout.spec.chunk_frames)


def kernels(work: Callable[[], object]) -> tuple[list[tuple[str, int, float]], float, int]:
    """(name, calls and seconds of each kernel, longest first; seconds of the device at work; kernels in all)."""
    device = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
    with profile(activities=kinds) as found:
        seconds_of(work)
    rows = []
    for event in found.key_averages():
        spent = event.self_device_time_total if device else event.self_cpu_time_total
        if spent and (not device or event.device_type == torch.autograd.DeviceType.CUDA):
            rows.append((event.key, event.count, spent / 1e6))
    rows.sort(key=lambda row: -row[2])
    return rows, sum(row[2] for row in rows), sum(row[1] for row in rows)


def a_pass(bench: Bench) -> Section:
    """Both ways of the adaptive configuration."""
    section = Section("A noisy pass, adaptive, window 3", ["what", *(way for way in (PLAIN, FUSED))])
    columns = {way: _column(bench, way) for way in (PLAIN, FUSED)}
    for i, name in enumerate(("ms a pass", "kernels", "device idle", "ms of five bare passes, of a chunk")):
        section.rows.append([name, *(column[i] if len(column) > i else column[0] for column in columns.values())])
    for way in columns:
        for name, calls, spent in bench.heaviest.get(way, ()):
            section.more.append(f"| {way} | `{name[:80]}` | {calls} | {ms(spent)} |")
    if section.more:
        section.more = ["| way | kernel | calls | ms |", "| --- | --- | ---: | ---: |", *section.more]
    section.notes.append("A bare pass is the same module on keys and values that lie ready: no cache logic.")
    return section


def _column(bench: Bench, way: str) -> list[str]:
    try:
        rollout = bench.rollout(bench.spec(**configurations()["adaptive, window 3"]), way)
    except NotOffered as error:
        return [f"not offered: {error}"]
    stream = filled(rollout)
    chunk = median_of(lambda: next(stream), bench.size.rounds)
    work = one_pass(rollout)
    took = median_of(work, bench.size.rounds)
    rows, busy, count = kernels(work)
    bench.heaviest = getattr(bench, "heaviest", {}) | {way: rows[:HEAVIEST]}
    idle = f"{100 * max(0.0, 1 - busy / took):.1f} %" if torch.cuda.is_available() else "of a GPU only"
    bare = Bare(bench.host, 8, rollout.spec.tokens)
    x = torch.randn(rollout.past.shape(4), device=bench.host.device)
    five = 5 * median_of(lambda: bench.host.velocity(x, 500.0, bare), bench.size.rounds)
    return [ms(took), str(count), idle, f"{ms(five)}, {five / chunk:.2f}"]


def full_length(bench: Bench) -> Section:
    """The adaptive configuration beside caches that span a whole clip."""
    section = Section("Beside a full-length cache", ["what", "ms a chunk", "of the adaptive one", "cache MiB"])
    from adastate_pack.adastate_core.anchors import Anchor

    clips = (18, 48, 123) if bench.device == "cuda" else (6,)
    cases = {"adaptive, window 3": configurations()["adaptive, window 3"]}
    cases |= {f"full-length, {window + 3} frames": {"anchor": Anchor(), "window": window} for window in clips}
    first = None
    for name, case in cases.items():
        rollout = bench.rollout(bench.spec(**case))
        stream = filled(rollout)
        took = median_of(lambda stream=stream: next(stream), bench.size.rounds)
        first = first or took
        section.rows.append([name, ms(took), f"{took / first:.2f}", f"{rollout.cache.nbytes / 2**20:.1f}"])
        del rollout, stream
    return section
