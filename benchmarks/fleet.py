"""What a fleet costs beside the videos it makes: python3 run.py bench fleet

    python -m benchmarks.fleet [SCENARIO ...] [--rows 10000] [--folder DIR]   the simulation, in the fleet's environment
    python -m benchmarks.fleet_real                                           two real workers against one: its own file

The driver, its books, the workers and Ray are the real ones; the hosts only play (fleet_host.py), so that 64 workers fit on two
cores. Writes benchmarks/results/fleet.md. It wants a quiet machine and 3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (
    __name__ == "__main__"
):  # started as a script, its folder is on the path, where this file would be the package `fleet`
    sys.path[:] = [str(ROOT), *(each for each in sys.path if Path(each or ".").resolve() != ROOT / "benchmarks")]

from benchmarks.fleet_host import MEASURED_FRAMES, MEASURED_SECONDS, START_SECONDS, Ills, Pace  # noqa: E402
from benchmarks.fleet_simulated import TRIES, Outcome, Scenario, drive, seconds_of, simulate  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fleet.md"
LENGTHS = (961, 28801)  # a minute to half an hour at 16 frames a second
DIES = Ills(host_dies=150.0, process_dies=150.0)
SLOW = Ills(slow=3.0, slow_workers=(6, 7))
ALL = Ills(host_dies=150.0, process_dies=150.0, slow=3.0, slow_workers=(6, 7))
SCENARIOS = (
    Scenario("nothing happens", 2000, LENGTHS),
    Scenario("workers die", 2000, LENGTHS, DIES),
    Scenario("a quarter is slow", 2000, LENGTHS, SLOW),
    Scenario("the driver is killed twice", 2000, LENGTHS, kills=(15.0, 15.0)),
    Scenario("all of it", 10_000, LENGTHS, ALL, kills=(60.0, 60.0)),
)
HEADER = (
    "what happens", "rows", "seconds", "rows a second", "overhead a row, ms", "of a video's time", "idle while rows wait",
    "idle in all", "deaths", "rows that went on", "work done twice", "given up", "lost rows",
)  # fmt: skip


def row(scenario: Scenario, found: Outcome) -> list[str]:
    """A scenario's line of the table."""
    return [
        scenario.name, str(found.rows), f"{found.seconds:.0f}", f"{found.rows / found.seconds:.1f}", f"{found.overhead * 1e3:.0f}",
        f"{found.overhead / seconds_of(scenario):.3%}", f"{found.idle:.1%}", f"{found.idle_to_the_end:.1%}", str(found.deaths),
        str(found.went_on), f"{found.twice:.2%}", str(found.given_up), f"**{found.lost}**",
    ]  # fmt: skip


def page(rows: list[list[str]], took: float, load: float) -> str:
    """The whole file."""
    import ray

    table = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    table += ["| " + " | ".join(cells) + " |" for cells in rows]
    one = SCENARIOS[0]
    pace, mean = Pace(), seconds_of(one)
    least, median, most = MEASURED_SECONDS
    notes = [
        f"Hosts play: a video takes the time that [the demo's took](demo.md) ({median} s for {MEASURED_FRAMES} frames, drawn "
        f"between {least} and {most}), and a second of it {pace.compression * 1e3:.0f} ms. {one.workers * one.slots} workers are "
        f"{one.workers} actors that keep {one.slots} rows each under way. Driver, books, workers, HTTP, websockets and Ray "
        f"{ray.__version__} are real.",
        f"Videos have {LENGTHS[0]} to {LENGTHS[1]} frames, drawn evenly by their logarithm: {mean:.0f} s of work on average, "
        f"{mean * pace.compression:.2f} s here. *Overhead* is the time that a worker waits between two rows while rows wait. It is "
        f"not compressed; *of a video's time* compares it with {mean:.0f} s. *Idle in all* has the end of the batch in it, when "
        "fewer rows are left than workers.",
        f"Workers die in two ways: the host alone, and the whole process by kill -9, each once in {DIES.host_dies:.0f} s of every "
        f"actor, which is {DIES.host_dies / pace.compression / 3600:.1f} h uncompressed, with all its rows. A host takes "
        f"{START_SECONDS} s to start, compressed; the start of a process is not compressed. Since a death takes {one.slots} rows "
        f"at once, `--tries` is {TRIES}, so that a row that was merely there twice is not given up.",
        f"Slow workers take {SLOW.slow:.0f} times as long. A driver is killed with -9, which ends its workers, too, and started "
        "again by the same command. The time until its first row counts as idle.",
        "*Work done twice*: frames made beyond those that the videos have: what was made after the newest autosave (one in 60 s). "
        "*Lost rows*: without a finished line, or with a frame that is missing or there twice in the file.",
    ]
    lines = [
        "# What a fleet costs beside its videos",
        "",
        f"Made by `python3 run.py bench fleet` in {took / 60:.0f} minutes on {os.cpu_count()} cores ({processor()}), with a load "
        f"average of {load:.1f} before it.",
        "[docs/fleet.md](../../docs/fleet.md) says what a fleet promises.",
        "",
        *table,
        "",
        *[f"- {note}" for note in notes],
        "",
    ]
    return "\n".join(lines)


def processor() -> str:
    """What this machine computes with."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def in_the_fleets_environment() -> None:
    """Begin anew with the fleet's interpreter, unless this is it."""
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        from tools.setup_fleet import ensure_fleet

        os.execv(python := str(ensure_fleet()), [python, str(Path(__file__).resolve()), *sys.argv[1:]])


def main() -> int:
    in_the_fleets_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="by name; all without")
    parser.add_argument("--rows", type=int, help="of each scenario, to try the command; then no file is written")
    parser.add_argument("--folder", type=Path, help="where batches are left; without, they are removed")
    parser.add_argument(
        "--drive", type=Path, help=argparse.SUPPRESS
    )  # a process that is killed by the one that simulates
    options = parser.parse_args()
    if options.drive:
        drive(json.loads(options.drive.read_text(encoding="utf-8")))
        return 0
    chosen = [each for each in SCENARIOS if not options.scenarios or each.name in options.scenarios]
    if unknown := set(options.scenarios) - {each.name for each in SCENARIOS}:
        parser.error(f"there is no scenario {unknown.pop()!r}; there are: {', '.join(each.name for each in SCENARIOS)}")
    started, load, rows = time.monotonic(), os.getloadavg()[0], []
    for scenario in chosen:
        if options.rows:
            kills = tuple(kill * options.rows / scenario.rows for kill in scenario.kills)
            scenario = replace(scenario, rows=options.rows, kills=kills)
        folder = Path(tempfile.mkdtemp(prefix="fleet-", dir=options.folder))
        rows.append(row(scenario, simulate(scenario, folder)))
        print(" | ".join(rows[-1]), flush=True)
        if not options.folder:
            shutil.rmtree(folder)
    if not options.rows and chosen == list(SCENARIOS):
        RESULT.write_text(page(rows, time.monotonic() - started, load), encoding="utf-8")
        print(f"\n{RESULT.relative_to(ROOT)} is written.")
    return int(any(cells[-1] != "**0**" for cells in rows))


if __name__ == "__main__":
    sys.exit(main())
