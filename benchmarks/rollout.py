"""Time a chunk: early against late, against bare passes, and against caches that span a whole clip.

    python3 run.py bench rollout
    python benchmarks/rollout.py --model 1.3b --layers 4 --width 832 --height 480

All variants take turns in one process. A bare pass is the same module on the same number of frames, with keys and
values of the same length that lie ready and rotated, through the same attention: no cache writes, no rotation of
keys, no noise, no checks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import add_geometry, load_pack, random_model, synchronise, write_table

STEPS, CHUNK, ROUNDS, ENDLESS = 4, 3, 20, 1 << 20


class Bare:
    """What a pass costs by itself: given keys and values, the host's attention, the module's own projections."""

    def __init__(self, host, frames_of_keys: int, tokens: int, batch: int = 1) -> None:
        geometry = host.geometry
        shape = (batch, frames_of_keys * tokens, geometry.heads * geometry.head_dim)
        self.host, self.kernel = host, host.kernel
        self.keys = [torch.randn(shape, dtype=host.dtype, device=host.device) for _ in range(geometry.layers)]
        self.values = [torch.randn(shape, dtype=host.dtype, device=host.device) for _ in range(geometry.layers)]
        self._text: dict[int, tuple] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.kernel(q, self.keys[layer], self.values[layer], self.host.geometry.heads)

    def text(self, layer: int, key: object, make: Callable) -> tuple:
        if layer not in self._text:
            self._text[layer] = make()
        return self._text[layer]


def timed(work: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_geometry(parser)
    parser.add_argument("--windows", type=int, nargs="*", default=[18, 48, 123])
    parser.add_argument("--late", type=int, default=300, help="the late chunk")
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive
    from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
    from adastate_pack.adastate_core.schedules.schedule import Schedule
    from adastate_pack.nodes.host.model import HostModel

    model = random_model(arguments.model, arguments.layers)
    context = torch.randn(1, 512 if arguments.model != "demo" else 4, 4096)
    host = HostModel(model, context, 1)
    rows, columns = arguments.height // 8, arguments.width // 8

    def start(window: int, anchor, positions: str = "packed"):
        spec = RolloutSpec(host.geometry, 1, rows, columns, CHUNK, window, anchor, positions, host.dtype)
        return Rollout(host, spec, Settings(0, Schedule.shifted(STEPS, 5.0)), text_tokens=context.shape[1])

    adaptive = AnchorAdaptive(1)
    early, late = start(3, adaptive), start(3, adaptive)
    host.load(early.spec.plan(context.shape[1]))
    tokens = early.spec.tokens
    streams = {"early": early.chunks(ENDLESS), "late": late.chunks(ENDLESS)}
    for _ in range(15 - ROUNDS // 2):
        next(streams["early"])
    for _ in range(arguments.late - ROUNDS // 2):
        next(streams["late"])
    bare = Bare(host, 8, tokens)
    x = torch.randn(1, 16, 4, rows, columns, device=host.device)

    def bare_chunk() -> None:
        for sigma in (1000.0, 937.5, 833.3, 625.0, 0.0):
            host.velocity(x, sigma, bare)

    bare_chunk()
    work = {
        "early": lambda: next(streams["early"]),
        "late": lambda: next(streams["late"]),
        "bare": bare_chunk,
    }
    times = interleaved(work)
    table = [
        row("adaptive, window 3, chunk 15", times["early"], times["bare"], early),
        row(f"adaptive, window 3, chunk {arguments.late}", times["late"], times["bare"], late),
        ["5 bare passes of 4 frames on 8", f"{1000 * times['bare']:.1f}", "1.00", ""],
    ]
    for window in arguments.windows:
        rollout = start(window, Anchor(), "absolute")
        stream = rollout.chunks(ENDLESS)
        for _ in range(-(-window // CHUNK)):
            next(stream)
        full = interleaved({"full": lambda s=stream: next(s), "ours": lambda: next(streams["late"])}, rounds=5)
        label = f"full-length cache, {window + CHUNK} frames ({(window + CHUNK) / 4:.0f} s of video)"
        table.append(row(label, full["full"], full["ours"], rollout, relative="the window-3 rollout"))
        del rollout, stream
    write_table(
        f"rollout-{arguments.model}",
        f"Rollout of the {arguments.model} geometry, {arguments.width}x{arguments.height}, {host.geometry.layers} layers",
        ["what", "ms a chunk (median)", "ratio", "KV cache"],
        table,
        [
            f"Chunk {arguments.late} takes {times['late'] / times['early']:.3f} of the time of chunk 15.",
            f"Medians of {ROUNDS} chunks that took turns; the first rows' ratio is to bare passes, the full caches' to the "
            "window-3 rollout measured beside them (5 rounds).",
            "Random weights; a chunk is 3 latent frames (12 video frames), 4 steps and a clean pass.",
        ],
    )


def interleaved(work: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def row(name: str, seconds: float, reference: float, rollout, relative: str = "") -> list[str]:
    size = rollout.cache.nbytes / 2**20
    return [
        name,
        f"{1000 * seconds:.1f}",
        f"{seconds / reference:.2f}{' x ' + relative if relative else ''}",
        f"{size:.1f} MiB",
    ]


if __name__ == "__main__":
    main()
