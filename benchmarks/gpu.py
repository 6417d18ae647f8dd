"""What a rollout takes on a GPU, part by part, in under 8 minutes: python3 run.py bench gpu

    python benchmarks/gpu.py [--only chunks --only drift] [--minutes 8] [--drift-chunks 300]
    python benchmarks/gpu.py --tiny --folder DIR      # the same code in a small size on any machine: says nothing about speed

Random weights of the exact geometry of Wan 2.1 1.3B, 832x480. A section that fails leaves a line that says why, and the others go
on. With a GPU the report goes to benchmarks/results/gpu.md; without one nothing is written there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from host import RESULTS, device_name, load_pack, table_lines
from on_gpu.bench import TINY, Bench, NotOffered, Section, Size


def sections() -> dict[str, Callable[[Bench], Section]]:
    """In the order in which they run: what matters most comes before the time is used up."""
    from on_gpu import absorbing, chunks, decoding, drift, machine, passes, video

    return {
        "machine": machine.machine,
        "pass": passes.a_pass,
        "chunks": chunks.chunks,
        "decoding": decoding.decoding,
        "video": video.end_to_end,
        "first": chunks.first_frame,
        "full-length": passes.full_length,
        "absorption": absorbing.absorption,
        "memory": absorbing.memory,
        "drift": drift.drift,
        "14b": absorbing.large,
    }


def report(bench: Bench, names: list[str]) -> list[str]:
    """All sections' lines of Markdown; one that fails has a line that says why."""
    lines = []
    for name, make in sections().items():
        if names and name not in names:
            continue
        start = time.monotonic()
        section = _section(bench, name, make)
        lines += ["", *section, "", f"({time.monotonic() - start:.0f} s)"]
        print("\n".join(section), flush=True)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return lines


def _section(bench: Bench, name: str, make: Callable[[Bench], Section]) -> list[str]:
    if bench.time_left <= 0:
        return [f"## {name}", "", "Not run: the time was used up before (--minutes)."]
    try:
        found = make(bench)
    except NotOffered as error:
        return [f"## {name}", "", f"Not offered: {error}."]
    except Exception as error:  # one section must not take the others with it
        return [f"## {name}", "", f"Failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    notes = [f"- {note}" for note in found.notes]
    return [f"## {found.title}", "", *table_lines(found.header, found.rows), "", *notes, "", *found.more]


def main() -> int:
    """Measure and write; 0 also where there is no GPU, after a line that says so."""
    parser = argparse.ArgumentParser(prog="run.py bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="only this section")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no section is begun")
    parser.add_argument("--window", type=int, help="latent frames of the sections on absorption")
    parser.add_argument("--drift-chunks", type=int, help="chunks of each rollout of the section on drift")
    parser.add_argument("--tiny", action="store_true", help="a small size, on any machine")
    parser.add_argument("--folder", type=Path, help="where the report goes, instead of benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("There is no CUDA device here, so nothing was measured. --tiny tries the same code in a small size.")
        return 0
    if options.tiny and options.folder is None:
        parser.error("--tiny measures nothing; say with --folder where its report may go")
    size = TINY if options.tiny else Size()
    if options.drift_chunks:
        size = replace(size, drift_chunks=options.drift_chunks)
    if options.window:
        size = replace(size, absorbed_window=options.window)
    folder = options.folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    load_pack()
    with torch.inference_mode():
        bench = Bench(size, time.monotonic() + 60 * options.minutes)
        bench.folder = folder
        lines = report(bench, options.only)
    what = (
        f"{size.model}, {size.width}x{size.height}{', a trial that says nothing about speed' if options.tiny else ''}"
    )
    head = [f"# A rollout on {device_name()}", "", f"Random weights, {what}; torch {torch.__version__.split('+')[0]}."]
    (folder / "gpu.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
