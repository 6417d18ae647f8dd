"""Two real workers against one, with the demo model, each held to one core: python3 run.py bench fleet_real

    python -m benchmarks.fleet_real [--videos 8] [--frames 513] [--turns 2] [--folder DIR]

The driver and Ray are those of `run.py fleet`, and so are the ComfyUIs. They are started before the clock, and each has made a
short video, so that its models are loaded. One worker and two take turns; then two with one that is killed in the middle. Writes
benchmarks/results/fleet-real.md. It wants a quiet machine with at least two cores, and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (
    __name__ == "__main__"
):  # started as a script, its folder is on the path, where a file has the name of the package `fleet`
    sys.path[:] = [str(ROOT), *(each for each in sys.path if Path(each or ".").resolve() != ROOT / "benchmarks")]

from tools.setup_host import CACHE, ensure_ready  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fleet-real.md"
WORKFLOW = ROOT / "workflows" / "api" / "long_video.json"
WARM, AUTOSAVE, TWO = 33, 5.0, 2
# prints a hash of each frame of a video, with the host's packages; the codec is lossless
HASHES = (
    "import av, hashlib, sys\n"
    "with av.open(sys.argv[1]) as file:\n"
    "    for frame in file.decode(video=0):\n"
    "        print(hashlib.sha256(frame.to_ndarray(format='rgb24').tobytes()).hexdigest())"
)


@dataclass
class Turn:
    """A batch that was made. `killed`: the row whose worker was."""

    workers: int
    seconds: float
    frames: int
    files: dict[str, Path]
    lines: dict[str, dict[str, Any]]
    killed: str = ""

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds


def table(folder: Path, count: int, frames: int, prefix: str) -> list:
    """Rows of a batch, each with a seed of its own."""
    from fleet.manifest import read_manifest

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": f"{prefix}{number}", "workflow": str(WORKFLOW), "5.length": frames, "5.seed": number, "4.codec": "ffv1",
            "4.autosave_seconds": AUTOSAVE, "4.keep_state": False, "4.preview": False,
        }
        for number in range(1, count + 1)
    ]  # fmt: skip
    path = folder / f"{prefix}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_manifest(path)


def turn(folder: Path, workers: int, videos: int, frames: int, kill: bool = False) -> Turn:
    """Make a batch on so many workers, after each has made a short video; with `kill`, one is killed in the middle."""
    from fleet import cluster
    from fleet.driver import Driver, Settings
    from fleet.host import HostSpec
    from fleet.results import Books

    output = folder / "videos"
    hosts = HostSpec(CACHE / "base", output, folder / "logs", threads=1, pin=True)
    with cluster.Cluster(None) as machines:
        actors = machines.start(workers, cluster.Share(threads=1), hosts, output, "")
        try:
            warm = Driver(Books(folder / "warm"), table(folder, workers, WARM, "warm"), actors, quiet=True)
            if warm.run():
                raise SystemExit(f"the short videos were not made; see {folder}")
            books, rows = Books(folder), table(folder, videos, frames, "v")
            driver = Driver(books, rows, actors, settings=Settings(output="videos"), quiet=True, output=output)
            killed: list[str] = []
            if kill:
                watch = threading.Thread(target=kill_one, args=(folder, videos // 2, killed), daemon=True)
                watch.start()
            started = time.monotonic()
            left = driver.run()
            seconds = time.monotonic() - started
        finally:
            machines.end(actors)
    if left:
        raise SystemExit(f"{left} videos were not made; see {folder}")
    results = Books(folder).results
    files = {name: folder / told["file"] for name, told in results.items()}
    return Turn(workers, seconds, videos * frames, files, results, "".join(killed))


def kill_one(folder: Path, after: int, killed: list[str]) -> None:
    """kill -9 of the worker of a video with an autosave, once so many videos are finished."""
    while True:
        finished = {told["name"] for told in lines(folder / "results.jsonl")}
        for state in (folder / "videos").glob("v*/*.state.safetensors"):
            name = state.parent.name
            if len(finished) >= after and name not in finished:
                places = [told["place"] for told in lines(folder / "tries.jsonl") if told["name"] == name]
                os.kill(int(places[-1].rpartition(" ")[2]), signal.SIGKILL)
                killed.append(name)
                return
        time.sleep(0.05)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def frames_of(path: Path) -> list[str]:
    """A hash a frame."""
    python = os.environ.get("COMFYUI_PYTHON") or str(ensure_ready().python)
    done = subprocess.run([python, "-c", HASHES, path], capture_output=True, text=True, check=True)
    return done.stdout.split()


def page(alone: list[Turn], two: list[Turn], killed: Turn, same: int, processor: str) -> str:
    """The whole file."""
    ratios = [b.rate / a.rate for a, b in zip(alone, two, strict=True)]
    cells = [["one worker", alone], ["two workers", two], ["two workers, one killed in the middle", [killed]]]
    rows = [
        f"| {name} | {len(turns)} | {statistics.median(t.seconds for t in turns):.1f} | "
        f"{min(t.seconds for t in turns):.1f} to {max(t.seconds for t in turns):.1f} | "
        f"{statistics.median(t.rate for t in turns):.1f} |"
        for name, turns in cells
    ]
    told = killed.lines[killed.killed]
    videos = len(killed.files)
    return "\n".join(
        [
            "# Two workers of a fleet against one",
            "",
            f"Made by `python3 run.py bench fleet_real` ({processor}, {os.cpu_count()} cores): {videos} videos of "
            f"{killed.frames // videos} frames at 64x64,",
            "the shipped demo model. Every worker is a ComfyUI that is held to one core, with the threads of torch and of the "
            "encoder. They are",
            "started, and have made a short video, before the clock.",
            "",
            "| what | turns | seconds, median | least to most | frames a second |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            f"- **Two workers reach {statistics.median(ratios):.2f} times one worker's throughput** (turn by turn "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}). One worker and two took turns.",
            f"- A worker was killed with -9 when {videos // 2} videos were finished and its own had left an autosave (one in "
            f"{AUTOSAVE:.0f} s). Its video took {told['tries']} tries: {'; '.join(told['went_on'])}.",
            f"- {same} of {videos} videos of that batch have the frames of the batch that nobody killed, bit for bit.",
            "",
        ]
    )


def in_the_fleets_environment() -> None:
    """Begin anew with the fleet's interpreter, unless this is it. The host is set up, and known to it."""
    host = ensure_ready()
    os.environ.update(host.env() | {"COMFYUI_PYTHON": str(host.python), "PYTHONPATH": str(ROOT)})
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        from tools.setup_fleet import ensure_fleet

        os.execv(python := str(ensure_fleet()), [python, str(Path(__file__).resolve()), *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=513)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the batches are left; without, they are removed")
    options = parser.parse_args()
    in_the_fleets_environment()
    from benchmarks.fleet import processor

    folder = Path(tempfile.mkdtemp(prefix="fleet-real-", dir=options.folder))
    alone, two = [], []
    for number in range(options.turns):
        for turns, workers in ((alone, 1), (two, TWO)):
            turns.append(turn(folder / f"{number}-{workers}", workers, options.videos, options.frames))
            print(f"{workers} workers: {turns[-1].seconds:.1f} s, {turns[-1].rate:.1f} frames a second", flush=True)
    killed = turn(folder / "killed", TWO, options.videos, options.frames, kill=True)
    print(f"one killed: {killed.seconds:.1f} s; {killed.lines[killed.killed]['went_on']}", flush=True)
    same = sum(frames_of(killed.files[name]) == frames_of(path) for name, path in two[0].files.items())
    text = page(alone, two, killed, same, processor())
    print(text)
    if (options.videos, options.frames) == (8, 513):
        RESULT.write_text(text, encoding="utf-8")
    if not options.folder:
        shutil.rmtree(folder)
    return int(same != options.videos)


if __name__ == "__main__":
    sys.exit(main())
