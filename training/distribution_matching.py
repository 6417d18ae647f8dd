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

from adastate_core.geometry import WAN21
from adastate_core.schedules.schedule import Schedule

from .bare_model import load_denoiser
from .latents import load
from .loop import drawn_clips, show
from .lora import student_of
from .optim import Average, Optimiser
from .parallel import Workers
from .recurrence import ClipRecurrence, Draws
from .run import Run
from .score_model import clip_velocity
from .self_rollout import Noise, SelfRollout
from .teacher_forcing import install
from .texts import texts_of


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


def renoise(x: torch.Tensor, shift: float, drawn: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(noisy x, sigma [B]) from uniform `drawn` [B]: one shifted level a clip, within 0.02..0.98."""
    sigma = (shift * drawn / (1 + (shift - 1) * drawn)).clamp(0.02, 0.98)
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * x + level * noise, sigma


class StudentStep(nn.Module):
    """One forward over all that the student's gradient comes from: its own rollouts, and true clips."""

    def __init__(self, model: nn.Module, config: dict) -> None:
        super().__init__()
        self.rollout, self.clips = SelfRollout(model, config), ClipRecurrence(model, config)
        self.schedule = Schedule.shifted(config["rollout_steps"], config["shift"])

    def forward(
        self,
        words: torch.Tensor,
        noise: Noise,
        exit_step: int,
        offset: int,
        skipped: int,
        true_clips: tuple[torch.Tensor, torch.Tensor, Draws] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rollouts [B, 16, T, h, w], the recurrence stage's squared errors on `true_clips`, if given)."""
        kept = None if true_clips is None else self.clips(*true_clips)
        return self.rollout(words, noise, self.schedule, exit_step, offset, skipped), kept


class Scores(nn.Module):
    """A score model as a module; `forward` gives x0 of noisy whole clips."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        install(model)

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return noisy - sigma.view(-1, 1, 1, 1, 1) * clip_velocity(self.model, noisy, sigma, context, mask)


class Matching:
    """Student, teacher and critic of one run, and the losses between them.

    Every method draws for the whole batch from `generator` and works on this process's share.
    """

    def __init__(self, config: dict, workers: Workers) -> None:
        self.config, self.workers, self.texts = config, workers, texts_of(config)
        self.student = StudentStep(student_of(config).to(workers.device), config)
        teacher = load_denoiser(config["teacher"]).to(workers.device).requires_grad_(False)
        self.critic = Scores(copy.deepcopy(teacher).requires_grad_(True))
        self.teacher = Scores(workers.shard(teacher))
        self.student_replica, self.critic_replica = workers.replicate(self.student), workers.replicate(self.critic)

    def _randn(self, generator: torch.Generator, batch: int, *shape: int) -> torch.Tensor:
        return self.workers.share(torch.randn(batch, *shape, generator=generator)).to(self.workers.device)

    def _renoised(self, x: torch.Tensor, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        drawn = self.workers.share(torch.rand(batch, generator=generator)).to(x)
        noise = self._randn(generator, batch, *x.shape[1:])
        return *renoise(x, self.config["shift"], drawn, noise), noise

    def _condition(self, words: torch.Tensor, drop: float, generator: torch.Generator) -> tuple:
        return self.workers.condition(*self.texts.whole(words, drop, generator))

    def rollout(self, words: torch.Tensor, generator: torch.Generator, true_clips=None) -> tuple:
        """(this process's rollouts, the loss on its true clips or None); exit step and noise from `generator`.

        With `beyond_chunks`, rollouts begin up to that many chunks earlier, by the words of the first chunk.
        """
        exit_step = int(torch.randint(self.config["rollout_steps"], (1,), generator=generator))
        offset = int(torch.randint(1 << 16, (1,), generator=generator))
        beyond, skipped = self.config.get("beyond_chunks", 0), 0
        if beyond:
            skipped = int(torch.randint(beyond + 1, (1,), generator=generator))
            words = torch.cat([words[:, :1].expand(-1, skipped, -1), words], 1)
        rows, columns = self.config["latent_size"]

        def noise(_chunk: int, _step: int, frames: int, _state: bool) -> torch.Tensor:
            return self._randn(generator, len(words), WAN21.channels, frames, rows, columns)

        step = self.student_replica if torch.is_grad_enabled() else self.student
        return step(self.workers.share(words), noise, exit_step, offset, skipped, true_clips)

    def true_clips(self, latents: torch.Tensor, words: torch.Tensor, seed: int) -> tuple:
        """This process's part of whole batches of clips, with what the recurrence stage draws for them."""
        draws = self.student.clips.draws(latents, self.config, seed)
        share = self.workers.share
        return share(latents).to(self.workers.device), share(words), draws.share(self.workers)

    def student_loss(self, x: torch.Tensor, words: torch.Tensor, generator: torch.Generator):
        """(loss, mean size of its gradient) of this process's rollouts x."""
        with torch.no_grad():
            noisy, sigma, _ = self._renoised(x, len(words), generator)
            every = self._condition(words, 0.0, generator)
            x_real = self.teacher(noisy, sigma, *every)
            if self.config["guidance"]:
                blank = self.teacher(noisy, sigma, *self._condition(words, 1.0, generator))
                x_real = x_real + self.config["guidance"] * (x_real - blank)
            x_fake = self.critic(noisy, sigma, *every)
        weights = horizon_weights(x.shape[2], self.config["alpha"], self.config["normalise_weights"])
        return matching_loss(x, x_real, x_fake, weights)

    def critic_loss(self, x: torch.Tensor, words: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flow matching on the student's own clips."""
        noisy, sigma, noise = self._renoised(x, len(words), generator)
        x0 = self.critic_replica(noisy, sigma, *self._condition(words, self.config["drop_words"], generator))
        v = (noisy - x0) / sigma.view(-1, 1, 1, 1, 1)
        return (v - (noise - x)).square().mean()


def main() -> None:
    run = Run.from_arguments("Distribution matching on the student's own rollouts.")
    config = run.config
    matching = Matching(config, run.workers)
    student, critic = matching.student.rollout.model, matching.critic.model
    optimisers = {
        "student_optimiser": Optimiser.of(student, config, config["lr"], config["decay_from"]),
        "critic_optimiser": Optimiser.of(critic, config, config["critic_lr"], decay_from=1.0),
    }
    average = Average(student, config["ema"])
    run.resume(student=student, critic=critic, average=average, **optimisers)
    latents, words = load(config["train"])
    logged: dict[str, float] = {}  # of the student's last step, which need not be one that is logged

    def look() -> None:
        with average.used_by(student):
            run.export(student)
            show(run, words, config["latent_size"])

    if run.step == run.steps:  # a kill may have come between the last step and this
        look()
    while run.step < run.steps:
        seed = config["seed"] * 1_000_003 + run.step
        generator = torch.Generator().manual_seed(seed)
        index = drawn_clips(len(words), config["batch"], generator)
        if run.step >= config["critic_alone"] and run.step % config["student_every"] == 0:
            own, true = index[: config["recurrence_batch"]], None
            if config["recurrence_weight"]:
                true = matching.true_clips(latents[own].float(), words[own], seed)
            with run.precision():
                x, kept = matching.rollout(words[index], generator, true)
                loss, size = matching.student_loss(x, words[index], generator)
                if kept is not None:
                    loss = loss + config["recurrence_weight"] * kept.mean()
                    logged["kept"] = kept.mean().item()
            loss.backward()
            logged |= {"loss": loss.item(), "gradient": size.item(), "std": x.detach().std().item()}
            logged["norm"] = optimisers["student_optimiser"].step(run.done)
            average.update(student)
        else:
            with torch.no_grad(), run.precision():
                x, _ = matching.rollout(words[index], generator)
        with run.precision():
            loss = matching.critic_loss(x.detach(), words[index], generator)
        loss.backward()
        optimisers["critic_optimiser"].step(run.done)
        run.advance(critic=loss.item(), **logged)
        if run.due():
            look()
    run.finish()


if __name__ == "__main__":
    main()
