"""Make docs/images/long_video.png, the README's picture, from a video of the long_video workflow.

python -m tools.make_readme_picture output/video/AdaState_00001_.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from PIL import Image

COLUMNS, ROWS, SCALE = 5, 2, 3
TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "long_video.png"


def main(video: str) -> None:
    """Ten frames spread over the video, enlarged without smoothing."""
    with av.open(video) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    count = COLUMNS * ROWS
    width, height = (SCALE * side for side in frames[0].size)
    sheet = Image.new("RGB", (COLUMNS * width, ROWS * height))
    for i in range(count):
        frame = frames[i * (len(frames) - 1) // (count - 1)].resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(frame, (i % COLUMNS * width, i // COLUMNS * height))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
