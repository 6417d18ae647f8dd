"""The talking demo, 1: clips of the world that speaks, as latents, with what the ear hears and pictures to refer to.

    python3 run.py train talking_latents --config training/configs/talking_latents.toml

Clips go to files of a few dozen; a run that was stopped goes on with the next file. Of the `wrong` clips every other one is silent,
and each has a past beside it in which the balloon has a size, and in half of them a colour, that it should not have: what a rollout
may come to, and has to find back from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from adastate_core.audio.demo_ear import RATE, codes
from adastate_core.files.tensor_file import write_tensors
from adastate_core.geometry import WAN21

from .bare_model import load_codec
from .codec import encode_clip
from .latents import encode, unit_latents, word_numbers
from .run import Run, log
from .talking_world import TalkingScene, WrongBalloon
from .world import CHUNK_LATENTS, render

# pictures of a clip that may be its reference: the first one, and others from anywhere in it
REFERENCES = 4
# frames of a still clip whose two latents are a picture's: as a first frame, and as one that stands
_STILL = 5


@torch.no_grad()
def still_latents(encoder: Callable[[torch.Tensor], tuple], picture: torch.Tensor) -> torch.Tensor:
    """A picture [H, W, 3] in 0..1 to [2, 16, h, w]: its latent as a video's first frame, and that of a still clip later on."""
    pixels = picture.permute(2, 0, 1)[None, :, None].expand(-1, -1, _STILL, -1, -1) * 2 - 1
    return unit_latents(encoder(pixels)[0])[0].transpose(0, 1)


def clip(encoder: Callable[[torch.Tensor], tuple], seed: int, chunks: int) -> dict[str, torch.Tensor]:
    """Everything that is trained on of the scene of a seed."""
    return clip_of(encoder, TalkingScene.drawn(seed, chunks), seed, chunks)


def clip_of(
    encoder: Callable[[torch.Tensor], tuple], scene: TalkingScene, seed: int, chunks: int
) -> dict[str, torch.Tensor]:
    frames = WAN21.pictures(chunks * CHUNK_LATENTS)
    picks = torch.randint(frames, (REFERENCES,), generator=torch.Generator().manual_seed(seed))
    picks[0] = 0
    stills = [still_latents(encoder, picture) for picture in render(scene, picks)]
    return {
        "latents": encode(encoder, scene, chunks).half(),
        "references": torch.stack(stills).half(),
        "codes": codes(scene.waveform, RATE)[0].half(),
        "words": word_numbers(scene, chunks),
    }


def wrong_clip(encoder: Callable[[torch.Tensor], tuple], seed: int, chunks: int) -> dict[str, torch.Tensor]:
    """As `clip`, with a `past` [16, T, h, w] of the same scene whose balloon is another; every other one is silent."""
    scene, generator = TalkingScene.drawn(seed, chunks), torch.Generator().manual_seed(seed)
    scene = scene.hushed() if seed % 2 == 0 else scene
    past = encode(encoder, WrongBalloon.drawn_of(scene, generator), chunks)
    return clip_of(encoder, scene, seed, chunks) | {"past": past.half()}


def main() -> None:
    run = Run.from_arguments("Encode clips of the world that speaks.")
    config = run.config
    encoder = partial(encode_clip, load_codec(config["codec"]))
    kinds = (
        ("held_out", config["held_out"], 5_000_000, clip),
        ("train", config["clips"], 0, clip),
        ("wrong", config["wrong"], 8_000_000, wrong_clip),
    )
    for name, count, first, made in kinds:
        for start in range(0, count, config["clips_a_file"]):
            target = run.folder / f"{name}_{start:05d}.safetensors"
            if target.exists():
                continue
            begun = time.monotonic()
            seeds = range(first + start, first + min(count, start + config["clips_a_file"]))
            clips = [made(encoder, config["seed"] * 10_000_019 + seed, config["chunks"]) for seed in seeds]
            write_tensors(target, {key: torch.stack([c[key] for c in clips]) for key in clips[0]}, {})
            log.info("%s: %.2f s a clip", target.name, (time.monotonic() - begun) / len(clips))


def load(folder: str, name: str) -> dict[str, torch.Tensor]:
    """All clips `name` ("train", "held_out" or "wrong") that are there: latents [N, 16, T, h, w], references [N, 4, 2, 16, h, w],
    codes [N, T50, 12], words [N, chunks, slots]; of wrong ones the past [N, 16, T, h, w]. SystemExit where there are none."""
    parts = [load_file(path) for path in sorted(Path(folder).glob(f"{name}_*.safetensors"))]
    if not parts:
        raise SystemExit(f"there are no clips in {folder}; run the stage `talking_latents` first.")
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


if __name__ == "__main__":
    main()
