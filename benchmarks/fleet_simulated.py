"""A simulated batch: the fleet's own driver, books and workers on a real Ray, whose hosts only play. And what came of it.

The driver is a process of its own (`python -m benchmarks.fleet --drive SPEC.json`), so that it can be killed.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fleet_host import MEASURED_FRAMES, MEASURED_SECONDS, Ills, Pace, PlayedHosts

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "api" / "long_video.json"
TRIES = 4  # a death takes all slots of an actor, so a row is hit twice more often than where each worker has one
MODELS = ("adastate_demo.safetensors", "another.safetensors")
FOLDER, VIDEOS, LOG, RESULTS = "batch", "videos", "played", "results.jsonl"


@dataclass(frozen=True)
class Scenario:
    """`lengths`: least and most frames of a video, drawn evenly by their logarithm. `kills`: seconds after the driver's first row
    at which it is killed with -9, to be started again at once."""

    name: str
    rows: int
    lengths: tuple[int, int]
    ills: Ills = field(default_factory=Ills)
    kills: tuple[float, ...] = ()
    workers: int = 8
    slots: int = 8
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True)
class Outcome:
    """What came of a scenario. Seconds are real ones, not compressed; `idle` and `twice` are shares, `twice` of the frames that
    were needed."""

    rows: int
    seconds: float
    overhead: float  # seconds of a slot's waiting a row, while rows wait
    idle: float
    idle_to_the_end: float
    twice: float
    deaths: int
    went_on: int  # rows that were tried more than once
    given_up: int
    lost: int


def manifest(scenario: Scenario, folder: Path) -> Path:
    """The table of the scenario's rows, always the same."""
    drawn = random.Random(scenario.name)
    least, most = map(math.log, scenario.lengths)
    path = folder / "batch.jsonl"
    with path.open("w") as file:
        for number in range(scenario.rows):
            length = 1 + 12 * round(math.exp(drawn.uniform(least, most)) / 12)
            row = {"name": f"row{number:05}", "workflow": str(WORKFLOW), "5.length": length, "5.seed": number}
            file.write(json.dumps(row | {"1.unet_name": drawn.choice(MODELS), "4.keep_state": False}) + "\n")
    return path


# ---- the driver's process


def drive(spec: dict[str, Any]) -> int:
    """Run the batch in a folder to its end; how many rows were not finished."""
    from fleet import cluster
    from fleet.driver import Driver, Settings
    from fleet.manifest import read_manifest
    from fleet.results import Books, OneDriver

    folder = Path(spec["folder"])
    hosts = PlayedHosts(
        folder / FOLDER / VIDEOS, folder / LOG, WORKFLOW, spec["slots"], Pace(**spec["pace"]), Ills(**spec["ills"])
    )
    rows, books = read_manifest(folder / "batch.jsonl"), Books(folder / FOLDER)
    with OneDriver(folder / FOLDER):
        left = books.unfinished(rows)
        with cluster.Cluster(None) as machines:
            share = cluster.Share()
            actors = machines.start(spec["workers"], share, hosts, hosts.output, "", slots=spec["slots"])
            settings = Settings(output=VIDEOS, tries=TRIES)
            driver = Driver(books, left, actors, spec["slots"], settings, quiet=True, output=hosts.output)
            with cluster.two_signals(driver.stop, driver.end):
                try:
                    return driver.run()
                finally:
                    machines.end(actors)


# ---- from outside


