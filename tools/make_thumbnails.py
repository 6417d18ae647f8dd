"""Make workflows/<name>.jpg, the picture on a workflow's card in the template browser, from frames of its video.

    python -m tools.make_thumbnails                        # run every workflow as it is shipped, and make all pictures
    python -m tools.make_thumbnails long_video             # run one
    python -m tools.make_thumbnails long_video take.mp4    # take the frames from a video that is there already

Run it again, from the checkout's root, whenever the demo weights change.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import av
from PIL import Image

from tools.host_client import Server, run_prompt
from tools.make_workflows import WORKFLOWS, running_host
from tools.setup_host import SetupError, say

SIDE = 512  # the cards are square
GRID = 2
LARGEST = 32_000  # bytes of a picture, if quality 70 gets it there


def frame_grid(video: Path) -> Image.Image:
    """Frames spread over the whole video, row by row; small ones are enlarged without smoothing.

    Of a wide video, such as a comparison of four, whole frames one below the other; of one that is hardly wider than high the
    middle; of those in between, such as a comparison of two, whole frames with a border.
    """
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    count = GRID * GRID
    cell = SIDE // GRID
    sheet = Image.new("RGB", (SIDE, SIDE))
    if frames[0].width >= 1.5 * frames[0].height:
        rows = max(1, min(count, SIDE * frames[0].width // (frames[0].height * SIDE)))
        for i in range(rows):
            frame = frames[(i + 1) * (len(frames) - 1) // rows]
            fitting = min(SIDE / frame.width, SIDE / rows / frame.height)
            small = frame.resize((int(frame.width * fitting), int(frame.height * fitting)), Image.Resampling.LANCZOS)
            sheet.paste(small, ((SIDE - small.width) // 2, SIDE * i // rows + (SIDE // rows - small.height) // 2))
        return sheet
    for i in range(count):
        frame = frames[i * (len(frames) - 1) // (count - 1)]
        side = max(frame.size) if frame.width >= 1.2 * frame.height else min(frame.size)
        left, top = (frame.width - side) // 2, (frame.height - side) // 2
        square = frame.crop((left, top, left + side, top + side))
        smooth = Image.Resampling.LANCZOS if side > cell else Image.Resampling.NEAREST
        sheet.paste(square.resize((cell, cell), smooth), (i % GRID * cell, i // GRID * cell))
    return sheet


def video_of(server: Server, output: Path, name: str) -> Path:
    """Run a workflow; the longest video that it left in the output folder, of those that Save Video wrote if any."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    entry = run_prompt(server, prompt)
    if entry["status"]["status_str"] != "success":
        raise SetupError(f"{name} did not run; the host's log is {server.log}", code=1)
    savers = {node for node in entry["outputs"] if prompt[node]["class_type"] == "SaveVideo"}
    files = [
        output / file["subfolder"] / file["filename"]
        for number, node in entry["outputs"].items()
        if not savers or number in savers
        for entries in node.values()
        for file in entries
        if isinstance(file, dict) and file.get("type") == "output" and file["filename"].endswith(".mp4")
    ]
    return max(files, key=frame_count)


def frame_count(video: Path) -> int:
    """How many frames a video holds."""
    with av.open(str(video)) as container:
        return container.streams.video[0].frames


def main(arguments: list[str]) -> int:
    """Make the pictures asked for."""
    known = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=known, help="one workflow instead of all")
    parser.add_argument("video", nargs="?", type=Path, help="a finished video instead of a run")
    options = parser.parse_args(arguments)
    names = [options.name] if options.name else known
    try:
        if options.video:
            if not options.video.is_file():
                raise SetupError(f"there is no video {options.video}")
            write(options.name, options.video)
            return 0
        with tempfile.TemporaryDirectory() as folder, running_host(Path(folder)) as server:
            for name in names:
                write(name, video_of(server, Path(folder) / "output", name))
    except SetupError as error:
        say(f"make_thumbnails: {error}")
        return error.code
    return 0


def write(name: str, video: Path) -> None:
    """The picture of one workflow."""
    path, sheet = WORKFLOWS / f"{name}.jpg", frame_grid(video)
    for quality in (90, 80, 70):
        sheet.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    say(f"workflows/{name}.jpg")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
