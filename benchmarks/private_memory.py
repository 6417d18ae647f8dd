"""What a rollout takes of this machine: private memory of a process, chunk by chunk, with and without absorption.

    python3 run.py bench private_memory
    python benchmarks/private_memory.py --window 120 --chunks 46 --size 256

Each variant runs in a process of its own. Private memory is what /proc says that no other process shares; it is counted from
what the process took with the model loaded and nothing allocated for the rollout. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import PACK, load_pack, write_table

MIB = 2**20
WEIGHTS = PACK / "models" / "diffusion_models" / "adastate_demo.safetensors"
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full history": None,
    "half absorbed": {"ratio": 0.5, "local_window_frames": 3, "warmup_frames": 24},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=120, help="latent frames of history")
    parser.add_argument("--chunks", type=int, default=46)
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--child", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        load_pack()
        with torch.inference_mode():
            print(json.dumps(figures(arguments, VARIANTS[arguments.child])))
        return
    found = {name: in_a_process(name, arguments) for name in VARIANTS}
    rows = [row(name, one, found["full history"]) for name, one in found.items()]
    write_table(
        "private-memory",
        f"Private memory of a rollout with the demo's weights, {arguments.size}x{arguments.size}, window {arguments.window}, "
        f"{arguments.chunks} chunks",
        ["what", "caches planned MiB", "caches taken, peak MiB", "of full", "after chunk 8", "last chunk",
         "private memory, peak MiB", "of full"],
        rows,
        [
            "Half absorbed: ratio .5, local window 3, warm-up 24 latent frames. Caches are keys and values in every copy; the "
            "columns after chunk 8 and at the last chunk are what is allocated then, in MiB.",
            "Private memory is sampled every 5 ms and counted from what the process held with its model loaded. A page counts once "
            "it is written to, so a cache that is allocated but not yet filled does not show in it.",
        ],
    )  # fmt: skip


def in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one variant, made by a process that does nothing else."""
    command = [sys.executable, __file__, "--child", name]
    for option in ("window", "chunks", "size"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, one: dict[str, Any], full: dict[str, Any]) -> list[str]:
    caches = one["caches"]
    return [
        name,
        f"{one['planned'] / MIB:.1f}",
        f"{one['taken'] / MIB:.1f}",
        f"{one['taken'] / full['taken']:.3f}",
        f"{caches[min(8, len(caches)) - 1] / MIB:.1f}",
        f"{caches[-1] / MIB:.1f}",
        f"{one['private'] / MIB:.1f}",
        f"{one['private'] / full['private']:.3f}",
    ]


def private_bytes() -> int:
    """What of this process's memory no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


class Watch:
    """The largest private memory while it is entered."""

    def __enter__(self) -> Watch:
        self.before = self.peak = private_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="private-memory")
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, private_bytes())


def figures(arguments: argparse.Namespace, wish: dict[str, Any] | None) -> dict[str, Any]:
    """Bytes that one rollout planned and took."""
    import comfy.sd
    from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
    from adastate_pack.adastate_core.anchors import Anchor
    from adastate_pack.adastate_core.prompts.demo_words import prompt
    from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
    from adastate_pack.adastate_core.schedules.schedule import Schedule
    from adastate_pack.nodes.host.model import HostModel

    words = {"terrain": "meadow", "pace": "steady", "balloon": "crimson", "lantern": "no lantern"}
    host = HostModel(comfy.sd.load_diffusion_model(str(WEIGHTS)), prompt(words), 1)
    side = arguments.size // 8
    absorption = None if wish is None else AbsorptionSettings(**wish)
    spec = RolloutSpec(
        host.geometry, 1, side, side, 3, arguments.window, Anchor(), "packed", host.dtype, absorption=absorption
    )
    plan = spec.plan()
    host.load(plan)
    with Watch() as watch:
        rollout = Rollout(host, spec, Settings(0, Schedule.shifted(4, 5.0)))
        caches = [rollout.cache.nbytes for _ in rollout.chunks(3 * arguments.chunks)]
    report = rollout.absorber.report() if rollout.absorber is not None else {}
    taken = report.get("kv_bytes_peak") or max(caches)
    return {"planned": plan.kv_bytes, "taken": taken, "caches": caches, "private": watch.peak - watch.before}


if __name__ == "__main__":
    main()
