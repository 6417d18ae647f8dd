"""All stages of a plan, one after the other, each in a process of its own.

    python3 run.py train stages --config training/configs/journey/plan.toml --threads 1 --minutes 90

A plan names stages, their configs and the core minutes that each is thought to take. What is done is not done again, unless
something that is still to be done needs what it made and that is gone: another machine takes a plan up with what
`training.handover` brings. Every stage goes on from its own checkpoint, so the same command goes on after a kill. Called twice,
stages that do not need each other run side by side. After `--minutes`, or when this process is asked to end, the stage under
way is asked to save and stop; 0 minutes only write the table of the plan, with what was planned and spent, which is written
after every stage too.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adastate_core.files.whole_file import whole_file

from .run import Run, log, read_config

try:
    import fcntl
    import resource
except ImportError:  # Windows: a plan is called once at a time there, and nobody counts what a core has worked
    fcntl = resource = None  # type: ignore[assignment]

# seconds between looks at a stage under way, and those that it has to save itself
_LOOK, _GRACE = 1.0, 180.0


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[tuple[int, ...] | None]:
    """Within, `path` is locked; None if somebody else has it, unless that is waited for. Gives what a process has to inherit that
    shall hold it as well: a stage outlives its killed parent, and so does the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is None:
            yield ()
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield None
            return
        yield (file.fileno(),)


@dataclass(frozen=True)
class Entry:
    """One stage of a plan: the module in training/, its config and the minutes it is thought to take on one core."""

    name: str
    stage: str
    config: str
    minutes: float

    @property
    def settings(self) -> dict[str, Any]:
        return read_config(Path(self.config))

    @property
    def folder(self) -> Path:
        return Path(self.settings["folder"])


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a config, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from texts_in(one)


class Plan:
    """A plan's stages and, in `folder/stages.json`, what was spent on each, in seconds by the clock and of a core's work, and
    whether it is done."""

    def __init__(self, config: dict[str, Any]) -> None:
        """ValueError for two stages of one name."""
        self.config, self.folder = config, Path(config["folder"])
        self.entries = [Entry(**entry) for entry in config["stages"]]
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names):
            raise ValueError(f"the plan has a stage twice: {', '.join(names)}; give each a name of its own")
        self._file = self.folder / "stages.json"
        self.spent: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """What is known by now, to other runs of the plan as well."""
        self.spent = json.loads(self._file.read_text()) if self._file.exists() else {}

    def done(self, entry: Entry) -> bool:
        return self.spent.get(entry.name, {}).get("done", False)

    def note(self, entry: Entry, seconds: float, core_seconds: float = 0.0, done: bool = False) -> None:
        """Add what was spent on a stage."""
        with locked(self.folder / "stages.lock", wait=True):
            self.read()
            before = self.spent.get(entry.name, {"seconds": 0.0, "core_seconds": 0.0, "done": False})
            self.spent[entry.name] = {
                "seconds": round(before["seconds"] + seconds, 1),
                "core_seconds": round(before["core_seconds"] + core_seconds, 1),
                "done": before["done"] or done,
            }
            with whole_file(self._file) as file:
                file.write(json.dumps(self.spent, indent=1).encode())

    def wanted(self, entries: Iterable[Entry]) -> set[Path]:
        """What configs of `entries` name, but for what these write themselves."""
        entries = list(entries)
        return {Path(text) for entry in entries for text in texts_in(entry.settings)} - {e.folder for e in entries}

    def to_do(self) -> list[Entry]:
        """Stages that are not done, and those before them whose work they need and is gone."""
        left: list[Entry] = []
        for entry in reversed(self.entries):
            gone = (path for path in self.wanted(left) if path.is_relative_to(entry.folder) and not path.exists())
            if not self.done(entry) or any(gone):
                left.insert(0, entry)
        return left

    def ready(self, entry: Entry, left: list[Entry]) -> bool:
        """Whether none of the stages still to be done makes anything that `entry` needs."""
        wanted = self.wanted([entry])
        return not any(path.is_relative_to(one.folder) for one in left if one != entry for path in wanted)

    def table(self) -> list[str]:
        """The plan, and what of it is done."""
        titles = ("stage", "config", "steps", "core minutes planned", "core minutes spent", "minutes by the clock", "")
        lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
        for entry in self.entries:
            spent, clock = self._minutes(entry)
            state = "done" if self.done(entry) else "begun" if clock else ""
            steps = entry.settings.get("steps") or ""
            where = f"`{entry.config.removeprefix('training/configs/')}`"
            lines.append(
                f"| {entry.name} | {where} | {steps} | {entry.minutes:g} | {spent:.1f} | {clock:.1f} | {state} |"
            )
        planned = sum(entry.minutes for entry in self.entries)
        spent, clock = (sum(both) for both in zip(*map(self._minutes, self.entries), strict=True))
        return [*lines, f"| all | | | {planned:g} | {spent:.1f} | {clock:.1f} | |"]

    def _minutes(self, entry: Entry) -> tuple[float, float]:
        """Minutes of a core's work, and by the clock, spent on a stage."""
        spent = self.spent.get(entry.name, {"core_seconds": 0.0, "seconds": 0.0})
        return spent["core_seconds"] / 60, spent["seconds"] / 60

    def write_table(self) -> None:
        path = Path(self.config["table"])
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join([f"# {self.config['title']}", "", self.config["about"].strip(), "", *self.table()]) + "\n"
        with whole_file(path) as file:
            file.write(text.encode())


