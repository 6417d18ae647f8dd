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
from .optim import Average, Optimiser
from .run import Run
from .teacher_forcing import KEY, WholeClipAttention, install, text_mask, word_table
from .world import CHUNK_LATENTS


def clip_velocity(model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """v of whole clips x [B, 16, T, h, w] at `sigma` [B]; `mask` [B, chunks, words] are the words of every chunk."""
    frames, rows, columns = x.shape[2:]
    rope = Rope(model.dim // model.num_heads, rows // 2, columns // 2, x.device)
    attention = WholeClipAttention(rope, rows * columns // 4, frames, CHUNK_LATENTS, mask.to(x.device))
    context = word_table().to(x).expand(x.shape[0], -1, -1)
    return model.forward_orig(x, 1000 * sigma, context, freqs=None, transformer_options={KEY: attention})


def clip_errors(model: nn.Module, latents: torch.Tensor, words: torch.Tensor, config: dict, seed: int) -> torch.Tensor:
    """Squared errors of v per chunk, [B, chunks]; one shifted noise level a clip; everything random from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(len(latents), generator=generator)
    sigma = config["shift"] * u / (1 + (config["shift"] - 1) * u)
    level, noise = sigma.view(-1, 1, 1, 1, 1), torch.randn(latents.shape, generator=generator)
    mask = text_mask(words, config["drop_words"], generator)
    v = clip_velocity(model, (1 - level) * latents + level * noise, sigma, mask)
    return (v - (noise - latents)).square().mean((1, 3, 4)).unflatten(1, (-1, CHUNK_LATENTS)).mean(-1)


def main() -> None:
    run = Run.from_arguments("Train the whole-clip score model.")
    config = run.config
    model = load_denoiser(config["start_from"])
    install(model)
    optimiser = Optimiser(model, config["lr"], warmup=config["warmup"], decay_from=config["decay_from"])
    average = Average(model, config["ema"])
    run.resume(model=model, optimiser=optimiser, average=average)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    while run.step < run.steps:
        seed = config["seed"] * 1_000_003 + run.step
        index = torch.randint(len(latents), (config["batch"],), generator=torch.Generator().manual_seed(seed))
        errors = clip_errors(model, latents[index].float(), words[index], config, seed)
        errors.mean().backward()
        norm = optimiser.step(run.done)
        average.update(model)
        run.advance(loss=errors.mean().item(), norm=norm)
        if run.step % config["evaluate_every"] == 0 or run.step == run.steps:
            with average.used_by(model), torch.no_grad():
                torch.save(model.state_dict(), run.folder / "model.pt")
                held = clip_errors(model, held_out[0].float(), held_out[1], config | {"drop_words": 0.0}, 77)
            run.record(held_out=held.mean().item())


if __name__ == "__main__":
    main()
