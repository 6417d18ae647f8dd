"""What another machine needs to go on with a plan, in few bytes: weights in bf16, and the checkpoint of the stage under way.

    python3 run.py train handover --config training/configs/journey/plan.toml --into FOLDER
    python3 run.py train handover --config training/configs/journey/plan.toml --out_of FOLDER

Only files that stages still to be done name are packed. Clips and trajectories are not: they are made again from their seeds, and
the plan does so by itself. A checkpoint's floats are rounded to bf16 once, its optimisers' averages included. With `--weights_only
1` checkpoints are left out, and a stage under way begins anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from adastate_core.files.whole_file import whole_file

from .run import Run, log
from .stages import Plan

MARKS, CHECKPOINT = "stages.json", "last.pt"


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """The same with every float tensor in `dtype`, however deep."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: rounded(one, dtype) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rounded(one, dtype) for one in value)
    return value


def rewritten(source: Path, target: Path, dtype: torch.dtype) -> None:
    """A file of tensors with its floats in `dtype`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        torch.save(rounded(torch.load(source, weights_only=True), dtype), file)
    log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)


def files_of(plan: Plan, weights_only: bool = False) -> list[Path]:
    """Weights that stages still to be done name, and checkpoints of those of them that were begun."""
    left = plan.to_do()
    weights = {path for path in plan.wanted(left) if path.suffix == ".pt" and path.is_file()}
    begun = {entry.folder / CHECKPOINT for entry in left if not plan.done(entry)} if not weights_only else set()
    return sorted(weights | {path for path in begun if path.is_file()})


def main() -> None:
    run = Run.from_arguments("Hand a plan on.", {"into": Path, "out_of": Path, "weights_only": int})
    plan = Plan(run.config)
    into, out_of = run.config.get("into"), run.config.get("out_of")
    if (into is None) == (out_of is None):
        raise SystemExit("give either --into FOLDER, to pack what is needed, or --out_of FOLDER, to go on with it")
    if into is not None:
        for path in files_of(plan, bool(run.config.get("weights_only"))):
            rewritten(path, into / path.relative_to(plan.folder), torch.bfloat16)
        if (plan.folder / MARKS).exists():
            shutil.copyfile(plan.folder / MARKS, into / MARKS)
        return
    for path in sorted(out_of.rglob("*.pt")):
        rewritten(path, plan.folder / path.relative_to(out_of), torch.float32)
    if (out_of / MARKS).exists():
        shutil.copyfile(out_of / MARKS, plan.folder / MARKS)


if __name__ == "__main__":
    main()
