"""Stage 7: distribution matching (DMD) on the student's own rollouts, with the horizon weight of AdaState.

    python3 run.py train distribution_matching --config training/configs/distribution_matching.toml

Loss: Self-Forcing (arXiv 2506.08009) and DMD2; the weight over the horizon: AdaState (arXiv 2605.30349). Teacher and critic
see whole clips of content; the state has no score of its own. What the recurrence stage taught may be kept by
mixing its loss in (`recurrence_weight`).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from adastate_core.schedule import Schedule

from .bare_model import load_denoiser
from .latents import load
from .optim import Average, Optimiser
from .recurrence import ClipRecurrence, Draws
from .run import Run
from .score_model import clip_velocity
from .self_rollout import SelfRollout
from .teacher_forcing import install, text_mask


def horizon_weights(frames: int, alpha: float, normalise: bool = False) -> torch.Tensor:
    """w_i = 1 + alpha (i - 1) / (N - 1) for content frames i = 1..N, [N]; `normalise` divides by their mean."""
    weights = 1 + alpha * torch.linspace(0, 1, frames) if frames > 1 else torch.ones(frames)
    return weights / weights.mean() if normalise else weights


def matching_loss(
    x: torch.Tensor, x_real: torch.Tensor, x_fake: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DMD's loss of rollouts x [B, C, T, h, w] whose gradient is (x_fake - x_real) / mean|x - x_real|, per frame
    weighted, over the number of elements; and the gradient's mean size, for the log."""
    with torch.no_grad():
        scale = (x - x_real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = torch.nan_to_num((x_fake - x_real) / scale)
        target = (x - gradient).double()
    per_frame = 0.5 * (x.double() - target).square().mean((0, 1, 3, 4))
    return (per_frame * weights.to(per_frame)).mean(), gradient.abs().mean()


def renoise(x: torch.Tensor, shift: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(noisy x, noise, sigma [B]): one shifted level a clip, within 0.02..0.98."""
    u = torch.rand(len(x), generator=generator)
    sigma = (shift * u / (1 + (shift - 1) * u)).clamp(0.02, 0.98)
    noise, level = torch.randn(x.shape, generator=generator), sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * x + level * noise, noise, sigma


class Matching:
    """Student, teacher and critic of one run, and the losses between them."""

    def __init__(self, config: dict) -> None:
        self.config = config
        model = load_denoiser(config["start_from"])
        self.student = SelfRollout(model, config)
        self.clips = ClipRecurrence(model, config)
        self.teacher, self.critic = self._scores(config["teacher"])
        self.schedule = Schedule.shifted(config["rollout_steps"], config["shift"])

    @staticmethod
    def _scores(path: str) -> tuple[nn.Module, nn.Module]:
        teacher = load_denoiser(path)
        critic = copy.deepcopy(teacher)
        for model in (teacher, critic):
            install(model)
        return teacher.requires_grad_(False), critic

    def rollout(self, words: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Content latents of the words' rollouts; exit step and every noise from `generator`."""
        exit_step = int(torch.randint(len(self.schedule.sigmas), (1,), generator=generator))
        offset = int(torch.randint(1 << 16, (1,), generator=generator))
        size = self.config["latent_size"]

        def noise(_chunk: int, _step: int, frames: int, _state: bool) -> torch.Tensor:
            return torch.randn(len(words), 16, frames, size, size, generator=generator)

        return self.student(words, noise, self.schedule, exit_step, offset)

    def student_loss(self, x: torch.Tensor, words: torch.Tensor, generator: torch.Generator):
        """(loss, mean size of its gradient) of rollouts x."""
        with torch.no_grad():
            noisy, _, sigma = renoise(x, self.config["shift"], generator)
            level = sigma.view(-1, 1, 1, 1, 1)
            every = text_mask(words, 0.0, generator)
            x_real = noisy - level * clip_velocity(self.teacher, noisy, sigma, every)
            if self.config["guidance"]:
                blank = noisy - level * clip_velocity(self.teacher, noisy, sigma, text_mask(words, 1.0, generator))
                x_real = x_real + self.config["guidance"] * (x_real - blank)
            x_fake = noisy - level * clip_velocity(self.critic, noisy, sigma, every)
        weights = horizon_weights(x.shape[2], self.config["alpha"], self.config["normalise_weights"])
        return matching_loss(x, x_real, x_fake, weights)

    def critic_loss(self, x: torch.Tensor, words: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flow matching on the student's own clips."""
        noisy, noise, sigma = renoise(x, self.config["shift"], generator)
        v = clip_velocity(self.critic, noisy, sigma, text_mask(words, self.config["drop_words"], generator))
        return (v - (noise - x)).square().mean()

    def kept_loss(self, latents: torch.Tensor, words: torch.Tensor, seed: int) -> torch.Tensor:
        """The recurrence stage's loss on true clips."""
        draws = Draws.make(latents.shape, self.clips.anchor.state_frames, self.config, seed)
        return self.clips(latents, words, draws).mean()


def main() -> None:
    run = Run.from_arguments("Distribution matching on the student's own rollouts.")
    config = run.config
    matching = Matching(config)
    student, critic = matching.student.model, matching.critic
    optimisers = {
        "student_optimiser": Optimiser(student, config["lr"], config["warmup"], config["decay_from"]),
        "critic_optimiser": Optimiser(critic, config["critic_lr"], config["warmup"], decay_from=1.0),
    }
    average = Average(student, config["ema"])
    run.resume(student=student, critic=critic, average=average, **optimisers)
    latents, words = load(config["train"])
    while run.step < run.steps:
        seed = config["seed"] * 1_000_003 + run.step
        generator = torch.Generator().manual_seed(seed)
        logged = {}
        index = torch.randint(len(words), (config["batch"],), generator=generator)
        if run.step >= config["critic_alone"] and run.step % config["student_every"] == 0:
            x = matching.rollout(words[index], generator)
            loss, size = matching.student_loss(x, words[index], generator)
            if config["recurrence_weight"]:
                own = index[: config["recurrence_batch"]]
                kept = matching.kept_loss(latents[own].float(), words[own], seed)
                loss = loss + config["recurrence_weight"] * kept
                logged["kept"] = kept.item()
            loss.backward()
            logged |= {"loss": loss.item(), "gradient": size.item(), "std": x.detach().std().item()}
            logged["norm"] = optimisers["student_optimiser"].step(run.done)
            average.update(student)
        else:
            with torch.no_grad():
                x = matching.rollout(words[index], generator)
        loss = matching.critic_loss(x.detach(), words[index], generator)
        loss.backward()
        optimisers["critic_optimiser"].step(run.done)
        run.advance(critic=loss.item(), **logged)
        if run.step % config["evaluate_every"] == 0 or run.step == run.steps:
            with average.used_by(student):
                torch.save(student.state_dict(), run.folder / "model.pt")


if __name__ == "__main__":
    main()
