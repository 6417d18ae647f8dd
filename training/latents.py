"""Stage 2: clips of the world as latents, made once, so that the transformer's steps see nothing but themselves.

python -m training.latents --config training/configs/latents.toml
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import load_file

from adastate_core.files.tensor_file import write_tensors
from adastate_core.geometry import WAN21
from adastate_core.prompts.demo_words import VOCABULARY

from .codec import encode_clip
from .host_models import LATENT_MEAN, LATENT_STD, build_codec
from .run import Run, log
from .world import CHUNK_LATENTS, Scene, render


def word_numbers(scene: Scene, chunks: int) -> torch.Tensor:
    """[chunks, slots] int64: each chunk's words as indices into the vocabulary."""
    rows = [[VOCABULARY[slot].index(word) for slot, word in scene.words(i).items()] for i in range(chunks)]
    return torch.tensor(rows)


@torch.no_grad()
def encode(encoder: Callable[[torch.Tensor], tuple], scene: Scene, chunks: int) -> torch.Tensor:
    """A scene's first `chunks` chunks in the model's latent space: [16, 3 * chunks, h, w] float32.

    `encoder` maps pixels to (mean, log variance), as `partial(encode_clip, codec)` does.
    """
    frames = WAN21.pictures(chunks * CHUNK_LATENTS)
    pixels = render(scene, torch.arange(frames)).permute(3, 0, 1, 2)[None] * 2 - 1
    return unit_latents(encoder(pixels)[0])[0]


def unit_latents(raw: torch.Tensor) -> torch.Tensor:
    """What the VAE gives, [B, 16, T, h, w], in the model's latent space."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    return (raw - mean) / std


def main() -> None:
    run = Run.from_arguments("Encode clips of the world.")
    codec = build_codec(run.config["dim"])
    codec.load_state_dict(torch.load(run.config["codec"], weights_only=True))
    encoder = torch.compile(partial(encode_clip, codec), dynamic=False)
    chunks, seed = run.config["chunks"], run.config["seed"]
    for name, count in (("train", run.config["clips"]), ("held_out", run.config["held_out"])):
        target = run.folder / f"{name}.safetensors"
        if target.exists():
            continue
        latents, words, start = [], [], time.monotonic()
        for i in range(count):
            offset = seed * 10_000_019 + i + (0 if name == "train" else 5_000_000)
            scene = Scene.draw(torch.Generator().manual_seed(offset), chunks)
            latents.append(encode(encoder, scene, chunks).half())
            words.append(word_numbers(scene, chunks))
            if (i + 1) % 200 == 0:
                log.info("%s: %d of %d clips, %.3f s a clip", name, i + 1, count, (time.monotonic() - start) / (i + 1))
        write_tensors(target, {"latents": torch.stack(latents), "words": torch.stack(words)}, {})


def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [N, 16, T, h, w] float16, words [N, chunks, slots] int64); no latents where there are prompts alone."""
    tensors = load_file(path)
    return tensors.get("latents", torch.empty(0)), tensors["words"]


if __name__ == "__main__":
    main()
