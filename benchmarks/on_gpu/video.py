"""End to end: latents, decoding, and the file that a stream writes, beside each other as in the product."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from on_gpu.bench import FUSED, PLAIN, Bench, NotOffered, Section, configurations, filled, ms, seconds_of
from on_gpu.decoding import decoder_of

CORES = 4


@contextlib.contextmanager
def cores(count: int | None) -> Iterator[str]:
    """The process held to so many cores (None: all that it has); how many those are."""
    if not hasattr(os, "sched_setaffinity"):
        if count is not None:
            raise NotOffered("this system cannot hold a process to some of its cores")
        yield str(os.cpu_count())
        return
    before = os.sched_getaffinity(0)
    held = set(sorted(before)[:count])
    os.sched_setaffinity(0, held)
    try:
        yield str(len(held))
    finally:
        os.sched_setaffinity(0, before)


def end_to_end(bench: Bench) -> Section:
    """Pictures a second of a rollout with its file, once all is warm."""
    section = Section("End to end, adaptive, window 3", ["VAE", "way", "cores", "ms a chunk", "pictures a second"])
    for kind in ("full", "tiny"):
        for way in (PLAIN, FUSED):
            for count in (None, CORES):
                try:
                    with cores(count) as held:
                        took = _clip(bench, kind, way)
                except NotOffered as error:
                    section.rows.append([kind, way, "", f"not offered: {error}", ""])
                    break
                section.rows.append([kind, way, held, ms(took), f"{12 / took:.1f}"])
    section.notes.append(
        f"{bench.size.clip_chunks} chunks to an mp4 (H.264), from full caches to the last frame written."
    )
    return section


def _clip(bench: Bench, kind: str, way: str) -> float:
    from adastate_pack.adastate_core.video.decoded_stream import VideoStream
    from adastate_pack.adastate_core.video.sink import VideoSink

    rollout = bench.rollout(bench.spec(**configurations()["adaptive, window 3"]), way)
    decoder = decoder_of(bench, kind, way == FUSED)
    chunks, patcher = filled(rollout), bench.patcher
    with tempfile.TemporaryDirectory() as folder:
        sink = VideoSink(Path(folder, "clip.mp4"), bench.size.width, bench.size.height, 16)
        stream = VideoStream(decoder, [sink])
        _step(stream, chunks, patcher)

        def clip() -> None:
            for _ in range(bench.size.clip_chunks):
                _step(stream, chunks, patcher)
            stream.drain()

        took = seconds_of(clip)
        stream.close()
    return took / bench.size.clip_chunks


def _step(stream: Any, chunks: Any, patcher: Any) -> None:
    from adastate_pack.nodes.host.model import to_vae_space

    stream.step(to_vae_space(patcher, next(chunks).latents))
