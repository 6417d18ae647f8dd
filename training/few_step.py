"""Stage 5b: the few-step student, from the recurrence's weights, by regression along its ODE (CausVid, Self-Forcing).

    python3 run.py train few_step --config training/configs/few_step.toml

From each of its own noise levels the student has to point at where the ODE ends. The state stays in the loop as in
the recurrence stage: made by the student itself, with the gradient through its write-back, and no target.
"""

from __future__ import annotations

from dataclasses import replace

import torch

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


def main() -> None:
    run = Run.from_arguments("Train the few-step student on trajectories.")
    config, workers = run.config, run.workers
    clips = ClipRecurrence(student_of(config).to(run.device), config)
    replicated = workers.replicate(clips)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    numbers, trajectories = paths(config["trajectories"])
    sigmas = torch.tensor(Schedule.shifted(config["rollout_steps"], config["shift"]).sigmas)

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        index = drawn_clips(len(numbers), config["batch"], generator)
        solved, clip = trajectories[index].float(), numbers[index]
        noisy, wanted, sigma = on_path(solved, sigmas, generator)
        batch = latents[clip].float()
        draws = clips.draws(batch, config | {"drop_words": 0.0}, seed)
        draws = replace(draws, content=solved[:, 0], sigma=sigma).share(workers)
        batch, noisy, wanted = (workers.share(t).to(run.device) for t in (batch, noisy, wanted))
        own = workers.share(words[clip])
        errors = replicated(batch, own, draws, (noisy, wanted))
        return errors.mean(), figures(errors.detach().cpu(), own, draws.sigma.cpu())

    def look() -> dict[str, float]:
        show(run, held_out[1], latents.shape)
        return evaluate(clips, config, *held_out)

    train(run, clips.model, step, look)


if __name__ == "__main__":
    main()
