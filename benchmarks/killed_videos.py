"""Which frames of a growing video play after kill -9, by codec.

    python -m benchmarks.killed_videos [CODEC ...] [--kills 5] [--out benchmarks/results/killed-videos.md]

A process writes chunks of twelve frames and says after each how many it has handed over. It is killed at a moment of its own, often
within a chunk. The file is then decoded from its beginning to its end, as it lies there. Frames that play may be more than those
told: the chunk under way. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import av
import torch

from adastate_core.video.encoder import CODECS
from adastate_core.video.frame_folder import FrameFolder, FrameSequence
from adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_core.video.sink import VideoSink

WIDTH, HEIGHT, CHUNK = 320, 192, 12


def moving(frames: int, start: int) -> torch.Tensor:
    """float32 [frames, height, width, 3]: drifting waves under a little noise, which no encoder compresses away."""
    t = torch.arange(start, start + frames)[:, None, None] / 20
    y, x = torch.linspace(0, 6, HEIGHT)[None, :, None], torch.linspace(0, 9, WIDTH)[None, None, :]
    waves = torch.stack(
        [0.5 + 0.4 * torch.sin(a * x + b * y + t * c) for a, b, c in ((1, 2, 1), (2, 1, 2), (1, 1, 3))], -1
    )
    noise = torch.randn(waves.shape, generator=torch.Generator().manual_seed(start))
    return (waves + 0.02 * noise).clamp(0, 1)


def write(kind: str, path: Path) -> None:
    """Write until somebody kills this process."""
    if kind in CODECS:
        sink = VideoSink(path, WIDTH, HEIGHT, 16, codec=kind)
    else:
        path.mkdir()
        sink = FrameFolder(path, FrameSequence("killed", kind, WIDTH, HEIGHT, "16", 0))
    for start in range(0, 10**6, CHUNK):
        pictures = moving(CHUNK, start)
        sink.write(pictures if sink.takes == "float" else (pictures * 255).to(torch.uint8))
        os.write(1, b"%d\n" % (start + CHUNK))


def playing(kind: str, path: Path) -> int:
    """Frames that decode, strictly, one after another from the first."""
    if kind in FRAME_FORMATS and not FRAME_FORMATS[kind].animated:
        files = sorted(path.glob(f"*{FRAME_FORMATS[kind].suffix}"))
        return sum(_is_whole(file) for file in files)
    if kind in FRAME_FORMATS:
        from PIL import Image

        with Image.open(path / "000000.webp") as image:
            for number in range(image.n_frames):
                image.seek(number)
                image.load()
            return image.n_frames
    return _decodes(path)


def _decodes(path: Path) -> int:
    with av.open(str(path)) as container:
        # FFmpeg's reader refuses the TIFFs of its own writer, which other programs read, where it is to be strict
        strict = {} if path.suffix == ".tiff" else {"err_detect": "explode"}
        container.streams.video[0].codec_context.options = strict
        return sum(1 for _ in container.decode(video=0))


def _is_whole(path: Path) -> bool:
    try:
        return _decodes(path) == 1
    except av.error.FFmpegError:
        print(f"{path.name} does not decode: {path.stat().st_size} bytes", flush=True)
        return False


def killed(kind: str, folder: Path, seed: int) -> tuple[int, int]:
    """Frames that were told to be written, and frames that play, after one kill."""
    path = folder / f"{kind}{seed}{CODECS[kind].suffix if kind in CODECS else ''}"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.close(reading)
        write(kind, path)
    os.close(writing)
    told, moment = 0, random.Random(f"{kind} {seed}")
    until, wait = moment.randint(36, 96), moment.uniform(0, 0.3)
    with os.fdopen(reading) as said:
        while told < until:
            told = int(said.readline())
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = max([told, *map(int, said.read().split())])
    return told, playing(kind, path)


def page(kills: int, rows: dict[str, str]) -> str:
    """The results as a page in Markdown; what was not run is left out."""
    return "\n".join(
        [
            "# Frames that play after kill -9",
            "",
            f"Made by `python -m benchmarks.killed_videos --kills {kills}` with PyAV {av.__version__}: {WIDTH}x{HEIGHT}, chunks of",
            f"{CHUNK} frames. Each entry is: frames handed over in whole chunks when the process was killed / frames that decode.",
            "It may be more, of the chunk under way. Lost is the largest number of frames of whole chunks that do not play.",
            "",
            f"| codec or format | {' | '.join(f'kill {n + 1}' for n in range(kills))} | lost at most |",
            f"| --- |{' --- |' * (kills + 1)}",
            *(rows[kind] for kind in [*CODECS, *FRAME_FORMATS] if kind in rows),
            "",
        ]
    )


def row(kind: str, kills: int) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = [killed(kind, Path(folder), seed) for seed in range(kills)]
    lost = max(max(0, told - plays) for told, plays in found)
    return f"| {kind} | {' | '.join(f'{told} / {plays}' for told, plays in found)} | {lost} |"


def rows_of(path: Path | None) -> dict[str, str]:
    """The lines of a page that is there, by their codec."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
    return {line.split()[1]: line for line in lines if line.startswith("| ") and " / " in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="codecs and formats; all without any, else the other lines stay")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = rows_of(options.out) if options.kinds else {}
    for kind in options.kinds or [*CODECS, *FRAME_FORMATS]:
        rows[kind] = row(kind, options.kills)
        print(rows[kind], flush=True)
        if options.out:
            options.out.write_text(page(options.kills, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
