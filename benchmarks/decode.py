"""Streaming decode against the host's VAEDecode: time side by side, peak memory in processes of their own.

python3 run.py bench decode
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import demo_vae, load_pack, synchronise, write_table

LENGTHS = (81, 801)


def stream(vae, samples: torch.Tensor, frames_per_call: int = 1, keep: bool = True) -> torch.Tensor | None:
    """Decode through the pack; `keep` collects the frames as the decode node does, else they are dropped as in a stream."""
    from adastate_pack.adastate_core.vae_stream import pictures_of
    from adastate_pack.nodes.host.codec import HostDecoder

    decoder = HostDecoder(vae, frames_per_call)
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
    return stream(vae, samples, keep=how == "streaming")


def latents(length: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16, (length - 1) // 4 + 1, size // 8, size // 8, generator=generator)


def peak(how: str, length: int, size: int) -> float:
    """MiB that one decode adds at its highest, in a fresh process (GPU memory where there is one)."""
    command = [sys.executable, __file__, "--size", str(size), "--peak", how, "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(how: str, length: int, size: int) -> None:
    vae = demo_vae()
    decode(vae, latents(9, size), how)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = (
        torch.cuda.memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    decode(vae, latents(length, size), how)
    after = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(json.dumps({"before": before, "after": after}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=10, help="turns at 81 frames, the first to warm up; a third at 801"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=81, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        if arguments.peak:
            measure_peak(arguments.peak, arguments.length, arguments.size)
        else:
            measure(arguments.size, arguments.rounds)


def measure(size: int, rounds: int) -> None:
    vae = demo_vae()
    table, ways = [], ("host", "streaming", "streaming, 8 a call")
    for length in LENGTHS:
        samples = latents(length, size)
        times: dict[str, list[float]] = {how: [] for how in ways}
        outputs: dict[str, torch.Tensor] = {}
        for turn in range(rounds if length == LENGTHS[0] else max(2, rounds // 3)):
            for how in ways:
                synchronise()
                start = time.perf_counter()
                outputs[how] = decode(vae, samples, how).flatten(0, -4)
                synchronise()
                if turn:
                    times[how].append(time.perf_counter() - start)
        host = statistics.median(times["host"])
        for how in ways:
            seconds = statistics.median(times[how])
            error = (outputs[how] - outputs["host"]).abs().max().item()
            table.append(
                [
                    f"{length}", how, f"{seconds:.2f}", f"{seconds / host:.3f}", f"{error:.1e}" if error else "0 (bit-equal)",
                    f"{peak(how, length, size)['after']:.0f}",
                ]
            )  # fmt: skip
        memory = peak("to a file", length, size)
        table.append([f"{length}", "streaming, frames not kept", "", "", "", f"{memory['after']:.0f}"])
    flat = [float(line[5]) for line in table if line[1] == "streaming, frames not kept"]
    write_table(
        "decode",
        f"Streaming decode of {size}x{size} frames with the demo's VAE",
        ["frames", "how", "s (median)", "ratio to the host", "largest error", "peak memory of the process, MiB"],
        table,
        [
            f"Frames not kept, as in a stream: the peak at {LENGTHS[1]} frames is {flat[1] / flat[0]:.3f} of that at {LENGTHS[0]}.",
            "The host's VAEDecode and the streaming node took turns in one process; peaks are of processes of their own.",
        ],
    )


if __name__ == "__main__":
    main()
