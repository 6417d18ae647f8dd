"""Chunks of five configurations, both ways, beside the time that their arithmetic alone would take; and memory beside the plan."""

from __future__ import annotations

from typing import Any

import torch

from on_gpu.bench import FUSED, PLAIN, Bench, NotOffered, Section, configurations, filled, median_of, ms
from on_gpu.machine import ceilings


def flop(bench: Bench, spec: Any) -> float:
    """Of a chunk: the linears and attentions of its five passes, once the window is full."""
    block = bench.host.patcher.model.diffusion_model.blocks[0]
    width = spec.geometry.heads * spec.geometry.head_dim
    inner = block.ffn[0].out_features
    current = (spec.anchor.state_frames + spec.chunk_frames) * spec.tokens
    keys = current + (spec.anchor.frames + spec.window_frames) * spec.tokens
    linears = 2 * current * width * (6 * width + 2 * inner)  # q, k, v, o; q, o of the text; up and down
    attention = 4 * current * width * (keys + bench.size.text)
    return 5 * spec.geometry.layers * (linears + attention)


def chunks(bench: Bench) -> Section:
    """Milliseconds, pictures a second, and the share of the roofline."""
    section = Section(
        "A chunk",
        ["configuration", "way", "ms", "pictures a second", "share of the roofline", "allocated / planned MiB"],
    )
    ceiling = ceilings(bench)["gemm"]
    for name, case in configurations().items():
        for way in (PLAIN, FUSED):
            section.rows.append([name, way, *_row(bench, case, way, ceiling)])
    section.notes.append(
        f"The roofline is what linears and attentions of a chunk take at the speed of a large matrix product here "
        f"({ceiling / 1e12:.3g} TFLOP/s). Allocated is the most beyond the loaded model, planned are caches, the pack's own work "
        "and the host's estimate of a forward."
    )
    return section


def _row(bench: Bench, case: dict[str, Any], way: str, ceiling: float) -> list[str]:
    from adastate_pack.nodes.host.model import forward_bytes

    spec = bench.spec(**case)
    try:
        rollout = bench.rollout(spec, way)
    except NotOffered as error:
        return [f"not offered: {error}", "", "", ""]
    stream = filled(rollout)
    took = median_of(lambda: next(stream), bench.size.rounds)
    planned = rollout.cache.plan.total_bytes + forward_bytes(bench.patcher, rollout.cache.plan)
    peak = bench.host.peak_bytes()
    memory = "" if peak is None else f"{peak / 2**20:.0f} / {planned / 2**20:.0f}"
    pictures = 4 * spec.chunk_frames / took
    return [ms(took), f"{pictures:.1f}", f"{100 * flop(bench, spec) / ceiling / took:.0f} %", memory]


def first_frame(bench: Bench) -> Section:
    """From the first pass of a rollout whose model is loaded and compiled to the first pictures."""
    from on_gpu.decoding import decoder_of

    section = Section("The first pictures", ["VAE", "way", "ms to the first chunk's latents", "ms to its pictures"])
    for kind in ("full", "tiny"):
        for way in (PLAIN, FUSED):
            try:
                section.rows.append([kind, way, *_first(bench, decoder_of(bench, kind, way == FUSED), way)])
            except NotOffered as error:
                section.rows.append([kind, way, f"not offered: {error}", ""])
    section.notes.append("Weights are loaded and all is compiled: the second rollout of two, median of the rounds.")
    return section


def _first(bench: Bench, decoder: Any, way: str) -> list[str]:
    made: list[torch.Tensor] = []

    def latents() -> None:
        rollout = bench.rollout(bench.spec(**configurations()["adaptive, window 3"]), way)
        made[:] = [next(rollout.chunks(6)).latents]

    def pictures() -> None:
        latents()
        decoder.stream.reset()
        decoder.step(made[0], "bytes")

    rounds = bench.size.rounds
    return [ms(median_of(latents, rounds)), ms(median_of(pictures, rounds))]
