"""Stage 5: a transformer that sees whole clips, for the teacher and the first critic of distribution matching.

    python3 run.py train score_model --config training/configs/score_model.toml

Bidirectional attention over all frames at one noise level, as in the models that Self-Forcing scores with. It starts
from the causal one: the weights have the same names and shapes.
"""

from __future__ import annotations

import torch
from torch import nn

from adastate_core.rope import Rope

from .bare_model import load_denoiser
from .latents import load
from .loop import drawn_clips, train
from .parallel import Workers
from .run import Run
from .teacher_forcing import KEY, WholeClipAttention, install
from .texts import texts_of
from .world import CHUNK_LATENTS


def clip_velocity(
    model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """v of whole clips x [B, 16, T, h, w] at `sigma` [B]; context [1 or B, n, 4096], of which every chunk sees what
    `mask` [B, chunks, n] says (None: all)."""
    frames, rows, columns = x.shape[2:]
    rope = Rope(model.dim // model.num_heads, rows // 2, columns // 2, x.device)
    attention = WholeClipAttention(rope, rows * columns // 4, frames, CHUNK_LATENTS, mask)
    context = context.to(x).expand(x.shape[0], -1, -1)
    return model.forward_orig(x, 1000 * sigma, context, freqs=None, transformer_options={KEY: attention})


class ClipScore(nn.Module):
    """The score model's loss as a module; `forward` gives squared errors of v per chunk."""

    def __init__(self, model: nn.Module, config: dict, workers: Workers) -> None:
        super().__init__()
        self.model, self.config, self.workers, self.texts = model, config, workers, texts_of(config)
        install(model)

    def forward(self, latents: torch.Tensor, words: torch.Tensor, seed: int, drop_words: float) -> torch.Tensor:
        """Whole batches [B, 16, T, h, w] and [B, chunks, slots] to this process's errors [b, chunks].

        One shifted noise level a clip; everything random from `seed`.
        """
        generator, shift = torch.Generator().manual_seed(seed), self.config["shift"]
        u = torch.rand(len(latents), generator=generator)
        sigma, noise = shift * u / (1 + (shift - 1) * u), torch.randn(latents.shape, generator=generator)
        context, mask = self.workers.condition(*self.texts.whole(words, drop_words, generator))
        latents, sigma, noise = (self.workers.share(t).to(self.workers.device) for t in (latents, sigma, noise))
        level = sigma.view(-1, 1, 1, 1, 1)
        v = clip_velocity(self.model, (1 - level) * latents + level * noise, sigma, context, mask)
        return (v - (noise - latents)).square().mean((1, 3, 4)).unflatten(1, (-1, CHUNK_LATENTS)).mean(-1)


def main() -> None:
    run = Run.from_arguments("Train the whole-clip score model.")
    config = run.config
    scored = ClipScore(load_denoiser(config["start_from"]).to(run.device), config, run.workers)
    replicated = run.workers.replicate(scored)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = drawn_clips(len(latents), config["batch"], torch.Generator().manual_seed(seed))
        return replicated(latents[index].float(), words[index], seed, config["drop_words"]).mean(), {}

    def evaluate() -> dict[str, float]:
        return {"held_out": scored(held_out[0].float(), held_out[1], 77, 0.0).mean().item()}

    train(run, scored.model, step, evaluate)


if __name__ == "__main__":
    main()
