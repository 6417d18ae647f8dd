"""Make the README's pictures, frames spread over a video of the long_video workflow.

python -m tools.make_readme_picture long_video output/video/AdaState_00001_.mp4
python -m tools.make_readme_picture ten_minutes output/video/AdaState_00002_.mp4    # the same with length 9601
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from PIL import Image

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
# columns, rows, enlargement
GRIDS = {"long_video": (5, 2, 3), "ten_minutes": (10, 4, 2)}


def main(name: str, video: str) -> None:
    """Frames at equal distances over the whole video, row by row, enlarged without smoothing."""
    columns, rows, scale = GRIDS[name]
    count = columns * rows
    sheet: Image.Image | None = None
    with av.open(video) as container:
        total = container.streams.video[0].frames
        wanted = {i * (total - 1) // (count - 1): i for i in range(count)}
        for number, frame in enumerate(container.decode(video=0)):
            if number not in wanted:
                continue
            width, height = scale * frame.width, scale * frame.height
            sheet = sheet or Image.new("RGB", (columns * width, rows * height))
            place = wanted[number] % columns * width, wanted[number] // columns * height
            sheet.paste(frame.to_image().resize((width, height), Image.Resampling.NEAREST), place)
    IMAGES.mkdir(parents=True, exist_ok=True)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
