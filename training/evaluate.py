"""Stage 5: long rollouts of the exported pair, measured against the world, by five-second segments.

    python -m training.evaluate --config training/configs/evaluate.toml

Rolls out with the product's own rollout and cache layout; true renders through the same codec stand beside it.
"""

from __future__ import annotations

import json
import statistics

import torch

from adastate_core.anchors import Anchor
from adastate_core.demo_words import prompt
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedule import Schedule
from adastate_core.vae_stream import VaeStream, pictures_of

from . import measures
from .bare_model import BareModel, load_codec, load_denoiser
from .codec import decode_clip, encode_clip
from .host_models import LATENT_MEAN, LATENT_STD
from .run import Run, log
from .world import FPS, SIZE, Scene, render

SEGMENT = 5 * FPS


def rolled_out(model, codec, scene: Scene, seed: int, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [16, T, h, w] in model space, pictures [t, 64, 64, 3] in 0..1) of one stream."""
    bare = BareModel(model, prompt(scene.words(0)))
    spec = RolloutSpec(
        bare.geometry, 1, SIZE // 8, SIZE // 8, 3, config["window_frames"], Anchor(), "packed", torch.float32
    )
    rollout = Rollout(bare, spec, Settings(seed, Schedule.shifted(config["rollout_steps"], config["shift"])))
    latents = torch.cat([chunk.latents for chunk in rollout.chunks(config["latents"])], 2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    pictures = VaeStream(codec).step(latents * std + mean)[0]
    return latents[0], ((pictures + 1) / 2).clamp(0, 1)


def true_video(codec, scene: Scene, frames: int) -> torch.Tensor:
    """The world's own frames through the codec, [t, 64, 64, 3], in clips of 81."""
    parts = []
    for start in range(0, frames, 81):
        clip = render(scene, torch.arange(start, start + 81)).permute(3, 0, 1, 2)[None] * 2 - 1
        parts.append(decode_clip(codec, encode_clip(codec, clip)[0])[0].permute(1, 2, 3, 0))
    return ((torch.cat(parts)[:frames] + 1) / 2).clamp(0, 1)


def figures(video: torch.Tensor, scene: Scene) -> list[dict[str, float]]:
    """The measures of each five-second segment."""
    rows = []
    for segment in video.split(SEGMENT):
        if len(segment) < SEGMENT // 2:
            continue
        rows.append(
            {
                "balloon found": measures.balloon_found(segment, scene).float().mean().item(),
                "terrain right": measures.terrain_right(segment, scene).float().mean().item(),
                "pace right": measures.pace_right(segment, scene).float().mean().item(),
                "sharpness": measures.sharpness(segment).mean().item(),
                "motion": measures.motion(segment).mean().item(),
                "brightness": segment.mean().item(),
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Measure long rollouts.")
    config = run.config
    model, codec = load_denoiser(config["denoiser"]), load_codec(config["codec"])
    frames = pictures_of(config["latents"])
    ours, true, spread = [], [], []
    for i in range(config["streams"]):
        generator = torch.Generator().manual_seed(config["seed"] * 7_000_003 + i)
        scene = Scene.draw(generator, 1)
        latents, video = rolled_out(model, codec, scene, 1000 + i, config)
        ours.append(figures(video, scene))
        true.append(figures(true_video(codec, scene, frames), scene))
        spread.append([part.std().item() for part in latents.split(20, dim=1)])
        log.info("stream %d of %d: %s", i + 1, config["streams"], {k: round(v, 3) for k, v in ours[-1][-1].items()})
    segments = range(len(ours[0]))
    table = [
        {name: [statistics.mean(rows[s][name] for rows in source) for source in (ours, true)] for name in ours[0][0]}
        | {"latent std": [statistics.mean(row[s] for row in spread)]}
        for s in segments
    ]
    (run.folder / "evaluation.json").write_text(json.dumps(table, indent=1))
    names = list(table[0])
    lines = ["| seconds | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for s, row in enumerate(table):
        cells = [" / ".join(f"{v:.2f}" if v > 0.1 else f"{v:.4f}" for v in row[name]) for name in names]
        lines.append(f"| {5 * s}-{5 * s + 5} | " + " | ".join(cells) + " |")
    (run.folder / "evaluation.md").write_text("\n".join(lines) + "\n")
    log.info("rollout / true renders through the codec\n%s", "\n".join(lines))


if __name__ == "__main__":
    main()
