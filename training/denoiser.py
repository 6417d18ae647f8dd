"""Stage 3: the tiny causal Wan transformer, teacher-forced, over windows of 3 to 18 past frames, with and without sink.

python -m training.denoiser --config training/configs/denoiser.toml
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from adastate_core.rope import Rope

from .bare_model import load_denoiser
from .host_models import build_denoiser
from .latents import load
from .loop import drawn_clips, train
from .parallel import Workers
from .returning_lantern import teacher_file
from .run import Run
from .teacher_forcing import ClipAttention, install, velocity
from .texts import texts_of
from .world import CHUNK_LATENTS


def draw_sigmas(batch: int, chunks: int, shift: float, full: float, generator: torch.Generator) -> torch.Tensor:
    """[B, chunks] noise levels: uniform, shifted as the sampler's, and exactly 1 with probability `full`."""
    u = torch.rand(batch, chunks, generator=generator)
    sigma = shift * u / (1 + (shift - 1) * u)
    return torch.where(torch.rand(batch, chunks, generator=generator) < full, 1.0, sigma)


def blurred_past(latents: torch.Tensor, share: float, most: float, generator: torch.Generator) -> torch.Tensor:
    """Clean frames with a little noise on a `share` of the chunks, which a rollout's own frames have as well."""
    batch, chunks = latents.shape[0], latents.shape[2] // CHUNK_LATENTS
    level = torch.rand(batch, chunks, generator=generator) * most
    level = level * (torch.rand(batch, chunks, generator=generator) < share)
    level = level.repeat_interleave(CHUNK_LATENTS, 1)[:, None, :, None, None]
    return (1 - level) * latents + level * torch.randn(latents.shape, generator=generator)


class ClipLoss(nn.Module):
    """Teacher forcing as a module; `forward` gives squared errors of v per chunk."""

    def __init__(self, model: nn.Module, config: dict, workers: Workers) -> None:
        super().__init__()
        self.model, self.config, self.workers, self.texts = model, config, workers, texts_of(config)
        install(model)

    def forward(self, latents: torch.Tensor, words: torch.Tensor, window: int, sink: int, seed: int) -> torch.Tensor:
        """Whole batches [B, 16, T, h, w] and [B, chunks, slots] to this process's errors [b, chunks].

        Everything random comes from `seed`.
        """
        config, generator = self.config, torch.Generator().manual_seed(seed)
        batch, _, frames, rows, columns = latents.shape
        sigma = draw_sigmas(batch, frames // CHUNK_LATENTS, config["shift"], config["full_noise"], generator)
        noise = torch.randn(latents.shape, generator=generator)
        context, mask = self.workers.condition(*self.texts.whole(words, config["drop_words"], generator))
        past = blurred_past(latents, config["blur_share"], config["blur_most"], generator)
        sigma = sigma.repeat_interleave(CHUNK_LATENTS, 1)
        latents, sigma, noise, past = (
            self.workers.share(t).to(self.workers.device) for t in (latents, sigma, noise, past)
        )
        rope = Rope(128, rows // 2, columns // 2, latents.device)
        clip = ClipAttention(rope, rows * columns // 4, frames, CHUNK_LATENTS, mask, window, sink)
        level = sigma[:, None, :, None, None]
        v = velocity(self.model, past, (1 - level) * latents + level * noise, sigma, context, clip)
        return (v - (noise - latents)).square().mean((1, 3, 4)).unflatten(1, (-1, CHUNK_LATENTS)).mean(-1)


def main() -> None:
    run = Run.from_arguments("Train the tiny causal Wan transformer.")
    config, workers = run.config, run.workers
    if "start_from" in config:  # an exported file: train on where another run ended, with a fresh optimiser
        start = Path(config["start_from"])
        model = load_denoiser(str(teacher_file(start) if config.get("from_history") else start))
    else:
        model = build_denoiser(config["dim"], config["ffn_dim"], config["layers"])
    losses = ClipLoss(model.to(run.device), config, workers)
    replicated = workers.replicate(losses)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    weight = torch.ones(latents.shape[2] // CHUNK_LATENTS, device=run.device)
    weight[0] = config["first_chunk_weight"]

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed)
        index = drawn_clips(len(latents), config["batch"], generator)
        window, sink = (pick(config[name], generator) for name in ("windows", "sinks"))
        errors = replicated(latents[index].float(), words[index], window, sink, seed)
        figures = {"plain": errors.mean().item(), "first": errors[:, 0].mean().item(), "window": window, "sink": sink}
        return (errors * weight).mean() / weight.mean(), figures

    train(run, model, step, lambda: evaluate(losses, *held_out))


def pick(choices: list[int], generator: torch.Generator) -> int:
    """One of `choices`, uniformly."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def evaluate(losses: ClipLoss, latents: torch.Tensor, words: torch.Tensor) -> dict[str, float]:
    """Held-out loss by window and sink, always on the same draws."""
    figures = {}
    for window, sink in ((3, 0), (3, 3), (18, 0)):
        parts = [
            losses(latents[i : i + 8].float(), words[i : i + 8], window, sink, seed=i)
            for i in range(0, min(32, len(latents)), 8)
        ]
        errors, name = torch.cat(parts).mean(0), f"w{window}s{sink}"
        figures |= {f"{name}_first": errors[0].item(), f"{name}_later": errors[1:].mean().item()}
    return figures


if __name__ == "__main__":
    main()
