"""What the encoder takes of a rollout's own time: one rollout that waits for it and does not, a few chunks at a time.

    python3 run.py bench writing
    python benchmarks/writing.py --size 256

The shipped workflow's own nodes run in this process. In every other stretch the rollout waits after each chunk until it is
written, as where it encodes by itself; in the others it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from host import PACK, interval, load_pack, write_table
from watching import run_graph

_SKIPPED = 8  # chunks, until the window is full and all is warm


class Turns:
    """Stretches of chunks in turns, and what each took: of the clock, and of it in waiting for the encoder."""

    def __init__(self, stretch: int) -> None:
        self.stretch, self.waited = stretch, 0.0
        # (time, time waited so far, whether the rollout waits from here on) as each chunk is decoded
        self.marks: list[tuple[float, float, bool]] = []

    @property
    def waits(self) -> bool:
        return max(0, len(self.marks) - _SKIPPED) // self.stretch % 4 in (0, 3)

    def install(self) -> None:
        """Let streams wait in turns, and count what they wait."""
        from adastate_pack.adastate_core.video.decoded_stream import VideoStream
        from adastate_pack.adastate_core.video.writing_thread import WritingThread

        step, wait = VideoStream.step, WritingThread.wait

        def counted(thread, most):
            start = time.perf_counter()
            try:
                wait(thread, most)
            finally:
                self.waited += time.perf_counter() - start

        def in_turns(stream, latents):
            pictures = step(stream, latents)
            if self.waits:
                stream.drain()
            self.marks.append((time.perf_counter(), self.waited, self.waits))
            return pictures

        VideoStream.step, WritingThread.wait = in_turns, counted

    def pairs(self, column: int) -> list[tuple[float, float]]:
        """(beside, in turn) seconds of neighbouring stretches, by one of the two clocks."""
        borders = self.marks[_SKIPPED - 1 :: self.stretch]
        found = []
        for before, after in zip(borders, borders[1:], strict=False):
            found.append((self.marks[self.marks.index(before) + 1][2], after[column] - before[column]))
        turns = [dict(found[i : i + 2]) for i in range(0, len(found) - 1, 2)]
        return [(turn[False], turn[True]) for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="of stretches, one that waits and one that does not")
    parser.add_argument("--stretch", type=int, default=4, help="chunks")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    arguments = parser.parse_args()
    load_pack()
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(PACK / "models" / "diffusion_models"), is_default=True)
    folder_paths.add_model_folder_path("vae", str(PACK / "models" / "vae"), is_default=True)
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_temp_directory(folder)
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Run the graph; write results/writing.md."""
    turns, chunks = Turns(arguments.stretch), _SKIPPED + 2 * arguments.pairs * arguments.stretch + 1
    turns.install()
    run_graph({"width": arguments.size, "height": arguments.size, "length": 12 * chunks - 3})
    times, waits = turns.pairs(0), turns.pairs(1)
    ratios = sorted(beside / in_turn for beside, in_turn in times)
    low, high = interval(ratios)
    rows = []
    for which, name in ((1, "in turn"), (0, "beside")):
        chunk = statistics.median(pair[which] for pair in times) / arguments.stretch
        share = statistics.median(waited[which] / taken[which] for taken, waited in zip(times, waits, strict=True))
        ratio = "1" if which else f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        rows.append([name, f"{1000 * chunk:.1f}", f"{100 * share:.2f} %", ratio])
    write_table(
        "writing",
        f"One rollout of {chunks} chunks of {arguments.size}x{arguments.size} pixels, its frames encoded in turn and beside it",
        ["the encoder's work", "ms a chunk (median)", "of it waiting for the encoder", "ratio"],
        rows,
        [
            f"Medians of {len(ratios)} pairs of neighbouring stretches of {arguments.stretch} chunks, everything else as in the "
            "workflow long_video; the ratio with the interval that holds such a median in 95 of 100 cases.",
        ],
    )


if __name__ == "__main__":
    main()
