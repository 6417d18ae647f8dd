"""The talking demo, 2: the causal S2V teacher, by teacher forcing over whole clips, from the shipped text model's weights.

    python3 run.py train talking_denoiser --config training/configs/talking_denoiser.toml

A clip's reference is one of its pictures, at times none; words are left out at times, so that the picture decides what they
do not say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from adastate_core.rope import Rope

from .denoiser import blurred_past, draw_sigmas
from .loop import drawn_clips, train
from .run import Run
from .talking_attention import TalkingClip, clip_velocity
from .talking_latents import load
from .talking_model import condition_tokens, load_talking, sound_of
from .texts import Texts
from .world import CHUNK_LATENTS

Clips = dict[str, torch.Tensor]
# latent rows and columns (8 pixels each) in which balloon and lantern are: what the sound moves
SUBJECTS = (slice(0, 5), slice(0, 8))


def drawn_below(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < share


@dataclass(frozen=True)
class Given:
    """What a batch of clips is conditioned on: `context` [1, n, 4096] and which of it each chunk sees, `mask` [B, chunks, n];
    pictures to refer to and to have stood still before, [B, 16, 1, h, w] each, or none; `window` latent frames of its past."""

    context: torch.Tensor
    mask: torch.Tensor
    pictures: tuple[torch.Tensor, torch.Tensor] | None
    window: int

    @staticmethod
    def draw(texts: Texts, clips: Clips, config: dict, generator: torch.Generator) -> Given:
        context, mask = texts.whole(clips["words"], config["drop_words"], generator)
        long = drawn_below(config["long_window"], generator)
        window = config["long_window_frames"] if long else config["window_frames"]
        if drawn_below(config["drop_reference"], generator):
            return Given(context, mask, None, window)
        stills = clips["references"]
        which = torch.randint(stills.shape[1], (len(stills),), generator=generator)
        stills = stills[torch.arange(len(stills)), which].float()
        # a picture's latent as a video's first frame or as one that stands: a rollout may be given either
        kinds = torch.randint(2, (2, len(stills)), generator=generator)
        return Given(context, mask, tuple(stills[torch.arange(len(stills)), kind, :, None] for kind in kinds), window)

    def some(self, index: torch.Tensor) -> Given:
        """What the clips of these numbers are given."""
        pictures = None if self.pictures is None else tuple(picture[index] for picture in self.pictures)
        return Given(self.context, self.mask[index], pictures, self.window)


class TalkingLoss(nn.Module):
    """Teacher forcing as a module; `forward` gives squared errors of v."""

    def __init__(self, model: nn.Module, config: dict) -> None:
        super().__init__()
        self.model, self.config, self.texts = model, config, Texts()

    def forward(
        self,
        clips: Clips,
        given: Given,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        wanted: torch.Tensor,
        past: torch.Tensor,
    ) -> torch.Tensor:
        """[B, T, h, w] for `noisy` clips at `sigma` [B, T], the velocity `wanted` there and the `past` as it is seen."""
        v = self.velocity(clips["codes"], given, noisy, sigma, past)
        return (v - wanted).square().mean(1)

    def velocity(
        self, codes: torch.Tensor, given: Given, noisy: torch.Tensor, sigma: torch.Tensor, past: torch.Tensor
    ) -> torch.Tensor:
        """v of noisy clips [B, 16, T, h, w]."""
        _, _, frames, height, width = noisy.shape
        condition = condition_tokens(self.model, *given.pictures) if given.pictures else None
        rope, tokens = Rope(self.model.dim // self.model.num_heads, height // 2, width // 2), height * width // 4
        count = condition.shape[1] if condition is not None else 0
        clip = TalkingClip(rope, tokens, frames, CHUNK_LATENTS, given.mask, given.window, 0, count)
        sound = sound_of(self.model, codes, frames)
        return clip_velocity(self.model, past, noisy, sigma, given.context, clip, sound, condition)


def past_of(clips: Clips) -> torch.Tensor:
    """What clips have behind them [N, 16, T, h, w]: themselves, or the past that they come with."""
    return clips.get("past", clips["latents"]).float()


def noised(clips: Clips, config: dict, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(noisy clips, sigma [B, T], the velocity there, the past with a little noise on it)."""
    latents = clips["latents"].float()
    sigma = draw_sigmas(
        len(latents), latents.shape[2] // CHUNK_LATENTS, config["shift"], config["full_noise"], generator
    )
    sigma = sigma.repeat_interleave(CHUNK_LATENTS, 1)
    level, noise = sigma[:, None, :, None, None], torch.randn(latents.shape, generator=generator)
    past = blurred_past(past_of(clips), config["blur_share"], config["blur_most"], generator)
    return (1 - level) * latents + level * noise, sigma, noise - latents, past


def weighted(errors: torch.Tensor, config: dict) -> torch.Tensor:
    """The mean of errors [B, T, h, w], with the first chunk and what the sound moves counting more."""
    weight = torch.ones(errors.shape[1:])
    weight[:, SUBJECTS[0], SUBJECTS[1]] *= config["subject_weight"]
    weight[:CHUNK_LATENTS] *= config["first_chunk_weight"]
    return (errors * weight).mean() / weight.mean()


def some(clips: Clips, index: torch.Tensor) -> Clips:
    """The clips of these numbers."""
    return {name: value[index] for name, value in clips.items()}


def figures(errors: torch.Tensor) -> dict[str, float]:
    """What the log shows: the mean, that of the first chunk and that where balloon and lantern are."""
    subjects = errors[:, CHUNK_LATENTS:, SUBJECTS[0], SUBJECTS[1]]
    return {
        "plain": errors.mean().item(),
        "first": errors[:, :CHUNK_LATENTS].mean().item(),
        "subjects": subjects.mean().item(),
    }


def main() -> None:
    run = Run.from_arguments("Train the talking demo's causal teacher.")
    config = run.config
    losses = TalkingLoss(load_talking(config["start_from"]), config)
    clips, held_out = (load(config["data"], name) for name in ("train", "held_out"))
    wrong = load(config["data"], "wrong") if config["wrong_share"] else {}

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        source = wrong if config["wrong_share"] and drawn_below(config["wrong_share"], generator) else clips
        batch = some(source, drawn_clips(len(source["latents"]), config["batch"], generator))
        given = Given.draw(losses.texts, batch, config, generator)
        errors = losses(batch, given, *noised(batch, config, generator))
        return weighted(errors, config), figures(errors.detach())

    train(run, losses.model, step, lambda: evaluate(losses, held_out))


def evaluate(losses: TalkingLoss, clips: Clips, count: int = 24) -> dict[str, float]:
    """Held-out loss with the clips' own sound and with each other's, on draws that never change."""
    own, other = [], []
    config = losses.config | {"drop_words": 0.0, "drop_reference": 0.0, "long_window": 0.0}
    for i in range(0, min(count, len(clips["latents"])), 6):
        batch, generator = some(clips, torch.arange(i, i + 6)), torch.Generator().manual_seed(77 + i)
        drawn = Given.draw(losses.texts, batch, config, generator), *noised(batch, config, generator)
        own.append(losses(batch, *drawn))
        other.append(losses(batch | {"codes": batch["codes"].float().roll(1, 0)}, *drawn))
    held = {f"held_{name}": value for name, value in figures(torch.cat(own)).items()}
    return held | {"held_subjects_other_sound": figures(torch.cat(other))["subjects"]}


if __name__ == "__main__":
    main()
