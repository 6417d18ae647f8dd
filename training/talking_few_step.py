"""The talking demo, 4: the few-step student, by regression along the teacher's ODE.

    python3 run.py train talking_few_step --config training/configs/talking_few_step.toml

From each of its own noise levels the student has to point at where the ODE ends. Its weights are rounded in every forward as the
exported file holds them, so that what is learnt survives the file.
"""

from __future__ import annotations

import torch

from adastate_core.schedules.schedule import Schedule

from .denoiser import blurred_past
from .few_step import on_path
from .loop import train
from .run import Run
from .talking_denoiser import TalkingLoss, drawn_below, evaluate, figures, past_of, some, weighted
from .talking_export import round_as_exported
from .talking_latents import load
from .talking_model import load_talking
from .talking_trajectories import given_of, parts
from .world import CHUNK_LATENTS


def main() -> None:
    run = Run.from_arguments("Train the talking demo's few-step student on trajectories.")
    config = run.config
    losses = TalkingLoss(load_talking(config["start_from"]), config)
    if config["rounded"]:
        round_as_exported(losses.model)
    clips, held_out = (load(config["data"], name) for name in ("train", "held_out"))
    solved, wrong, wrongly_solved = parts(config["trajectories"]), {}, []
    if config["wrong_share"]:
        wrong, wrongly_solved = load(config["data"], "wrong"), parts(config["wrong_trajectories"])
    sigmas = torch.tensor(Schedule.shifted(config["rollout_steps"], config["shift"]).sigmas)

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        source, those = clips, solved
        if config["wrong_share"] and drawn_below(config["wrong_share"], generator):
            source, those = wrong, wrongly_solved
        number, part = those[int(torch.randint(len(those), (1,), generator=generator))]
        whole = some(source, part["clips"])
        given, _ = given_of(number, losses, whole, config)
        index = torch.randperm(len(part["clips"]), generator=generator)[: config["batch"]]
        noisy, wanted, sigma = on_path(part["trajectories"][index].float(), sigmas, generator)
        batch = some(whole, index)
        past = blurred_past(past_of(batch), config["blur_share"], config["blur_most"], generator)
        errors = losses(batch, given.some(index), noisy, sigma.repeat_interleave(CHUNK_LATENTS, 1), wanted, past)
        return weighted(errors, config), figures(errors.detach())

    train(run, losses.model, step, lambda: evaluate(losses, held_out))


if __name__ == "__main__":
    main()