def simulate(scenario: Scenario, folder: Path) -> Outcome:
    """Run a scenario in an empty folder. RuntimeError if a driver that nobody killed ended with an error."""
    manifest(scenario, folder)
    spec = {
        "folder": str(folder), "workers": scenario.workers, "slots": scenario.slots, "pace": vars(scenario.pace),
        "ills": vars(scenario.ills),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    killed = []
    for after in scenario.kills:
        if (at := _driven(folder, after)) is not None:
            killed.append(at)
    _driven(folder, None)
    return outcome(scenario, folder, killed)


def _driven(folder: Path, after: float | None) -> float | None:
    """One life of the driver: to its end, or killed so many seconds after its first row; when it was killed."""
    command = [sys.executable, "-m", "benchmarks.fleet", "--drive", str(folder / "spec.json")]
    begun = len(list((folder / LOG).glob("*.jsonl"))) if (folder / LOG).is_dir() else 0
    with (folder / "driver.log").open("a") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=_env())
    try:
        if after is not None:
            while process.poll() is None and len(list((folder / LOG).glob("*.jsonl"))) <= begun:
                time.sleep(0.1)
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return time.time()
        if process.wait():
            raise RuntimeError(f"the driver ended with status {process.returncode}; see {folder / 'driver.log'}")
        return None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


# ---- what came of it


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a kill may have cut the last one off."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass
class _Try:
    """One prompt on a played host: when it began and ended, and the frames that it made."""

    row: str
    began: float
    ended: float
    frames: int


def tries(log: Path, killed: list[float], lengths: dict[str, int]) -> list[_Try]:
    """Everything that the hosts did. What a killed driver took with it went on until then, or until it last saved a state."""
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for path in log.glob("*.jsonl"):
        for line in lines(path):
            told.setdefault(line["prompt"], {})[line["what"]] = line
    found = []
    for each in told.values():
        start, saved = each["begun"], each.get("saved", each["begun"])
        end = each.get("ended") or each.get("lost")
        if end is None:
            at = max(saved["at"], min((when for when in killed if when >= start["at"]), default=0.0))
            made = start["first"] + int((at - start["at"]) / start["seconds_a_frame"])
            end = {"at": at, "done": max(saved["done"], min(lengths[start["row"]], made))}
        found.append(_Try(start["row"], start["at"], end["at"], end["done"] - start["first"]))
    return found


def deaths_in(log: Path) -> int:
    """How many hosts died with something under way; each has a file of its own."""
    return sum(any(line["what"] == "lost" for line in lines(path)) for path in log.glob("*.jsonl"))


def whole(file: Path, length: int) -> bool:
    """Whether a played video is made of all its frames, each once."""
    try:
        parts = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    places = [0, *(end for _, end in parts)]
    return [start for start, _ in parts] == places[:-1] and places[-1] == length


def outcome(scenario: Scenario, folder: Path, killed: list[float]) -> Outcome:
    """The figures of a batch that has ended."""
    lengths = {row["name"]: row["5.length"] for row in lines(folder / "batch.jsonl")}
    results = {told["name"]: told for told in lines(folder / FOLDER / RESULTS)}
    finished = {name: told for name, told in results.items() if told["outcome"] == "finished"}
    good = {name for name, told in finished.items() if whole(folder / FOLDER / told["file"], lengths[name])}
    made = tries(folder / LOG, killed, lengths)
    slots = scenario.workers * scenario.slots
    first, last, end = min(t.began for t in made), max(t.began for t in made), max(t.ended for t in made)
    busy = sum(max(0.0, min(t.ended, last) - t.began) for t in made)
    waited = slots * (last - first) - busy
    needed = sum(lengths[name] for name in good)
    return Outcome(
        rows=len(lengths),
        seconds=end - first,
        overhead=waited / len(made),
        idle=waited / (slots * (last - first)),
        idle_to_the_end=1 - sum(t.ended - t.began for t in made) / (slots * (end - first)),
        twice=(sum(t.frames for t in made) - needed) / needed,
        deaths=deaths_in(folder / LOG) + len(killed),
        went_on=sum(told["tries"] > 1 for told in finished.values()),
        given_up=sum(told["outcome"] == "given up" for told in results.values()),
        lost=len(lengths) - len(good),
    )


def seconds_of(scenario: Scenario) -> float:
    """Of a video's work on average, not compressed."""
    least, most = scenario.lengths
    mean = (most - least) / math.log(most / least)
    return mean * MEASURED_SECONDS[1] / MEASURED_FRAMES
