"""Streaming decode against the host's VAEDecode: time side by side, peak memory in processes of their own.

python3 run.py bench decode
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import demo_vae, load_pack, synchronise, write_table

LENGTHS, LONGEST = (81, 801), 2001
FAST = "fast, as streams to videos"
WAYS = ("host", "streaming", FAST, "streaming, 8 a call")
# one process differs from the next by up to a tenth, whatever the length
PROCESSES = 5
NOT_KEPT = "streaming, frames not kept"


def stream(
    vae, samples: torch.Tensor, frames_per_call: int = 1, keep: bool = True, fast: bool = False
) -> torch.Tensor | None:
    """Decode through the pack; `keep` collects the frames as the decode node does, else they are dropped as in a stream."""
    from adastate_pack.adastate_core.decode.wan_vae import pictures_of
    from adastate_pack.nodes.host.codec import HostDecoder

    decoder = HostDecoder(vae, frames_per_call, fast=fast)
    if fast and decoder.way != "fast":
        raise SystemExit(f"the VAE does not decode the fast way: {decoder.why_plain}")
    decoder.load(samples.shape)
    out, at = None, 0
    first, *rest = samples[:, :, :1], *samples[:, :, 1:].split(frames_per_call, dim=2)
    for part in (first, *rest):
        pictures = decoder.step(part)[0]
        if keep:
            if out is None:
                out = pictures.new_empty((pictures_of(samples.shape[2]), *pictures.shape[1:]))
            out[at : at + len(pictures)] = pictures
            at += len(pictures)
    return out


def decode(vae, samples: torch.Tensor, how: str) -> torch.Tensor | None:
    if how == "host":
        return vae.decode(samples)
    if how == "streaming, 8 a call":
        return stream(vae, samples, 8)
    return stream(vae, samples, keep=how != NOT_KEPT, fast=how in (FAST, NOT_KEPT))


def latents(length: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16, (length - 1) // 4 + 1, size // 8, size // 8, generator=generator)


def peak(how: str, length: int, size: int) -> float:
    """Highest MiB of a fresh process that decodes once (GPU memory where there is one)."""
    command = [sys.executable, __file__, "--size", str(size), "--peak", how, "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(how: str, length: int, size: int) -> None:
    decode(demo_vae(), latents(length, size), how)
    if torch.cuda.is_available():
        highest = torch.cuda.max_memory_allocated() / 2**20
    else:
        # not getrusage: a child's ru_maxrss starts at what its parent had
        status = Path("/proc/self/status").read_text()
        highest = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
    print(json.dumps(highest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=12, help="turns at 81 frames; a quarter as many at 801, at least 3"
    )
    parser.add_argument("--only", choices=("time", "memory"), help="one of the two tables")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=81, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        if arguments.peak:
            measure_peak(arguments.peak, arguments.length, arguments.size)
        else:
            if arguments.only != "memory":
                time_table(arguments.size, arguments.rounds)
            if arguments.only != "time":
                memory_table(arguments.size)


def time_all(vae, samples: torch.Tensor, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every way, in turns whose order goes back and forth, and the largest difference to the host's."""
    times: dict[str, list[float]] = {how: [] for how in WAYS}
    errors: dict[str, float] = {}
    for turn in range(rounds):
        outputs = {}
        for how in WAYS if turn % 2 else WAYS[::-1]:
            synchronise()
            start = time.perf_counter()
            outputs[how] = decode(vae, samples, how).flatten(0, -4)
            synchronise()
            times[how].append(time.perf_counter() - start)
        errors = {how: (outputs[how] - outputs["host"]).abs().max().item() for how in WAYS}
    return times, errors


def time_table(size: int, rounds: int) -> None:
    """Write results/decode.md."""
    vae, table = demo_vae(), []
    time_all(vae, latents(LENGTHS[0], size), 1)
    for length in LENGTHS:
        times, errors = time_all(vae, latents(length, size), rounds if length == LENGTHS[0] else max(3, rounds // 4))
        for how in WAYS:
            ratio = statistics.median(a / b for a, b in zip(times[how], times["host"], strict=True))
            error = f"{errors[how]:.1e}" if errors[how] else "0 (bit-equal)"
            table.append([f"{length}", how, f"{statistics.median(times[how]):.2f}", f"{ratio:.3f}", error])
    write_table(
        "decode",
        f"Streaming decode of {size}x{size} frames with the demo's VAE: time",
        ["frames", "how", "s (median)", "ratio to the host", "largest error"],
        table,
        [
            "The host's VAEDecode and the others took turns in one process; the ratio is the median of the turns'.",
            "streaming: what Streaming VAE Decode does. fast: what Stream To Video and Render Video do, latent by latent.",
        ],
    )


def memory_table(size: int) -> None:
    """Write results/decode-memory.md."""
    table, streamed = [], {}
    for length in (*LENGTHS, LONGEST):
        for how in (*WAYS, NOT_KEPT):
            if length == LONGEST and how != NOT_KEPT:
                continue
            peaks = [peak(how, length, size) for _ in range(PROCESSES)]
            table.append([f"{length}", how, f"{statistics.median(peaks):.0f}", f"{min(peaks):.0f} to {max(peaks):.0f}"])
            if how == NOT_KEPT:
                streamed[length] = statistics.median(peaks)
    first, middle, last = streamed.values()
    write_table(
        "decode-memory",
        f"Streaming decode of {size}x{size} frames with the demo's VAE: memory",
        ["frames", "how", "peak MiB (median)", "range"],
        table,
        [
            f"Peaks of {PROCESSES} processes of their own each, with the host and torch in them.",
            f"Frames not kept, as in a stream: the peak at {LENGTHS[1]} frames is {middle / first:.3f} of that at "
            f"{LENGTHS[0]}, at {LONGEST} frames {last / middle:.3f} of that at {LENGTHS[1]}.",
        ],
    )


if __name__ == "__main__":
    main()
