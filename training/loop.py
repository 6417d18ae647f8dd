"""The loop that every stage of the transformer but distribution matching runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .optim import Average, Optimiser
from .run import Run
from .sheets import sample_sheet

# seed of a step -> (this process's loss with its graph, figures for the log)
Step = Callable[[int], tuple[torch.Tensor, dict[str, float]]]


def show(run: Run, words: torch.Tensor, size: tuple[int, ...]) -> None:
    """Four rollouts of the exported weights as `folder/sheet_STEP.png`, where the run's file names a `codec`."""
    if run.workers.first and run.config.get("codec"):
        path = run.folder / f"sheet_{run.step:06d}.png"
        sample_sheet(run.folder / "model.pt", run.config, words[:4], (size[-2], size[-1]), path, run.device)


def train(run: Run, model: nn.Module, step: Step, evaluate: Callable[[], dict[str, float]]) -> None:
    """Train `model` to the run's last step; `evaluate` sees the averaged weights, which go to `folder/model.pt`."""
    config = run.config
    optimiser = Optimiser.of(model, config, config["lr"], config["decay_from"])
    average = Average(model, config["ema"])
    run.resume(model=model, optimiser=optimiser, average=average)

    def look() -> None:
        with average.used_by(model), torch.no_grad(), run.precision():
            run.export(model)
            run.record(**run.workers.mean(evaluate()))

    if run.step == run.steps:  # a kill may have come between the last step and this
        look()
    while run.step < run.steps:
        with run.precision():
            loss, figures = step(config["seed"] * 1_000_003 + run.step)
        loss.backward()
        norm = optimiser.step(run.done)
        average.update(model)
        run.advance(loss=loss.item(), norm=norm, **figures)
        if run.due():
            look()
    run.finish()


def drawn_clips(count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch] clip numbers, uniformly."""
    return torch.randint(count, (batch,), generator=generator)
