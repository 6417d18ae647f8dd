"""Stage 5b: the few-step student, from the recurrence's weights, by regression along its ODE (CausVid, Self-Forcing).

    python3 run.py train few_step --config training/configs/few_step.toml

From each of its own noise levels the student has to point at where the ODE ends. The state stays in the loop as in
the recurrence stage: made by the student itself, with the gradient through its write-back, and no target.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from adastate_core.schedule import Schedule

from .bare_model import load_denoiser
from .latents import load
from .optim import Average, Optimiser
from .recurrence import ClipRecurrence, Draws, evaluate, figures
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
    config = run.config
    clips = ClipRecurrence(load_denoiser(config["start_from"]), config)
    model = clips.model
    optimiser = Optimiser(model, config["lr"], warmup=config["warmup"], decay_from=config["decay_from"])
    average = Average(model, config["ema"])
    run.resume(model=model, optimiser=optimiser, average=average)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    numbers, trajectories = paths(config["trajectories"])
    sigmas = torch.tensor(Schedule.shifted(config["rollout_steps"], config["shift"]).sigmas)
    while run.step < run.steps:
        seed = config["seed"] * 1_000_003 + run.step
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(numbers), (config["batch"],), generator=generator)
        solved, own = trajectories[index].float(), numbers[index]
        noisy, wanted, sigma = on_path(solved, sigmas, generator)
        batch = latents[own].float()
        draws = Draws.make(batch.shape, clips.anchor.state_frames, config | {"drop_words": 0.0}, seed)
        errors = clips(batch, words[own], replace(draws, content=solved[:, 0], sigma=sigma), (noisy, wanted))
        errors.mean().backward()
        norm = optimiser.step(run.done)
        average.update(model)
        run.advance(loss=errors.mean().item(), norm=norm, **figures(errors.detach(), words[own], sigma))
        if run.step % config["evaluate_every"] == 0 or run.step == run.steps:
            evaluate(run, clips, average, *held_out)


if __name__ == "__main__":
    main()
