"""What holding the past in 8 bits, or in host memory, saves and costs: bytes, time, and error against full precision.

    python3 run.py bench kv_storage
    python benchmarks/kv_storage.py --windows 3 18 --chunks 24

On the demo weights. All rollouts of a window take turns in one process, chunk by chunk, from the same noise; a ratio of
times compares chunks of the same moment.
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
from host import PACK, load_pack, write_table
from rollout import timed

WEIGHTS = PACK / "models" / "diffusion_models" / "adastate_demo.safetensors"
ON_THE_DEVICE = [("model", "gpu"), ("fp8", "gpu"), ("int8", "gpu")]
IN_HOST_MEMORY = [("model", "host memory"), ("fp8", "host memory")]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="*", default=[3, 18])
    parser.add_argument("--chunks", type=int, default=24, help="chunks of each rollout; time is that of the later half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    import comfy.sd
    from adastate_pack.adastate_core.prompts.demo_words import prompt
    from adastate_pack.adastate_core.rollout import RolloutSpec
    from adastate_pack.nodes.defaults import FALLBACK, checkpoint_anchor
    from adastate_pack.nodes.host.checkpoint_wishes import rollout_defaults
    from adastate_pack.nodes.host.model import HostModel

    model = comfy.sd.load_diffusion_model(str(WEIGHTS))
    words = {"terrain": "meadow", "pace": "steady", "balloon": "crimson", "lantern": "no lantern"}
    host = HostModel(model, prompt(words), 1)
    found = rollout_defaults(model) or {}
    wanted = FALLBACK | {name: found[name] for name in FALLBACK if name in found}
    side = arguments.size // 8
    spec = RolloutSpec(
        host.geometry, 1, side, side, wanted["chunk_frames"], max(arguments.windows), checkpoint_anchor(found),
        wanted["positions"], host.dtype,
    )  # fmt: skip
    host.load(spec.plan())
    variants = ON_THE_DEVICE + (IN_HOST_MEMORY if host.device.type == "cuda" else [])
    table = []
    for window in arguments.windows:
        table += rows_of(host, replace(spec, window_frames=window), wanted, variants, arguments)
    last = arguments.chunks
    write_table(
        "kv-storage",
        f"The past in less device memory: demo weights, {arguments.size}x{arguments.size}, {host.dtype}".replace("torch.", ""),
        ["window", "held as", "KV on the device MiB", "of model", "anchor and window, of model", "chunk, of model",
         "attention error", "latents, chunk 2", "chunk 4", f"chunk {last}"],
        table,
        [
            f"Time: median over chunks {last // 2 + 1} to {last} of the ratio to the chunk made beside it with the model's dtype.",
            f"Attention error: relative error of a layer's output at the first pass after chunk {last}, on the same queries and a "
            "past that differs only in how it is held; mean over layers (largest).",
            "Latents: relative error (norm of the difference) of a chunk against the same chunk and noise with the model's dtype; "
            "it grows because a rollout feeds on what it made. Chunk 1 has no past.",
            "Anchor and window: keys, values, scales and rotated copies; the frames being made are held in full.",
        ],
    )  # fmt: skip


def rows_of(
    host: Any, spec: Any, wanted: dict[str, Any], variants: list, arguments: argparse.Namespace
) -> list[list[str]]:
    """The table's rows of one window."""
    from adastate_pack.adastate_core.rollout import Rollout, Settings
    from adastate_pack.adastate_core.schedules.schedule import Schedule

    settings = Settings(arguments.seed, Schedule.shifted(wanted["steps"], wanted["shift"]))
    specs = {held: replace(spec, cache_dtype=held[0], cache_device=held[1]) for held in variants}
    rollouts = {held: Rollout(host, one, settings) for held, one in specs.items()}
    streams = {held: one.chunks(arguments.chunks * spec.chunk_frames) for held, one in rollouts.items()}
    times: dict[tuple, list[float]] = {held: [] for held in variants}
    latents: dict[tuple, list[torch.Tensor]] = {held: [] for held in variants}
    for _ in range(arguments.chunks):
        for held, stream in streams.items():
            times[held].append(timed(lambda s=stream, to=latents[held]: to.append(next(s).latents)))
    exact = variants[0]
    state = rollouts[exact].snapshot()
    table = []
    for held in variants:
        late = zip(times[held][arguments.chunks // 2 :], times[exact][arguments.chunks // 2 :], strict=True)
        cells = [
            str(spec.window_frames),
            held[0] if held[1] == "gpu" else f"{held[0]}, {held[1]}",
            f"{rollouts[held].cache.nbytes / MIB:.2f}",
            f"{rollouts[held].cache.nbytes / rollouts[exact].cache.nbytes:.3f}",
            f"{past_bytes(rollouts[held]) / past_bytes(rollouts[exact]):.3f}",
            f"{statistics.median(a / b for a, b in late):.3f}",
            "0",
        ]
        if held[0] != "model":
            errors = attention_errors(host, spec, specs[held], settings, state)
            cells[-1] = f"{statistics.mean(errors):.2e} ({max(errors):.2e})"
        pairs = list(zip(latents[held], latents[exact], strict=True))
        table.append(cells + [f"{error(*pairs[min(i, len(pairs)) - 1]):.2e}" for i in (2, 4, len(pairs))])
    return table


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def past_bytes(rollout: Any) -> int:
    """Device bytes of anchor and window, in every copy."""
    sizes = rollout.cache.bytes()
    return sum(sizes.get(name, 0) for name in ("k", "v", "scales", "rotated_copy", "ema"))


class Both:
    """A session that attends through two caches, goes on with the first one's output, and keeps the second one's error."""

    def __init__(self, exact: Any, held: Any) -> None:
        self.exact, self.held, self.kernel, self.text = exact, held, exact.kernel, exact.text
        self.errors: list[float] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = self.exact.attend(layer, q, k, v)
        self.errors.append(error(self.held.attend(layer, q, k, v), out))
        return out


def attention_errors(host: Any, exact: Any, spec: Any, settings: Any, state: Any) -> list[float]:
    """Layer by layer, what one pass after `state` loses if its past is held as `spec` says."""
    from adastate_pack.adastate_core.rollout import Rollout
    from adastate_pack.adastate_core.schedules.schedule import TIMESTEPS

    packed = replace(state, spec=spec.describe(), cache=tuple(rounded(one, spec) for one in state.cache))
    first, second = Rollout(host, exact, settings, state), Rollout(host, spec, settings, packed)
    layout = first.past.layout()
    for rollout in (first, second):
        rollout.attention.place(layout)
        rollout.attention.begin(layout, spec.chunk_frames, kept=False)
    both = Both(first.attention, second.attention)
    host.velocity(
        first._drawn(first.generated, len(settings.schedule.sigmas))[0].to(host.device),
        TIMESTEPS * settings.schedule.sigmas[0],
        both,
    )
    return both.errors


def rounded(layer: Any, spec: Any) -> Any:
    """A layer's snapshot in the model's dtype as one in 8 bits of the same frames."""
    from adastate_pack.adastate_core.cache.eight_bits import quantised
    from adastate_pack.adastate_core.cache.slots import without_copies

    layer = without_copies(layer, spec.anchor.blends)
    if any(position is not None for position in layer.positions):
        raise ValueError("a snapshot whose keys are rotated cannot be stored")
    heads, tensors, scales = spec.geometry.heads, dict(layer.tensors), []
    for name in ("keys", "values"):
        frames = [quantised(x, heads, spec.cache_dtype) for x in tensors[name].unbind(1)]
        tensors[name] = torch.stack([codes for codes, _ in frames], 1)
        scales.append(torch.stack([scale for _, scale in frames], 1))
    return replace(layer, tensors=tensors | {"scales": torch.stack(scales, 2)})


if __name__ == "__main__":
    main()
