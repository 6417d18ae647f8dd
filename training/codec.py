"""Stage 1: the tiny causal Wan VAE, image-first, on the world's pictures.

    python -m training.codec --config training/configs/codec.toml

Trains through the host's own modules in a whole-clip form that equals their cached, chunked form
(`encode_clip`, `decode_clip`; tests/core/test_training.py compares the two).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from adastate_core.geometry import WAN21

from .host_models import LATENT_MEAN, LATENT_STD, build_codec
from .optim import Average, Optimiser
from .run import Run
from .world import Scene, render


def _resample(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A Wan `Resample` over a whole clip [B, C, T, H, W]: the first frame never meets the temporal convolution."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x.shape
        later = layer.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
        later = torch.stack((later[:, 0], later[:, 1]), 3).reshape(b, c, 2 * (t - 1), h, w)
        x = torch.cat((x[:, :, :1], later), 2)
    b, c, t, h, w = x.shape
    frames = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = frames.reshape(b, t, *frames.shape[1:]).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), 2)
    return x


def _through(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = _resample(layer, x) if hasattr(layer, "mode") else layer(x)
    return x


def encode_clip(codec: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 3, 1+4n, H, W] in -1..1 to mean and log variance, each [B, 16, 1+n, H/8, W/8]."""
    encoder = codec.encoder
    x = _through(encoder.downsamples, encoder.conv1(pixels))
    mean, log_variance = codec.conv1(_through(encoder.head, _through(encoder.middle, x))).chunk(2, dim=1)
    return mean, log_variance


def decode_clip(codec: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """[B, 16, 1+n, h, w] to [B, 3, 1+4n, 8h, 8w] in about -1..1."""
    decoder = codec.decoder
    x = _through(decoder.middle, decoder.conv1(codec.conv2(latents)))
    return _through(decoder.head, _through(decoder.upsamples, x))


def clip_batch(batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Random clips of the world, [B, 3, T, H, W] in -1..1."""
    clips = []
    for _ in range(batch):
        scene = Scene.draw(generator, chunks=12)
        start = int(torch.randint(0, 80, (1,), generator=generator))
        clips.append(render(scene, torch.arange(start, start + frames)))
    return torch.stack(clips).permute(0, 4, 1, 2, 3) * 2 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + half the L1 of spatial differences: the last keeps edges, which is where small sprites live."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def codec_losses(codec: nn.Module, clips: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction loss and KL divergence to a unit Gaussian; `noise` [B, 16, 1+n, h, w] draws the latents."""
    mean, log_variance = encode_clip(codec, clips)
    log_variance = log_variance.clamp(-12, 6)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    latents = mean + noise * (0.5 * log_variance).exp()
    return reconstruction_loss(decode_clip(codec, latents), clips), divergence


@torch.no_grad()
def psnr(codec: nn.Module, clips: torch.Tensor) -> float:
    """Mean over clips [B, 3, T, H, W] of the PSNR (dB, peak 1) of the means' reconstruction."""
    output = torch.cat([decode_clip(codec, encode_clip(codec, clip[None])[0]) for clip in clips]).clamp(-1, 1)
    error = ((output - clips) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def normalised(codec: nn.Module, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """The codec's weights with each latent channel shifted and scaled to Wan 2.1's published mean and std.

    The affine map goes into the two 1x1x1 convolutions, so the host's latent format then gives about mean 0, std 1.
    """
    means = torch.cat([encode_clip(codec, clip[None])[0] for clip in clips])
    mu, sd = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    scale = torch.tensor(LATENT_STD) / sd
    shift = torch.tensor(LATENT_MEAN) - mu * scale
    weights = {name: value.clone() for name, value in codec.state_dict().items()}
    weights["conv1.weight"][:16] *= scale.view(-1, 1, 1, 1, 1)
    weights["conv1.bias"][:16] = weights["conv1.bias"][:16] * scale + shift
    weights["conv1.bias"][16:] += 2 * scale.log()
    inward = weights["conv2.weight"] / scale.view(1, -1, 1, 1, 1)
    weights["conv2.bias"] -= (inward[:, :, 0, 0, 0] * shift).sum(1)
    weights["conv2.weight"] = inward
    return weights


def phase_of(config: dict, step: int) -> dict:
    """The phase (frames a clip, clips a batch) that a step falls in; phases are ordered by their last step."""
    return next(phase for phase in config["phases"] if step < phase["until"])


def main() -> None:
    run = Run.from_arguments("Train the tiny causal Wan VAE.")
    codec = build_codec(run.config["dim"])
    optimiser = Optimiser(codec, run.config["lr"], decay_from=run.config["decay_from"])
    average = Average(codec, run.config["ema"])
    run.resume(codec=codec, optimiser=optimiser, average=average)
    held_out = clip_batch(8, 33, torch.Generator().manual_seed(10_000_019))
    losses = partial(codec_losses, codec)
    if run.config["compile"]:
        losses = torch.compile(losses, dynamic=False)
    while run.step < run.steps:
        phase = phase_of(run.config, run.step)
        generator = torch.Generator().manual_seed(run.config["seed"] * 1_000_003 + run.step)
        clips = clip_batch(phase["batch"], phase["frames"], generator)
        batch, _, frames, height, width = clips.shape
        noise = torch.randn(WAN21.shape(batch, frames, height, width), generator=generator)
        loss, divergence = losses(clips, noise)
        (loss + run.config["kl"] * divergence).backward()
        norm = optimiser.step(run.done)
        average.update(codec)
        run.advance(loss=loss.item(), kl=divergence.item(), norm=norm, frames=phase["frames"])
        if run.step % run.config["evaluate_every"] == 0 or run.step == run.steps:
            evaluate(run, codec, average, held_out)


def evaluate(run: Run, codec: nn.Module, average: Average, held_out: torch.Tensor) -> None:
    """PSNR of the averaged weights on held-out clips; writes them, normalised, to `folder/codec.pt`."""
    weights = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.load_state_dict(average.shadow, strict=False)
    run.record(psnr=psnr(codec, held_out))
    sheet(codec, held_out, run.folder / "sheet.png")
    torch.save(normalised(codec, held_out), run.folder / "codec.pt")
    codec.load_state_dict(weights)


@torch.no_grad()
def sheet(codec: nn.Module, clips: torch.Tensor, path: Path) -> None:
    """A picture: of each of four clips, every fourth frame above its reconstruction."""
    from PIL import Image

    rows = []
    for clip in clips[:4]:
        output = decode_clip(codec, encode_clip(codec, clip[None])[0])[0].clamp(-1, 1)
        rows += [torch.cat(list(video[:, ::4].unbind(1)), -1) for video in (clip, output)]
    picture = ((torch.cat(rows, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    scale = math.ceil(1200 / picture.shape[1])
    Image.fromarray(picture).resize((picture.shape[1] * scale, picture.shape[0] * scale), 0).save(path)


if __name__ == "__main__":
    main()
