"""Absorption: latency by part of the attention, memory over time as a plot, and a 14B with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from host import RESULTS, random_model

from on_gpu.bench import ENDLESS, Bench, NotOffered, Section, median_of, ms
from on_gpu.passes import kernels, one_pass

VARIANTS = {"full history": None, "half dropped": {"absorb": False}, "half absorbed": {}}


def spec_of(bench: Bench, wish: dict[str, Any] | None, host: Any = None) -> Any:
    from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
    from adastate_pack.adastate_core.anchors import Anchor

    window = bench.size.absorbed_window
    warm_up = min(24, window - 3)
    settings = None if wish is None else AbsorptionSettings(warmup_frames=warm_up, local_window_frames=3, **wish)
    more = {} if host is None else {"host": host}
    return bench.spec(Anchor(), window, absorption=settings, **more)


def absorption(bench: Bench) -> Section:
    """A chunk and a pass with a full window, in bf16 and with weights in 8 bits; what of a pass is attention's."""
    section = Section(
        f"Absorption, window {bench.size.absorbed_window}",
        [
            "weights",
            "what",
            "ms a chunk",
            "times faster",
            "ms a pass",
            "attention's kernels, ms",
            "times faster",
            "cache MiB",
        ],
    )
    for weights in ("the model's", "8 bits"):
        host = bench.host
        if weights == "8 bits":
            host = bench.host_of(random_model(bench.size.model, bench.size.layers, fp8=True, device=bench.device))
        first: tuple[float, float] | None = None
        for name, wish in VARIANTS.items():
            try:
                chunk, took, operator, size = _measured(bench, wish, host, name if host is bench.host else "")
            except NotOffered as error:
                section.rows.append([weights, name, f"not offered: {error}", *[""] * 5])
                continue
            first = first or (chunk, operator)
            faster = [f"{before / now:.2f}" for before, now in zip(first, (chunk, operator), strict=True)]
            cells = [ms(chunk), faster[0], ms(took), ms(operator), faster[1], f"{size / 2**20:.1f}"]
            section.rows.append([weights, name, *cells])
    section.notes.append(
        "The paper's figure 7b (arXiv 2607.00712) says 1.89 times in the operator and 1.86 in all, with weights and activations in "
        "8 bits. Here half of the layers are switched, weights are in 8 bits as the host loads them, and activations are if the "
        "host was started with --fast fp8_matrix_mult."
    )
    return section


def _measured(bench: Bench, wish: dict[str, Any] | None, host: Any, noted: str) -> tuple[float, float, float, int]:
    """Seconds of a chunk with a full window, of a pass, of its attention; bytes of the cache."""
    rollout = bench.rollout(spec_of(bench, wish, host), host=host)
    stream = rollout.chunks(ENDLESS)
    _fill(bench, rollout, stream, noted)
    chunk = median_of(lambda: next(stream), bench.size.rounds)
    work = one_pass(rollout)
    took = median_of(work, bench.size.rounds)
    words = ("attention", "flash", "fmha", "sdpa", "softmax", "cudnn")
    operator = sum(spent for name, _, spent in kernels(work)[0] if any(word in name.lower() for word in words))
    return chunk, took, operator or took, rollout.cache.nbytes


def _fill(bench: Bench, rollout: Any, stream: Any, noted: str) -> None:
    """Roll out until the window is full, and note the memory of each chunk, if there is a name to note it under."""
    line: list[tuple[int, float]] = []
    for _ in range(-(-bench.size.absorbed_window // 3) + 2):
        chunk = next(stream)
        used = torch.cuda.memory_allocated() if bench.device == "cuda" else rollout.cache.nbytes
        line.append((chunk.first_frame, used / 2**20))
    if noted:
        cache, peak = rollout.cache, bench.host.peak_bytes()
        sizes = [f"{size / 2**20:.1f}" for size in (cache.plan.kv_bytes, cache.peak_nbytes, cache.nbytes)]
        cells = [noted, *sizes, "" if peak is None else f"{peak / 2**20:.0f}"]
        bench.__dict__.setdefault("memory", {})[noted] = line, cells


def memory(bench: Bench) -> Section:
    """Real memory chunk by chunk, as a plot (the paper's figure 2) and in a few numbers; of the rollouts of `absorption`."""
    section = Section(
        "Memory over time", ["what", "cache planned MiB", "at its peak", "at the end", "allocated at its peak MiB"]
    )
    for name, wish in VARIANTS.items():
        if name not in bench.__dict__.get("memory", {}):
            rollout = bench.rollout(spec_of(bench, wish))
            _fill(bench, rollout, rollout.chunks(ENDLESS), name)
    section.rows = [cells for _, cells in bench.memory.values()]
    section.more.append(plotted(bench, {name: line for name, (line, _) in bench.memory.items()}))
    return section


def plotted(bench: Bench, lines: dict[str, list[tuple[int, float]]]) -> str:
    """The plot's line of Markdown, with the picture beside the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in lines.items():
        axes.step(*zip(*points, strict=True), where="post", label=name)
    axes.set_xlabel("latent frame")
    axes.set_ylabel("allocated on the device, MiB" if bench.device == "cuda" else "caches, MiB")
    axes.legend()
    path = Path(getattr(bench, "folder", RESULTS), "gpu-memory.png")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return f"![Memory over time]({path.name})"


def large(bench: Bench) -> Section:
    """A 14B in bf16, with half of its layers absorbed and without, if it fits."""
    section = Section("14B in bf16", ["what", "ms a chunk", "cache MiB", "allocated at its peak MiB"])
    if bench.device != "cuda":
        raise NotOffered("it needs a GPU")
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        raise NotOffered(f"it takes 40 GiB, and {free / 2**30:.0f} are free")
    for held in ("host", "patcher"):  # the smaller model
        bench.__dict__.pop(held, None)
    host = bench.host_of(random_model("14b", None, device=bench.device))
    for name in ("full history", "half absorbed"):
        rollout = bench.rollout(spec_of(bench, VARIANTS[name], host), host=host)
        stream = rollout.chunks(ENDLESS)
        for _ in range(10):
            next(stream)
        took = median_of(lambda stream=stream: next(stream), bench.size.rounds)
        section.rows.append([name, ms(took), f"{rollout.cache.nbytes / 2**20:.0f}", f"{host.peak_bytes() / 2**20:.0f}"])
        del rollout, stream
    return section
