"""The talking demo, 3: where the trained teacher's own ODE leads, for the few-step student to learn from.

    python3 run.py train talking_trajectories --config training/configs/talking_trajectories.toml

The past of every chunk is the clip's (teacher forcing), so all chunks are solved side by side, by Euler steps over the shifted
noise levels, among which are the student's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from adastate_core.files.tensor_file import write_tensors
from adastate_core.schedules.schedule import Schedule

from .run import Run
from .talking_denoiser import Given, TalkingLoss, past_of, some
from .talking_latents import load
from .talking_model import load_talking


@torch.no_grad()
def solve(
    losses: TalkingLoss,
    clips: dict[str, torch.Tensor],
    given: Given,
    schedule: Schedule,
    keep: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """[B, keep + 1, 16, T, h, w]: the clips at every (steps / keep)-th noise level, the first being noise, then their end."""
    past = past_of(clips)
    every, sigmas = len(schedule.sigmas) // keep, (*schedule.sigmas, 0.0)
    x, kept = torch.randn(past.shape, generator=generator), []
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if step % every == 0:
            kept.append(x)
        levels = x.new_full((len(x), x.shape[2]), sigma)
        x = x + (following - sigma) * losses.velocity(clips["codes"], given, x, levels, past).float()
    return torch.stack([*kept, x], 1)


def given_of(
    part: int, losses: TalkingLoss, clips: dict[str, torch.Tensor], config: dict
) -> tuple[Given, torch.Generator]:
    """What the clips of a part are conditioned on, and the generator after it."""
    generator = torch.Generator().manual_seed(config["trajectories_seed"] * 1_000_003 + part)
    return Given.draw(losses.texts, clips, config, generator), generator


def parts(folder: str) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """(number, {clips [B], trajectories [B, keep + 1, 16, T, h, w]}) of everything solved; SystemExit where nothing is."""
    files = sorted(Path(folder).glob("part_*.safetensors"))
    if not files:
        raise SystemExit(f"there are no trajectories in {folder}; run the stage `talking_trajectories` first.")
    return [(int(file.stem.rpartition("_")[2]), load_file(file)) for file in files]


def main() -> None:
    run = Run.from_arguments("Solve the trained teacher's ODE for the few-step student.")
    config = run.config
    losses = TalkingLoss(load_talking(config["teacher"]), config)
    clips = load(config["data"], config["clips"])
    schedule = Schedule.shifted(config["teacher_steps"], config["shift"])
    while run.step < run.steps:
        target = run.folder / f"part_{run.step:05d}.safetensors"
        if not target.exists():
            numbers = torch.arange(run.step * config["batch"], (run.step + 1) * config["batch"]) % len(clips["latents"])
            batch = some(clips, numbers)
            given, generator = given_of(run.step, losses, batch, config)
            with run.precision():
                solved = solve(losses, batch, given, schedule, config["rollout_steps"], generator)
            write_tensors(target, {"clips": numbers, "trajectories": solved.half()}, {})
        run.advance()
    run.workers.leave()


if __name__ == "__main__":
    main()
