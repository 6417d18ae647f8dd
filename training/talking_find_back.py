"""The talking demo, 5: the student finds back from a past that it should not have come to.

    python3 run.py train talking_find_back --config training/configs/talking_find_back.toml

The student itself shows the way, with its weights held fixed: whatever past it is given, it has to make what it makes of the true
one. So a colour or a size that strays in a long rollout is gone with the next chunk, instead of being carried on. Where the balloon
flies the clip itself shows the way: with a past, nothing about it is left to chance. Nothing else changes, since nothing else is
taught.
"""

from __future__ import annotations

import torch

from adastate_core.schedules.schedule import Schedule

from .denoiser import blurred_past
from .loop import drawn_clips, train
from .run import Run
from .talking_denoiser import Clips, Given, TalkingLoss, drawn_below, evaluate, figures, past_of, some, weighted
from .talking_export import round_as_exported
from .talking_latents import load
from .talking_model import load_talking
from .world import CHUNK_LATENTS

# of latents [B, 16, T, h, w], 8 pixels a row and column: where the balloon flies, from the second chunk on
BALLOON = (slice(None), slice(None), slice(CHUNK_LATENTS, None), slice(0, 5), slice(0, 5))


@torch.no_grad()
def shown(
    guide: TalkingLoss, clips: Clips, given: Given, schedule: Schedule, step: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what a rollout that stands at `step` is given [B, 16, T, h, w], its level [B, T], the guide's velocity there), all with the
    true past of the clips."""
    past = clips["latents"].float()
    x = torch.randn(past.shape, generator=generator)
    for number, sigma in enumerate(schedule.sigmas[: step + 1]):
        level = x.new_full((len(x), x.shape[2]), sigma)
        v = guide.velocity(clips["codes"], given, x, level, past).float()
        if number < step:
            following = schedule.sigmas[number + 1]
            x = (1 - following) * (x - sigma * v) + following * torch.randn(x.shape, generator=generator)
    return x, level, v


def with_true_balloon(wanted: torch.Tensor, noisy: torch.Tensor, level: torch.Tensor, clips: Clips) -> torch.Tensor:
    """The velocity `wanted` [B, 16, T, h, w], with that to the clips' own latents where the balloon flies and there is a past."""
    to_clip = (noisy - clips["latents"].float()) / level[:, None, :, None, None]
    wanted = wanted.clone()
    wanted[BALLOON] = to_clip[BALLOON]
    return wanted


def main() -> None:
    run = Run.from_arguments("Train the talking demo's student to find back from a wrong past.")
    config = run.config
    losses, guide = (TalkingLoss(load_talking(config["start_from"]), config) for _ in range(2))
    for each in (losses, guide):
        round_as_exported(each.model)
    clips, wrong, held_out = (load(config["data"], name) for name in ("train", "wrong", "held_out"))
    schedule = Schedule.shifted(config["rollout_steps"], config["shift"])

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        source = wrong if drawn_below(config["wrong_share"], generator) else clips
        batch = some(source, drawn_clips(len(source["latents"]), config["batch"], generator))
        given = Given.draw(losses.texts, batch, config, generator)
        at = int(torch.randint(len(schedule.sigmas), (1,), generator=generator))
        noisy, level, wanted = shown(guide, batch, given, schedule, at, generator)
        wanted = with_true_balloon(wanted, noisy, level, batch)
        past = blurred_past(past_of(batch), config["blur_share"], config["blur_most"], generator)
        errors = losses(batch, given, noisy, level, wanted, past)
        return weighted(errors, config), figures(errors.detach())

    train(run, losses.model, step, lambda: evaluate(losses, held_out))


if __name__ == "__main__":
    main()
