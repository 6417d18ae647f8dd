"""Time a chunk against that of another checkout of this pack, both in one process, in turns.

    git worktree add --detach /elsewhere 91e434f
    COMFYUI_PATH=... python benchmarks/versus.py --other /elsewhere

Both run the same random model of the host, the same spec and seed; their latents are compared too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import add_geometry, load_pack, random_model, synchronise, write_table

STEPS, CHUNK, ENDLESS, DRAWS = 4, 3, 1 << 20, 2000
CASES = {
    "adaptive, window 3": ("AnchorAdaptive", (1,), 3, {}),
    "EMA sink of 3, window 9": ("AnchorEMA", (3, 0.999), 9, {}),
    "static sink of 3, window 9, int8": ("AnchorStatic", (3,), 9, {"cache_dtype": "int8"}),
}


def load_other(folder: Path) -> None:
    """The other checkout as `other_pack`; the host is on the path already."""
    spec = importlib.util.spec_from_file_location(
        "other_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_pack"] = module
    spec.loader.exec_module(module)


def module(pack: str, *names: str) -> Any:
    """A module of a pack by the first of its names that there is: other versions have other folders."""
    for name in names:
        if importlib.util.find_spec(f"{pack}.{name.rpartition('.')[0]}") and importlib.util.find_spec(f"{pack}.{name}"):
            return importlib.import_module(f"{pack}.{name}")
    raise SystemExit(f"{pack} has no {' or '.join(names)}")


def start(pack: str, model: Any, context: torch.Tensor, size: tuple[int, int], case: tuple) -> Any:
    """An endless rollout of this pack: an iterator of chunks."""
    anchors, rollout, schedule, host_model = (
        module(pack, *names)
        for names in (
            ("adastate_core.anchors",),
            ("adastate_core.rollout",),
            ("adastate_core.schedules.schedule", "adastate_core.schedule"),
            ("nodes.host.model",),
        )
    )
    kind, numbers, window, more = case
    host = host_model.HostModel(model, context, 1)
    anchor = getattr(anchors, kind)(*numbers)
    spec = rollout.RolloutSpec(host.geometry, 1, *size, CHUNK, window, anchor, "packed", host.dtype, **more)
    host.load(spec.plan(context.shape[1]))
    settings = rollout.Settings(0, schedule.Schedule.shifted(STEPS, 5.0))
    return rollout.Rollout(host, spec, settings, text_tokens=context.shape[1]).chunks(ENDLESS)


def timed(stream: Any, places: Any) -> tuple[float, torch.Tensor]:
    with places():
        synchronise()
        begun = time.perf_counter()
        chunk = next(stream)
        synchronise()
    return time.perf_counter() - begun, chunk.latents


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, 95 %, by resampling the pairs."""
    luck = random.Random(0)
    medians = sorted(statistics.median(luck.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return medians[DRAWS // 40], medians[-DRAWS // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_geometry(parser)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    load_pack()
    load_other(arguments.other.resolve())
    with torch.inference_mode():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    model = random_model(arguments.model, arguments.layers)
    context = torch.randn(1, 512 if arguments.model != "demo" else 4, 4096)
    size, table = (arguments.height // 8, arguments.width // 8), []
    for name, case in CASES.items():
        streams, places = {}, {}
        for pack in ("adastate_pack", "other_pack"):
            adapter = importlib.import_module(f"{pack}.nodes.host.model")
            # each one's attention for its own turns, on the one loaded model
            places[pack] = lambda adapter=adapter: adapter.attention_in_place(model)
            streams[pack] = start(pack, model, context, size, case)
        ratios, times, off = [], {pack: [] for pack in streams}, 0.0
        for turn in range(arguments.rounds + 8):
            order = list(streams) if turn % 2 else list(streams)[::-1]
            made = {pack: timed(streams[pack], places[pack]) for pack in order}
            off = max(off, float((made["adastate_pack"][1] - made["other_pack"][1]).abs().max()))
            if turn >= 8:
                for pack in streams:
                    times[pack].append(made[pack][0])
                ratios.append(made["adastate_pack"][0] / made["other_pack"][0])
        low, high = interval(ratios)
        ms = [f"{1000 * statistics.median(times[pack]):.1f}" for pack in ("adastate_pack", "other_pack")]
        table.append([name, *ms, f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}", f"{off:.1e}"])
    write_table(
        f"versus-{arguments.model}",
        f"A chunk against another version's, {arguments.model} geometry, {arguments.width}x{arguments.height}",
        ["what", "ms a chunk", "ms, the other", "ratio", "95 %", "latents differ by"],
        table,
        [
            f"Medians of {arguments.rounds} pairs of chunks that took turns in one process; random weights, {STEPS} steps."
        ],
    )


if __name__ == "__main__":
    main()
