"""Make docs/images/ten_minutes.png, the README's picture, from a video of the long_video workflow with length 9601.

python -m tools.make_readme_picture output/video/AdaState_00001_.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "ten_minutes.png"
COLUMNS, ROWS, SCALE = 10, 4, 2


def main(video: str) -> None:
    """Frames at equal distances over the whole video, row by row, enlarged without smoothing."""
    count = COLUMNS * ROWS
    sheet: Image.Image | None = None
    with av.open(video) as container:
        total = container.streams.video[0].frames
        wanted = {i * (total - 1) // (count - 1): i for i in range(count)}
        for number, frame in enumerate(container.decode(video=0)):
            if number not in wanted:
                continue
            width, height = SCALE * frame.width, SCALE * frame.height
            sheet = sheet or Image.new("RGB", (COLUMNS * width, ROWS * height))
            place = wanted[number] % COLUMNS * width, wanted[number] // COLUMNS * height
            sheet.paste(frame.to_image().resize((width, height), Image.Resampling.NEAREST), place)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
