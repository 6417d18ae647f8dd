"""What the faster ways change: speed and drift over many chunks, each against the plain way in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from host import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from on_gpu.bench import ENDLESS, FUSED, PLAIN, Bench, NotOffered, Section, configurations, ms, seconds_of

# the option, the way of the blocks, the attention, linear weights in 8 bits
OPTIONS = {
    "plain": (PLAIN, "", False),
    "fused": (FUSED, "", False),
    "SageAttention, by the host": (PLAIN, "attention_sage", False),
    "FlashAttention (FA2, FA3), by the host": (PLAIN, "attention_flash", False),
    "cuDNN's attention": (PLAIN, "cuDNN", False),
    "fp8 weights, by the host": (PLAIN, "", True),
    "fused, fp8 weights and SageAttention": (FUSED, "attention_sage", True),
}
NEEDS = {"attention_sage": "SAGE_ATTENTION_IS_AVAILABLE", "attention_flash": "FLASH_ATTENTION_IS_AVAILABLE"}


@contextmanager
def attention(name: str) -> Iterator[None]:
    """The host's Wan with another attention of the host's or torch's. NotOffered."""
    import comfy.ldm.modules.attention as known
    import comfy.ldm.wan.model as wan

    if name == "cuDNN":
        if not torch.cuda.is_available():
            raise NotOffered("it is a GPU's")
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            yield
        return
    if not name:
        yield
        return
    if not getattr(known, NEEDS[name], False):
        raise NotOffered("the host has not found its package")
    before, wan.optimized_attention = wan.optimized_attention, getattr(known, name)
    try:
        yield
    finally:
        wan.optimized_attention = before


def drift(bench: Bench) -> Section:
    """Milliseconds a chunk, and the largest difference to the plain way as a share of its largest latent, early and at the end."""
    size = bench.size
    chunks = size.drift_chunks
    marks = sorted({1, min(10, chunks), min(100, chunks), chunks})
    section = Section(
        f"Speed and drift over {chunks} chunks, {size.drift_width}x{size.drift_height}",
        ["what", "ms a chunk", *(f"drift at chunk {mark}" for mark in marks)],
    )
    plain = None
    for name, (way, kernel, fp8) in OPTIONS.items():
        try:
            took, latents = _rolled(bench, way, kernel, fp8, chunks)
        except NotOffered as error:
            section.rows.append([name, f"not offered: {error}", *("" for _ in marks)])
            continue
        plain = latents if plain is None else plain
        section.rows.append([name, ms(took), *(_difference(latents[m - 1], plain[m - 1]) for m in marks)])
    section.notes.append(
        "Random weights feed every rounding on, so a drift says how soon two ways part, and nothing of how a trained model's "
        "pictures look. RMS of the difference over RMS of the plain way's chunk; the same seed and prompt."
    )
    return section


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{float((a - b).square().mean().sqrt() / b.square().mean().sqrt()):.2e}"


def _rolled(bench: Bench, way: str, kernel: str, fp8: bool, chunks: int) -> tuple[float, list[torch.Tensor]]:
    size, host = bench.size, bench.host
    with attention(kernel) if kernel else nullcontext():
        if fp8:
            host = bench.host_of(random_model(size.model, size.layers, fp8=True, device=bench.device))
        spec = bench.spec(
            **configurations()["adaptive, window 3"], width=size.drift_width, height=size.drift_height, host=host
        )
        stream = bench.rollout(spec, way, host).chunks(ENDLESS)
        made: list[torch.Tensor] = []
        first = _all(stream, made, min(3, chunks - 1))
        took = seconds_of(lambda: _all(stream, made, chunks - first))
    return took / (chunks - first), made


def _all(stream: Any, made: list[torch.Tensor], count: int) -> int:
    made += [next(stream).latents for _ in range(count)]
    return count


Rolled = Callable[[Bench], Section]
