"""Stage 5b: the few-step student, from the recurrence's weights, by regression along its ODE (CausVid, Self-Forcing).

    python3 run.py train few_step --config training/configs/few_step.toml

From each of its own noise levels the student has to point at where the ODE ends. The state stays in the loop as in
the recurrence stage: made by the student itself, with the gradient through its write-back, and no target.

`also` in the config trains the same weights for further anchors, step by step in turn: a list of tables, each of which gives
`anchor`, the `trajectories` of a run with that anchor, and whatever else differs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adastate_core.schedules.schedule import Schedule

from .latents import load
from .loop import drawn_clips, show, train
from .lora import student_of
from .recurrence import ClipRecurrence, evaluate, figures
from .run import Run
from .trajectories import paths


def on_path(
    solved: torch.Tensor, sigmas: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trajectories [B, steps + 1, 16, T, h, w] to (noisy, velocity to the end, sigma [B, chunks]): a level a chunk."""
    batch, _, _, frames = solved.shape[:4]
    step = torch.randint(len(sigmas), (batch, frames // 3), generator=generator)
    index = step.repeat_interleave(3, 1)[:, None, None, :, None, None].expand(-1, 1, *solved.shape[2:])
    noisy = solved.gather(1, index)[:, 0]
    sigma = sigmas[step]
    return noisy, (noisy - solved[:, -1]) / sigma.repeat_interleave(3, 1)[:, None, :, None, None], sigma


def variants(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's own settings, and those of each anchor that the same weights are trained for beside."""
    return [config] + [config | other for other in config.get("also", [])]


class OneOf(nn.Module):
    """Several recurrences of one model, of which a pass goes through the one of this number."""

    def __init__(self, model: nn.Module, configs: list[dict[str, Any]]) -> None:
        super().__init__()
        self.each = nn.ModuleList(ClipRecurrence(model, config) for config in configs)

    def forward(self, number: int, *given: Any) -> torch.Tensor:
        return self.each[number](*given)


def main() -> None:
    run = Run.from_arguments("Train the few-step student on trajectories.")
    config, workers = run.config, run.workers
    configs = variants(config)
    students = OneOf(student_of(config).to(run.device), configs)
    replicated = workers.replicate(students)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    solutions = [paths(one["trajectories"]) for one in configs]
    sigmas = torch.tensor(Schedule.shifted(config["rollout_steps"], config["shift"]).sigmas)

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator, turn = torch.Generator().manual_seed(seed), seed % len(configs)
        clips, (numbers, trajectories) = students.each[turn], solutions[turn]
        index = drawn_clips(len(numbers), config["batch"], generator)
        solved, clip = trajectories[index].float(), numbers[index]
        noisy, wanted, sigma = on_path(solved, sigmas, generator)
        batch = latents[clip].float()
        draws = clips.draws(batch, config | {"drop_words": 0.0}, seed)
        draws = replace(draws, content=solved[:, 0], sigma=sigma).share(workers)
        batch, noisy, wanted = (workers.share(t).to(run.device) for t in (batch, noisy, wanted))
        own = workers.share(words[clip])
        errors = replicated(turn, batch, own, draws, (noisy, wanted))
        return errors.mean(), figures(errors.detach().cpu(), own, draws.sigma.cpu())

    def look() -> dict[str, float]:
        show(run, held_out[1], latents.shape)
        found = evaluate(students.each[0], config, *held_out)
        for clips, one in zip(students.each[1:], configs[1:], strict=True):
            found |= {f"{name}_{one['anchor']['kind']}": v for name, v in evaluate(clips, one, *held_out).items()}
        return found

    train(run, students.each[0].model, step, look)


if __name__ == "__main__":
    main()
