"""A world to look at, and how well a codec keeps it.

    python3 run.py train world_sheet --config training/configs/journey/latents.toml --out training/results/journey/world.png

One row a stream, from its first picture to half a minute later; below each, what the codec makes of the training horizon. Logs the
codec's PSNR on 8 clips of 33 pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .codec import decode_clip, encode_clip, psnr
from .latents import codec_of
from .run import Run, log
from .small_pictures import write_picture
from .worlds import world_of

STREAMS = 3
FAR, NEAR = torch.tensor([0, 40, 80, 160, 240, 320, 400, 480]), torch.tensor([0, 12, 24, 36, 48, 56, 68, 80])


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Draw a world.", {"out": Path})
    world, codec = world_of(run.config), codec_of(run.config)
    scenes = [world.Scene.draw(torch.Generator().manual_seed(90_000_000 + i), 41) for i in range(8)]
    clips = torch.stack([world.render(scene, torch.arange(33)).permute(3, 0, 1, 2) * 2 - 1 for scene in scenes])
    log.info("the codec's PSNR: %.1f dB", psnr(codec, clips))
    rows = []
    for scene in scenes[:STREAMS]:
        near = world.render(scene, torch.arange(81)).permute(3, 0, 1, 2)[None] * 2 - 1
        kept = (decode_clip(codec, encode_clip(codec, near)[0])[0].permute(1, 2, 3, 0) + 1) / 2
        rows += [torch.cat(list(part), 1) for part in (world.render(scene, FAR), kept[NEAR].clamp(0, 1))]
    sheet = Image.fromarray((torch.cat(rows) * 255).byte().numpy())
    path = run.config.get("out", run.folder / "world.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST), path)


if __name__ == "__main__":
    main()
