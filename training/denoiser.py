"""Stage 3: the tiny causal Wan transformer, teacher-forced, over windows of 3 to 18 past frames, with and without sink.

python -m training.denoiser --config training/configs/denoiser.toml
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from adastate_core.rope import Rope

from .host_models import build_denoiser
from .latents import load
from .optim import Average, Optimiser
from .run import Run
from .teacher_forcing import ClipAttention, install, text_mask, velocity
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


def clip_loss(
    model: nn.Module, latents: torch.Tensor, words: torch.Tensor, config: dict, window: int, sink: int, seed: int
) -> torch.Tensor:
    """Mean squared error of v per chunk, [B, chunks]; everything random comes from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, frames, rows, columns = latents.shape
    chunks = frames // CHUNK_LATENTS
    sigma = draw_sigmas(batch, chunks, config["shift"], config["full_noise"], generator)
    sigma = sigma.repeat_interleave(CHUNK_LATENTS, 1)
    level = sigma[:, None, :, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    clip = ClipAttention(
        rope=Rope(128, rows // 2, columns // 2),
        tokens=rows * columns // 4,
        frames=frames,
        chunk_frames=CHUNK_LATENTS,
        window_frames=window,
        sink_frames=sink,
        text_mask=text_mask(words, config["drop_words"], generator),
    )
    past = blurred_past(latents, config["blur_share"], config["blur_most"], generator)
    v = velocity(model, past, (1 - level) * latents + level * noise, sigma, clip)
    return (v - (noise - latents)).square().mean((1, 3, 4)).unflatten(1, (chunks, -1)).mean(-1)


def main() -> None:
    run = Run.from_arguments("Train the tiny causal Wan transformer.")
    config = run.config
    model = build_denoiser(config["dim"], config["ffn_dim"], config["layers"])
    if "start_from" in config:  # an exported file: train on where another run ended, with a fresh optimiser
        model.load_state_dict({name: value.float() for name, value in load_file(config["start_from"]).items()})
    install(model)
    optimiser = Optimiser(model, config["lr"], decay_from=config["decay_from"])
    average = Average(model, config["ema"])
    run.resume(model=model, optimiser=optimiser, average=average)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])
    weight = torch.ones(latents.shape[2] // CHUNK_LATENTS)
    weight[0] = config["first_chunk_weight"]
    while run.step < run.steps:
        seed = config["seed"] * 1_000_003 + run.step
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(latents), (config["batch"],), generator=generator)
        window, sink = (pick(config[name], generator) for name in ("windows", "sinks"))
        losses = clip_loss(model, latents[index].float(), words[index], config, window, sink, seed)
        ((losses * weight).mean() / weight.mean()).backward()
        norm = optimiser.step(run.done)
        average.update(model)
        run.advance(loss=losses.mean().item(), first=losses[:, 0].mean().item(), norm=norm, window=window, sink=sink)
        if run.step % config["evaluate_every"] == 0 or run.step == run.steps:
            evaluate(run, model, average, *held_out)


def pick(choices: list[int], generator: torch.Generator) -> int:
    """One of `choices`, uniformly."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, average: Average, latents: torch.Tensor, words: torch.Tensor) -> None:
    """Held-out loss of the averaged weights by window, always on the same draws; writes them to `folder/model.pt`."""
    figures = {}
    with average.used_by(model):
        torch.save(model.state_dict(), run.folder / "model.pt")
        for window, sink in ((3, 0), (3, 3), (18, 0)):
            losses = torch.cat(
                [
                    clip_loss(model, latents[i : i + 8].float(), words[i : i + 8], run.config, window, sink, seed=i)
                    for i in range(0, min(32, len(latents)), 8)
                ]
            ).mean(0)
            name = f"w{window}s{sink}"
            figures |= {f"{name}_first": losses[0].item(), f"{name}_later": losses[1:].mean().item()}
    run.record(**figures)


if __name__ == "__main__":
    main()
