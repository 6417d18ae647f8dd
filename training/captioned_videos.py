"""Stage 0 for real models: captioned videos, or captions alone, as the latents and prompts that the other stages read.

    python3 run.py train captioned_videos --config training/configs/wan_1_3b_data.toml

`videos` is a folder of `name.mp4` with `name.txt` beside each (its caption); without it `prompts` is a text file with
one prompt a line, which is all that distribution matching needs. Text encoder and VAE are loaded by the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from adastate_core.files.tensor_file import write_tensors
from adastate_core.geometry import WAN21

from .host_models import LATENT_MEAN, LATENT_STD, use_host
from .run import Run, log
from .world import CHUNK_LATENTS


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """(video, caption) of every mp4 with a text file beside it, by name; ValueError if there is none."""
    pairs = [(video, video.with_suffix(".txt")) for video in sorted(folder.glob("*.mp4"))]
    found = [(video, text.read_text().strip()) for video, text in pairs if text.is_file()]
    if not found:
        raise ValueError(f"{folder} holds no NAME.mp4 with a NAME.txt beside it; the text is the video's caption")
    return found


def pictures(video: Path, frames: int, fps: float, height: int, width: int) -> torch.Tensor | None:
    """[frames, height, width, 3] float32 in 0..1 from the start of `video`, at `fps`, cut to shape from the middle;
    None if it is too short."""
    import av
    import torch.nn.functional as F

    from adastate_core.video.colour import rgb

    taken: list[torch.Tensor] = []
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            # a frame stands until the next one comes, so slow videos repeat frames and fast ones lose some
            while len(taken) < frames and frame.time >= len(taken) / fps - 1e-6:
                taken.append(torch.from_numpy(rgb(frame)))
            if len(taken) == frames:
                break
    if len(taken) < frames:
        return None
    clip = torch.stack(taken).permute(0, 3, 1, 2).float() / 255
    scale = max(height / clip.shape[2], width / clip.shape[3])
    size = (max(height, round(clip.shape[2] * scale)), max(width, round(clip.shape[3] * scale)))
    clip = F.interpolate(clip, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return clip[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).clamp(0, 1)


def ragged(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings [n, 4096] of all prompts end to end, without the zeros that the encoder pads them with."""
    kept = [text[: int(text.abs().amax(-1).nonzero().max()) + 1] for text in texts]
    return {
        "tokens": torch.cat(kept).half().contiguous(),
        "lengths": torch.tensor([len(text) for text in kept]),
        "padded_to": torch.tensor(len(texts[0])),
    }


class HostModels:
    """The text encoder and the VAE, each loaded when it is first wanted."""

    def __init__(self, config: dict) -> None:
        use_host()
        self.config, self._clip, self._vae = config, None, None

    def embeddings(self, texts: list[str]) -> Iterator[torch.Tensor]:
        """[tokens, 4096] of each text."""
        import comfy.sd

        if self._clip is None:
            self._clip = comfy.sd.load_clip([self.config["text_encoder"]], clip_type=comfy.sd.CLIPType.WAN)
        for text in texts:
            yield self._clip.encode_from_tokens(self._clip.tokenize(text))[0].cpu().float()

    def latents(self, clip: torch.Tensor) -> torch.Tensor:
        """Pictures [t, H, W, 3] to the model's latents [16, T, H / 8, W / 8]."""
        import comfy.sd
        import comfy.utils

        if self._vae is None:
            self._vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(self.config["vae"]))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
        return ((self._vae.encode(clip).cpu().float() - mean) / std)[0]


def write_clips(config: dict, models: HostModels, pairs: list[tuple[Path, str]], folder: Path) -> None:
    """`train.safetensors` and `held_out.safetensors`: latents, and for every chunk the number of the clip's caption."""
    frames, (height, width) = WAN21.pictures(config["latent_frames"]), config["size"]
    latents, numbers = [], []
    for number, (video, _) in enumerate(pairs):
        clip = pictures(video, frames, config["fps"], height, width)
        if clip is None:
            log.warning("%s is shorter than %d frames at %g fps; left out", video.name, frames, config["fps"])
            continue
        latents.append(models.latents(clip).half())
        numbers.append(number)
        log.info("%d of %d videos", number + 1, len(pairs))
    held = config["held_out"]
    if len(latents) <= held:
        raise ValueError(f"{len(latents)} videos are long enough; held_out = {held} of them leaves none to train on")
    for name, part in (("held_out", slice(0, held)), ("train", slice(held, None))):
        words = torch.tensor(numbers[part]).view(-1, 1, 1).expand(-1, config["latent_frames"] // CHUNK_LATENTS, 1)
        write_tensors(folder / f"{name}.safetensors", {"latents": torch.stack(latents[part]), "words": words}, {})


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Encode captioned videos.")
    config, models = run.config, HostModels(run.config)
    if "videos" in config:
        pairs = captioned(Path(config["videos"]))
        texts = [caption for _, caption in pairs]
        write_clips(config, models, pairs, run.folder)
    else:
        texts = [line.strip() for line in Path(config["prompts"]).read_text().splitlines() if line.strip()]
        chunks = config["latent_frames"] // CHUNK_LATENTS
        words = torch.arange(len(texts)).view(-1, 1, 1).expand(-1, chunks, 1)
        write_tensors(run.folder / "train.safetensors", {"words": words}, {})
    every = list(models.embeddings([*texts, config["negative_prompt"]]))
    write_tensors(run.folder / "texts.safetensors", ragged(every), {})
    log.info("%d prompts in %s", len(texts), run.folder)


if __name__ == "__main__":
    main()
