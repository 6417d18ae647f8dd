"""The time of the attention operator alone with and without absorption, where many frames are read: 126 latent frames of keys.

    python3 run.py bench absorption_attention
    python benchmarks/absorption_attention.py --heads 12 --width 832 --height 480 --frames 126 21

Random queries, keys and values of Wan 1.3B's head width, through the pack's own operators, side by side in one process. Where a CPU
is to do it, fewer heads or tokens are taken, and the table says how many. What a whole chunk costs is in benchmarks/absorption.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import interval, load_pack, write_table
from rollout import CHUNK, timed

HEAD_DIM, LAYERS, PATCH = 128, 30, 16
RATIOS = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=2, help="Wan 1.3B has 12")
    parser.add_argument("--width", type=int, default=416)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument(
        "--frames", type=int, nargs="*", default=[126], help="latent frames of keys, the chunk's own among them"
    )
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    load_pack()
    with torch.inference_mode():
        measure(arguments)


class Layer:
    """One layer's queries of a chunk, its keys and values over `frames` latent frames, and what absorption does with them."""

    def __init__(self, heads: int, tokens: int, frames: int, kept: int) -> None:
        """A switched layer has the newest `kept` frames; the first one, which it pins, is as good as any here."""
        from adastate_pack.adastate_core.absorption import lse, moments, solve

        self.lse, self.heads, width = lse, heads, heads * HEAD_DIM
        cuda = torch.cuda.is_available()
        place = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
        self.q = torch.randn(1, CHUNK * tokens, width, **place)
        self.k, self.v = (torch.randn(1, frames * tokens, width, **place) for _ in range(2))
        self.split = (frames - kept) * tokens
        self.moments = {blocks: moments.Moments.empty(width, blocks, self.q.device) for blocks in (heads, 1)}
        self.corrections = {
            blocks: solve.Correction(
                torch.randn(width, **place), 0.01 * torch.randn(blocks, width // blocks, width // blocks, **place)
            )
            for blocks in (heads, 1)
        }

    def full(self) -> torch.Tensor:
        from adastate_pack.adastate_core.attention.cached import plain_attention

        return plain_attention(self.q, self.k, self.v, self.heads)

    def collected(self) -> torch.Tensor:
        """Full attention in two parts, whose rows go into the statistics."""
        parts = slice(self.split, None), slice(None, self.split)
        local, far = (self.lse.attend_part(self.q, self.k[:, part], self.v[:, part], self.heads) for part in parts)
        whole = self.lse.rows(self.lse.merge(local, far))
        self.moments[self.heads].add(self.lse.rows(local).flatten(0, 1), whole.flatten(0, 1))
        return whole

    def local(self) -> torch.Tensor:
        """What is left where the history is dropped."""
        from adastate_pack.adastate_core.attention.cached import plain_attention

        return plain_attention(self.q, self.k[:, self.split :], self.v[:, self.split :], self.heads)

    def absorbed(self, blocks: int) -> torch.Tensor:
        return self.corrections[blocks].apply(self.local())

    @property
    def ways(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "full history": self.full,
            "while collecting": self.collected,
            "switched, dropped": self.local,
            "switched, absorbed by head": lambda: self.absorbed(self.heads),
            "switched, absorbed by layer": lambda: self.absorbed(1),
        }


def measure(arguments: argparse.Namespace) -> None:
    from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings

    settings = AbsorptionSettings()
    kept = settings.local_window_frames + settings.sink_frames + CHUNK
    tokens = (arguments.height // PATCH) * (arguments.width // PATCH)
    lines = []
    for frames in arguments.frames:
        lines += rows_of(Layer(arguments.heads, tokens, frames, kept), frames, kept, arguments.rounds)
    write_table(
        "absorption-attention",
        f"The attention operator with and without absorption: {arguments.heads} of 12 heads, {tokens} tokens a frame "
        f"({arguments.width}x{arguments.height})",
        ["what", "latent frames of keys", "milliseconds", "of full history"],
        lines,
        [
            f"{arguments.rounds} rounds: medians; all ways take turns, and ratios are taken round by round. In "
            "brackets: where the median lies in 95 of 100 cases.",
            f"Queries of {CHUNK} latent frames. A switched layer keeps {kept} frames: the defaults of the node and the chunk.",
            f"*Layers at ratio*: the sum over {LAYERS} layers, of which so many are switched, absorbed by head. It counts "
            "attention over the past alone: no projections, no feed-forward, no text. Whole chunks are timed in other tables.",
        ],
    )


def rows_of(layer: Layer, frames: int, kept: int, rounds: int) -> list[list[str]]:
    """A line a way, and a line a ratio of layers."""
    times: dict[str, list[float]] = {name: [] for name in layer.ways}
    for number in range(rounds + 1):
        for name, way in layer.ways.items():
            took = timed(way)
            if number:  # the first round warms up
                times[name].append(took)
    full = times["full history"]
    lines = []
    for name, took in times.items():
        keys = str(kept if name.startswith("switched") else frames)
        lines.append([name, keys, f"{1e3 * statistics.median(took):.1f}", ratio(took, full)])
    for share in RATIOS:
        switched = math.floor(share * LAYERS)
        pairs = zip(times["switched, absorbed by head"], full, strict=True)
        sums = [switched * one + (LAYERS - switched) * other for one, other in pairs]
        name = f"layers at ratio {share:g}: {switched} of {LAYERS} switched"
        lines.append(
            [
                name,
                f"{frames} or {kept}",
                f"{1e3 * statistics.median(sums):.1f}",
                ratio(sums, [LAYERS * t for t in full]),
            ]
        )
    return lines


def ratio(took: list[float], full: list[float]) -> str:
    """The median over rounds, with its interval."""
    ratios = sorted(one / other for one, other in zip(took, full, strict=True))
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
