"""Planned and counted memory, at real models' exact shapes: python3 run.py bench planned_memory

Every live byte on CUDA's stand-in (tests/core/fake_cuda.py) is counted, chunk after chunk, with the state that is taken at the
end. A model that is shapes alone calls the attention of every layer. So nothing is computed, no GPU is needed, and the figures
are the same on every machine. Not counted is the host's own forward, which is a line of its own when a model is loaded.

With --model or --case the table keeps its other rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

import torch  # noqa: E402
from planned_bytes import CASES, GENERATED, MODELS, Counted, cases_of, counted  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "planned-memory.md"
MIB = 2**20


def line(model: str, case: str, found: Counted) -> str:
    """A row of the table."""
    shown = (found.planned["rope_tables"], found.planned["working"], found.total, found.peak["cuda"])
    cells = " | ".join(f"{size / MIB:,.1f}" for size in shown)
    return f"| {model} | {case} | {CASES[case]['chunks']} | {cells} | {found.share:.4f} |"


def kept_and(rows: dict[tuple[str, str], str]) -> list[str]:
    """The table's rows, by the names of model and case, with these in the place of what they were before; in the order of the
    models and cases that there are."""
    if TABLE.is_file():
        there = [each for each in TABLE.read_text().splitlines() if each.startswith("| ")][2:]
        rows = {tuple(cell.strip() for cell in each.split("|")[1:3]): each for each in there} | rows
    known = [(model, case) for model in MODELS for case in CASES]
    return [rows[key] for key in known if key in rows]


def main() -> int:
    """Count the cases, print and write their table; 1 if a plan is below its peak or more than 1.10 times it."""
    parser = argparse.ArgumentParser(prog="run.py bench planned_memory", description=__doc__)
    parser.add_argument("--model", choices=[*MODELS], action="append", help="only this one")
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this one")
    options = parser.parse_args()
    rows, wrong = {}, []
    for model in options.model or MODELS:
        for case in options.case or cases_of(model):
            found = counted(case, model)
            rows[model, case] = line(model, case, found)
            sys.stdout.write(rows[model, case] + "\n")
            sys.stdout.flush()
            if not 1.0 <= found.share <= 1.10:
                wrong.append(f"{model}, {case}")
    text = [
        "# Planned and counted memory",
        "",
        f"`python3 run.py bench planned_memory`, torch {torch.__version__}: MiB on the device, 832x480 (the 5B: 1280x704, S2V: "
        "704x384), bfloat16, all layers. Chunks are of 3 latent frames (LongLive 2.0: 8); the "
        f"last {GENERATED} (LiveAvatar: all) are denoised in 4 steps (5 with Rolling Forcing), those before are given, and a state "
        "is taken at the end. Counted is every live byte but the host's own forward.",
        "",
        "What has no row was not counted at this size: it takes too long, or more memory than the machine had. *longlive* are "
        "the recache of one pass, before the chunk from frame 12 and from frame 18 on. *rolling* are five chunks at once beside a "
        "whole window, *rolling forcing* is the preset's rule, in which they share it. *liveavatar* has a window for each of its "
        "four steps, *speaks* one for all and a clean pass.",
        "",
        "| model | case | chunks | tables | working | planned | counted peak | planned / counted |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *kept_and(rows),
    ]
    TABLE.write_text("\n".join(text) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