def children_worked() -> float:
    """Seconds of a core's work of the processes that this one started and that have ended; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Deadline:
    """When stages are asked to stop: after some minutes, or when somebody ends this process."""

    def __init__(self, minutes: float) -> None:
        self.at = time.monotonic() + 60 * minutes

    @contextmanager
    def at_signal(self) -> Iterator[None]:
        """Within, SIGTERM brings the deadline to now."""

        def now(*_: Any) -> None:
            self.at = min(self.at, time.monotonic())

        before = signal.signal(signal.SIGTERM, now)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @property
    def past(self) -> float:
        """Seconds since then; below 0 before."""
        return time.monotonic() - self.at


def run_stage(plan: Plan, entry: Entry, deadline: Deadline, inherited: tuple[int, ...]) -> int:
    """Run one stage to its end or, from the deadline on, to its next step; the exit status."""
    stop = entry.folder / "stop"
    stop.unlink(missing_ok=True)
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", f"training.{entry.stage}", "--config", entry.config, "--threads", threads]
    noted, worked = time.monotonic(), children_worked()
    with subprocess.Popen(command, pass_fds=inherited) as process:
        try:
            while process.poll() is None:
                now = time.monotonic()
                if deadline.past > _GRACE:
                    process.terminate()
                elif deadline.past > 0 and entry.folder.exists():
                    stop.touch()
                if now - noted > 60:
                    plan.note(entry, now - noted)
                    noted = now
                time.sleep(_LOOK)
        except BaseException:
            process.terminate()
            raise
    plan.note(entry, time.monotonic() - noted, children_worked() - worked, process.returncode == 0)
    stop.unlink(missing_ok=True)
    return process.returncode


def next_stage(plan: Plan, deadline: Deadline) -> bool:
    """Run the first stage that is ready and that nobody runs, or wait a little if there is none; whether there may be more to do.

    SystemExit if the stage fails, or asked to stop itself.
    """
    left = plan.to_do()
    for entry in left:
        if not plan.ready(entry, left):
            continue
        with locked(plan.folder / "locks" / f"{entry.name}.lock") as inherited:
            plan.read()
            if inherited is None or entry not in plan.to_do():
                continue
            log.info("%s: training.%s, about %g minutes on one core", entry.name, entry.stage, entry.minutes)
            status = run_stage(plan, entry, deadline, inherited)
        plan.write_table()
        if status and deadline.past < 0:
            raise SystemExit(f"{entry.name} ended with status {status}; the same command goes on from its checkpoint")
        return True
    time.sleep(_LOOK if left else 0)
    return bool(left)


def main() -> None:
    run = Run.from_arguments("Run the stages of a plan.", {"minutes": float})
    plan, deadline = Plan(run.config), Deadline(run.config.get("minutes", float("inf")))
    plan.write_table()
    with deadline.at_signal():
        while deadline.past < 0 and next_stage(plan, deadline):
            plan.read()
    log.info("still to be done: %s", "; ".join(entry.name for entry in plan.to_do()) or "nothing")


if __name__ == "__main__":
    main()
