"""What a student makes, as a picture to look at: a few short rollouts by the product's own code, decoded."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from adastate_core.anchors import anchor_from
from adastate_core.decode.wan_vae import VaeStream
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule

from .bare_model import BareModel, load_codec, load_denoiser
from .host_models import LATENT_MEAN, LATENT_STD
from .texts import texts_of
from .world import CHUNK_LATENTS

# frames shown of every video, and the height at which small ones are shown
SHOWN, HEIGHT = 8, 128


def decoded(codec: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [t, H, W, 3] in 0..1 of the model's latents [16, n, h, w], on the CPU; [B, t, H, W, 3] of a batch of them."""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    raw = (latents * std + mean).to(next(codec.parameters()).device)
    pictures = VaeStream(codec).step(raw if raw.dim() == 5 else raw[None]).cpu()
    return ((pictures if raw.dim() == 5 else pictures[0]) + 1).div(2).clamp(0, 1)


def draw_sheet(videos: list[torch.Tensor], path: Path) -> None:
    """One row of frames for every video [t, H, W, 3]."""
    rows = [torch.cat(list(video[:: max(1, len(video) // SHOWN)][:SHOWN]), 1) for video in videos]
    picture = Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
    factor = max(1, HEIGHT // videos[0].shape[1])
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def sample_sheet(
    weights: Path, config: dict, words: torch.Tensor, size: tuple[int, int], path: Path, device: torch.device
) -> None:
    """Roll `weights` out for the conditions words [N, chunks, slots] (each one's first chunk's, throughout) and draw it.

    `config` gives the rollout's settings and the `codec`; `size` is a latent frame's height and width.
    """
    bare = BareModel(load_denoiser(str(weights)).to(device), texts_of(config).context(words[:, 0]))
    spec = RolloutSpec(
        bare.geometry, len(words), *size, CHUNK_LATENTS, config["window_frames"], anchor_from(config["anchor"]),
        config["positions"], torch.float32,
    )  # fmt: skip
    settings = Settings(config["seed"], Schedule.shifted(config.get("rollout_steps", 4), config["shift"]))
    length = words.shape[1] * CHUNK_LATENTS
    chunks = Rollout(bare, spec, settings, length=length).chunks(length)
    codec = load_codec(config["codec"]).to(device)
    draw_sheet([decoded(codec, one) for one in torch.cat([c.latents for c in chunks], 2)], path)
