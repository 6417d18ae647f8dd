"""Make workflows/<title>.jpg, the picture on a workflow's card in the template browser: frames, or what else it is for.

    python -m tools.make_thumbnails                        # run every workflow as it is shipped, and make all pictures
    python -m tools.make_thumbnails long_video sampler     # run some
    python -m tools.make_thumbnails long_video --video take.mp4  # take the frames from a video that is there already

CARDS names those that show something else than frames. Run it again, from the checkout's root, whenever the demo weights change.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from tools.help_runs import PAPER, Run, written
from tools.host_client import Server, run_prompt
from tools.made_chain import CLIP, NAME, write_chain
from tools.make_workflows import running_host
from tools.setup_host import SetupError, say
from tools.workflow_titles import API, thumbnail, twin

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


def on_card(picture: Image.Image, paper: str) -> Image.Image:
    """A whole picture on a square of this colour, at its top if it is lower than wide, its top if it is higher."""
    small = picture.resize((SIDE, SIDE * picture.height // picture.width), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (SIDE, SIDE), paper)
    sheet.paste(small, (0, max(0, (SIDE - small.height) // 2)))
    return sheet


def plot_card(number: str) -> Callable[[Run], Image.Image]:
    """The plot that a node shows."""
    return lambda run: on_card(Image.open(run.file(number)).convert("RGB"), "white")


def text_card(run: Run) -> Image.Image:
    """The plan, as far as it fits."""
    text = written(run.text("7"))
    return on_card(text.crop((0, 0, text.width, min(text.width, text.height))), PAPER)


def picture_card(run: Run) -> Image.Image:
    """What was given, framed, and what becomes of it."""
    sheet, cell = frame_grid(run.file("11")), SIDE // GRID
    with Image.open(run.folders["input"] / "example.png") as given:
        sheet.paste(given.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (0, 0))
    ImageDraw.Draw(sheet).rectangle((0, 0, cell - 1, cell - 1), outline="white", width=8)
    return sheet


def frames_card(run: Run) -> Image.Image:
    """Frames under the names of their files."""
    sheet, cell, font = frame_grid(run.file("5")), SIDE // GRID, ImageFont.load_default(26)
    draw = ImageDraw.Draw(sheet)
    for i in range(GRID * GRID):
        x, y = i % GRID * cell, i // GRID * cell
        draw.rectangle((x, y + cell - 38, x + cell, y + cell), fill="black")
        draw.text((x + 12, y + cell - 36), f"{170 * i:06d}.png", fill="white", font=font)
    return sheet


def state_card(run: Run) -> Image.Image:
    """Frames above, the hidden state below."""
    sheet = frame_grid(run.file("7"))
    with Image.open(run.file("9")) as state:
        below = on_card(state.convert("RGB"), "black").crop((0, 0, SIDE, SIDE)).resize((SIDE // 2, SIDE // 2))
    sheet.paste("black", (0, SIDE // 2, SIDE, SIDE))
    sheet.paste(below, (SIDE // 4, SIDE // 2))
    return sheet


# what a workflow is for, where that is not the look of its video
CARDS = {
    "start_from_picture": picture_card,
    "stream_to_frames": frames_card,
    "inspect_and_plan": text_card,
    "measure_any_video": plot_card("3"),
    "video_metrics": plot_card("9"),
    "hidden_state": state_card,
    "absorption": plot_card("8"),
}


def run_of(server: Server, folder: Path, name: str) -> Run:
    """Run a workflow whose host has its files in `folder`."""
    prompt = json.loads(twin(name).read_text(encoding="utf-8"))
    if name == "measure_any_video":
        write_chain(folder / "input")
        prompt["1"]["inputs"]["file"] = NAME
        prompt["2"]["inputs"] |= {"clip_frames": CLIP, "first_clip_frames": CLIP + 1}
    entry = run_prompt(server, prompt)
    if entry["status"]["status_str"] != "success":
        raise SetupError(f"{name} did not run; the host's log is {server.log}", code=1)
    folders = {kind: folder / kind for kind in ("input", "output", "temp")}
    return Run(entry["outputs"], folders)


def video_of(run: Run, name: str) -> Path:
    """The longest video that a run left in the output folder, of those that Save Video wrote if any."""
    prompt, outputs = json.loads(twin(name).read_text(encoding="utf-8")), run.outputs
    savers = {node for node in outputs if prompt[node]["class_type"] == "SaveVideo"}
    files = [
        run.folders["output"] / file["subfolder"] / file["filename"]
        for number, node in outputs.items()
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
    known = sorted(path.stem for path in API.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(known))
    parser.add_argument("--video", type=Path, help="a finished video instead of a run, for one of them")
    options = parser.parse_args(arguments)
    names = options.names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no workflows/api/{unknown[0]}.json; there are: {', '.join(known)}")
    if options.video and len(names) != 1:
        parser.error("--video is for one workflow; name it")
    try:
        if options.video:
            if not options.video.is_file():
                raise SetupError(f"there is no video {options.video}")
            write(names[0], frame_grid(options.video))
            return 0
        with tempfile.TemporaryDirectory() as folder, running_host(Path(folder)) as server:
            for name in names:
                run = run_of(server, Path(folder), name)
                write(name, CARDS[name](run) if name in CARDS else frame_grid(video_of(run, name)))
    except SetupError as error:
        say(f"make_thumbnails: {error}")
        return error.code
    return 0


def write(name: str, sheet: Image.Image) -> None:
    """The picture of one workflow."""
    path = thumbnail(name)
    for quality in (90, 80, 70):
        sheet.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    say(f"workflows/{path.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
