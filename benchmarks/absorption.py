"""What absorption costs and saves: time a chunk and bytes, for full history, no absorb, and absorb at several settings.

    python3 run.py bench absorption
    python benchmarks/absorption.py --model 1.3b --layers 4 --width 832 --height 480 --window 45 [--fp8]

All rollouts take turns in one process, chunk by chunk, so that a ratio compares chunks of the same moment. What it does to
the pictures is in training/absorption_quality.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import add_geometry, load_pack, random_model, write_table
from rollout import CHUNK, ENDLESS, STEPS, timed

# name -> settings, on top of the defaults of a row
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full history": None,
    "no absorb, ratio 0.5": {"absorb": False},
    "absorb, ratio 0.25": {"ratio": 0.25},
    "absorb, ratio 0.5": {},
    "absorb, ratio 0.75": {"ratio": 0.75},
    "absorb, ratio 0.5, no sink": {"sink_frames": 0},
    "absorb, ratio 0.5, per layer": {"scope": "layer"},
    "absorb, ratio 0.5, warm-up 9": {"warmup_frames": 9},
    "absorb, ratio 0.5, warm-up 12": {"warmup_frames": 12},
    "absorb, ratio 0.5, warm-up 15": {"warmup_frames": 15},
    "absorb, ratio 0.5, warm-up 36": {"warmup_frames": 36},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_geometry(parser)
    parser.add_argument("--window", type=int, default=123, help="latent frames of history (with the chunk: 126)")
    parser.add_argument("--rounds", type=int, default=8, help="chunks timed once every window is full")
    parser.add_argument("--fp8", action="store_true", help="linear weights in 8 bits, as the host loads them")
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
    from adastate_pack.adastate_core.anchors import Anchor
    from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
    from adastate_pack.adastate_core.schedules.schedule import Schedule
    from adastate_pack.nodes.host.model import HostModel

    model = random_model(arguments.model, arguments.layers, fp8=arguments.fp8)
    context = torch.randn(1, 512 if arguments.model != "demo" else 4, 4096)
    host = HostModel(model, context, 1)
    size = arguments.height // 8, arguments.width // 8
    spec = RolloutSpec(host.geometry, 1, *size, CHUNK, arguments.window, Anchor(), "packed", host.dtype)
    host.load(spec.plan(context.shape[1]))

    def start(wish: dict[str, Any] | None) -> Rollout:
        settings = None if wish is None else AbsorptionSettings(**wish)
        return Rollout(host, replace(spec, absorption=settings), Settings(0, Schedule.shifted(STEPS, 5.0)))

    rollouts = {name: start(wish) for name, wish in VARIANTS.items()}
    streams = {name: one.chunks(ENDLESS) for name, one in rollouts.items()}
    filled = -(-arguments.window // CHUNK)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(filled + arguments.rounds):
        for name, stream in streams.items():
            times[name].append(timed(lambda s=stream: next(s)))
    table = [row(name, one, times, filled) for name, one in rollouts.items()]
    kind = f"{arguments.model}{'-fp8' if arguments.fp8 else ''}"
    write_table(
        f"absorption-{kind}",
        f"Absorption on the {kind} geometry, {arguments.width}x{arguments.height}, {host.geometry.layers} layers, "
        f"{arguments.window + CHUNK} latent frames of keys",
        ["what", "layers switched", "chunk once full, of full history", "collecting chunk, of full history",
         "solve and switch, of a chunk", "KV cache without absorption MiB", "at its peak", "after the switch",
         "statistics MiB", "corrections MiB"],
        table,
        [
            f"Ratios are medians over chunks made side by side ({arguments.rounds} once every window is full); random weights; "
            "a chunk is 3 latent frames, 4 steps and a clean pass.",
            "Local window 6, sink 1, warm-up 24, scope head where nothing else is said. A collecting chunk computes full "
            "attention in two parts and takes the statistics.",
            "A warm-up of 9 latent frames is too short to have any history beyond sink and local window by one chunk or less.",
        ],
    )  # fmt: skip


def row(name: str, rollout: Any, times: dict[str, list[float]], filled: int) -> list[str]:
    """One line of the table."""
    full = times["full history"]
    late = statistics.median(a / b for a, b in zip(times[name][filled:], full[filled:], strict=True))
    cells = [name, "", f"{late:.3f}", "", "", f"{rollout.cache.nbytes / 2**20:.1f}", "", "", "", ""]
    absorber = rollout.absorber
    if absorber is None:
        return cells
    report, settings = absorber.report(), rollout.spec.absorption
    cells[1] = f"{len(report['layers'])} of {rollout.spec.geometry.layers}"
    kept = settings.sink_frames + settings.local_window_frames
    first, last = -(-(kept + 1) // CHUNK), -(-settings.warmup_frames // CHUNK)
    collecting = [times[name][i] / full[i] for i in range(first, min(last - 1, len(full)))]  # the last one also solves
    cells[3] = f"{statistics.median(collecting):.3f}" if collecting else ""
    cells[4] = report["phase"]
    if report["layers"]:
        cells[4] = f"{absorber.seconds / statistics.median(full[max(0, last - 1) : last + 2]):.2f}"
    mib = 2**20
    for i, name in enumerate(("before", "peak", "after"), 5):
        cells[i] = f"{report[f'kv_bytes_{name}'] / mib:.1f}"
    cells[8] = f"{rollout.cache.plan.first_phase.absorption_bytes / mib:.1f}"
    cells[9] = f"{report['correction_bytes'] / mib:.2f}"
    return cells


if __name__ == "__main__":
    main()
