"""The batch's driver: which row goes to which worker, what is tried again, what is written down. Workers are Ray's actors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from .errors import FleetError
from .going_on import kept_frames
from .manifest import Row
from .memory import Plan, plan_key
from .order import Needs, Order
from .progress import Seen, Shown
from .results import FINISHED, Books
from .worker import Task

LOOK_EVERY = 1.0  # seconds
# a process that Ray starts again cannot be reached meanwhile, which Ray itself waits for where it may try again
READY_RETRIES = 5
MOST_STARTS = 3  # a worker whose host does not start so often in a row is given up


@dataclass(frozen=True)
class Settings:
    """`tries`: how often in a row a row may lose its worker, or fail in a way that another try can help, without having come any
    further. `plan_memory`: ask for a row's memory before it is placed. `prefix`: folder of the rows' folders in the output folder,
    and `output`: that folder as results name it."""

    same_device: bool = False
    tries: int = 2
    plan_memory: bool = True
    prefix: str = ""
    output: str = ""


@dataclass
class _Member:
    """A worker as the driver sees it."""

    name: str
    actor: Any
    slots: int
    device: str = ""
    memory: int = 0
    place: str = ""  # machine and process
    up: bool = False
    failed_starts: int = 0
    given_up: str = ""
    under_way: set[str] = field(default_factory=set)


@dataclass
class _Story:
    """What happened to a row so far."""

    tries: int = 0
    bad: int = 0  # in a row, without having come any further
    frame: int = 0
    kept: int = 0  # frames of its newest state
    folder: str = ""
    seconds: float = 0.0
    begun: float = 0.0
    told: list[str] = field(default_factory=list)
    lost_on: list[str] = field(default_factory=list)


class Driver:
    """Runs rows on workers to the end. `actors`: handles of Ray actors of `worker.Worker`, by name; `slots` rows at a time on each.

    `finish` is told each line of results.jsonl before it is written, and may add to it. `output`: the hosts' output folder as this
    process sees it, or None: then what a killed worker's row has kept is not seen.
    """

    def __init__(
        self,
        books: Books,
        rows: list[Row],
        actors: dict[str, Any],
        slots: int = 1,
        settings: Settings | None = None,
        quiet: bool = False,
        finish: Callable[[dict[str, Any]], None] = lambda told: None,
        output: Path | None = None,
    ) -> None:
        self._output = output
        self.books, self.settings, self._finish = books, settings or Settings(), finish
        self.order = Order(rows)
        self.members = {name: _Member(name, actor, slots) for name, actor in actors.items()}
        self.seen = Seen(frames=sum(row.frames for row in rows), rows=len(rows))
        self.shown = Shown(self.seen, quiet)
        self._stories: dict[str, _Story] = {}
        self._plans: dict[tuple[str, int], Plan] = {}
        self._calls: dict[Any, tuple[str, _Member, Row | None]] = {}  # ref -> (what, worker, row)
        self._looks: dict[Any, _Member] = {}
        self._looked = 0.0
        self._told_waits: set[Needs] = set()
        self.stopping = self._passed_on = self._ending = False

    # ---- from outside

    def stop(self) -> None:
        """Every worker finishes its chunk and keeps a state; nothing more is begun. For a signal's handler: it only leaves word."""
        self.stopping = True

    def end(self) -> None:
        """`run` raises KeyboardInterrupt soon, with what is under way left to its own. Leaves word, too."""
        self._ending = True

    def _heed(self) -> None:
        """Do what was asked by `stop` and `end`."""
        if self._ending:
            raise KeyboardInterrupt
        if self.stopping and not self._passed_on:
            self._passed_on = True
            for member in self.members.values():
                if not member.given_up:
                    member.actor.stop.remote()
            self.shown.say(
                "Stopping: every worker finishes its chunk and keeps a state. Ctrl-C again ends them at once."
            )

    def run(self) -> int:
        """Returns how many rows were not finished. FleetError if no worker is left."""
        with self.shown:
            for member in self.members.values():
                self._start(member)
            while self._goes_on():
                self._heed()
                self._place()
                self._take_answers()
                self._look()
            self._refuse_the_rest()
        return self.seen.rows - self.seen.finished

    def _goes_on(self) -> bool:
        busy = any(what != "ready" for what, _, _ in self._calls.values())
        if self.stopping:
            return busy
        if not len(self.order) and not busy:
            return False
        if all(member.given_up for member in self.members.values()):
            raise FleetError(
                "no worker is left: " + "; ".join(f"{m.name}: {m.given_up}" for m in self.members.values()), code=1
            )
        return True

    # ---- placing

    def _call(self, what: str, member: _Member, row: Row | None, ref: Any) -> None:
        self._calls[ref] = (what, member, row)
        if row is not None:
            member.under_way.add(row.name)

    def _start(self, member: _Member) -> None:
        member.up = False
        self.seen.waits[member.name] = "starts"
        self._call("ready", member, None, member.actor.ready.options(max_task_retries=READY_RETRIES).remote())

    def _place(self) -> None:
        if self.stopping:
            return
        placed = True
        while placed and len(self.order):  # a row a worker in turn, so that none takes the longest ones alone
            placed = False
            for member in self.members.values():
                if member.up and len(member.under_way) < member.slots:
                    row = self.order.take(member.name, lambda needs, member=member: self._suits(member, needs))
                    if row is not None:
                        placed = True
                        self._give(row, member)

    def _suits(self, member: _Member, needs: Needs) -> bool:
        others = [each for each in self.members.values() if each is not member and not each.given_up]
        if needs.avoid == member.name and others:
            return False
        if needs.device and self.settings.same_device and needs.device != member.device:
            return False
        return member.memory > needs.above

    def _give(self, row: Row, member: _Member) -> None:
        """Ask for the row's memory if nobody has, then run it."""
        before = self.books.devices.get((row.name, row.digest), "")
        if self.settings.same_device and before and before != member.device:
            return self._again(row, Needs(device=before))
        key = (plan_key(row.graph), member.memory) if self.settings.plan_memory else ("", 0)
        if not key[0]:
            return self._run(row, member)
        plan = self._plans.get(key)
        if plan is None:
            return self._call("plan", member, row, member.actor.plan.remote(row.graph, member.memory))
        if plan.fits:
            return self._run(row, member)
        larger = [
            each
            for each in self.members.values()
            if not each.given_up and (each.memory > member.memory or not each.device)
        ]
        if larger:
            return self._again(row, Needs(above=member.memory))
        self._end(row, {"outcome": "refused", "reason": f"it fits on no worker: {plan.sentence}"}, member)

    def _again(self, row: Row, needs: Needs) -> None:
        self.order.put_again(row, needs)

    def _run(self, row: Row, member: _Member) -> None:
        story = self._stories.setdefault(row.name, _Story())
        story.tries, story.begun = story.tries + 1, time.monotonic()
        before = self.books.devices.get((row.name, row.digest), "")
        if before and before != member.device:
            story.told.append(
                f"goes on on {member.device}, and was begun on {before}: its frames may differ in their last bits"
            )
        folder = self.books.folder_of(row)
        self.books.begin(row, member.name, member.device, story.tries, member.place)
        folder = f"{self.settings.prefix}/{folder}" if self.settings.prefix else folder
        story.folder = folder
        task = Task(row.name, row.graph, folder, row.frames, tuple(row.values), row.digest)
        self._call("run", member, row, member.actor.run.remote(task))

    # ---- what comes back

    def _take_answers(self) -> None:
        refs = list(self._calls)
        if not refs:
            time.sleep(0.2)
            return
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if not ready:
            ready, _ = ray.wait(refs, num_returns=1, timeout=0.5)
        for ref in ready:
            what, member, row = self._calls.pop(ref)
            if row is not None:
                member.under_way.discard(row.name)
            if what == "run":
                story = self._stories[row.name]
                story.seconds += time.monotonic() - story.begun
            try:
                told = ray.get(ref)
            except ray.exceptions.RayActorError as error:
                self._died(what, member, row, error)
            except ray.exceptions.RayTaskError as error:
                self._failed(what, member, row, error)
            else:
                getattr(self, f"_after_{what}")(member, row, told)

    def _after_ready(self, member: _Member, row: None, told: dict[str, Any]) -> None:
        member.up, member.failed_starts = True, 0
        member.device, member.memory = told["device"], told["memory"]
        member.place = f"{told['machine']}, process {told['pid']}"
        self.seen.waits[member.name] = f"waits ({member.device})"

    def _after_plan(self, member: _Member, row: Row, told: dict[str, Any]) -> None:
        if "lost" in told:
            return self._lost(row, member, told["lost"], new_host=True)
        self._plans[plan_key(row.graph), member.memory] = Plan(**told)
        if self.stopping:
            return self._again(row, Needs())
        self._give(row, member)

    def _after_run(self, member: _Member, row: Row, told: dict[str, Any]) -> None:
        story = self._stories[row.name]
        if told.get("frame", 0) > story.frame:
            story.frame = told["frame"]
            story.told.append(f"went on from frame {story.frame} on {member.name}")
        outcome = told["outcome"]
        if outcome == "stopped":
            state = f", {told['state']} is kept" if told.get("state") else ""
            return self.shown.say(f"{row.name}: stopped{state}")
        if outcome == "lost":
            return self._lost(row, member, told["reason"], new_host=True)
        if outcome == "again":
            return self._lost(row, member, told["reason"], new_host=bool(told.get("new_host")))
        self._end(row, told, member)

    def _died(self, what: str, member: _Member, row: Row | None, error: Exception) -> None:
        if what == "ready":
            return self._not_started(member, f"its process ended while it started ({type(error).__name__})")
        self._lost(row, member, "its process ended", new_host=True)

    def _failed(self, what: str, member: _Member, row: Row | None, error: Exception) -> None:
        """A worker's own method raised."""
        cause = getattr(error, "cause", None) or error
        if what == "ready":
            return self._not_started(member, str(cause))
        self._lost(row, member, f"{type(cause).__name__}: {cause}", new_host=False)

    def _not_started(self, member: _Member, reason: str) -> None:
        member.failed_starts += 1
        if member.failed_starts >= MOST_STARTS:
            member.given_up = reason
            self.seen.waits[member.name] = "given up"
            self.order.leave(member.name)
            return self.shown.say(f"{member.name} is given up: {reason}")
        self._start(member)

    def _lost(self, row: Row, member: _Member, reason: str, new_host: bool) -> None:
        """A try that ended without the row's own fault, as far as one knows."""
        story = self._stories.setdefault(row.name, _Story())
        kept = max(kept_frames(self._output, story.folder) if story.folder else 0, story.frame)
        # one that came further begins to count anew: that a worker is taken away again and again is no fault of a row
        story.bad = 1 if kept > story.kept else story.bad + 1
        story.kept = max(kept, story.kept)
        story.lost_on.append(member.name)
        if new_host and member.up:
            self.order.leave(member.name)
            self._start(member)
        if story.bad >= self.settings.tries and not self.stopping:
            on = ", ".join(dict.fromkeys(story.lost_on))
            return self._end(
                row, {"outcome": "given up", "reason": f"{story.bad} tries ended on {on}: {reason}"}, member
            )
        self.shown.say(f"{row.name}: {member.name}: {reason}; it is tried again")
        device = self.books.devices.get((row.name, row.digest), "")
        self._again(row, Needs(avoid=member.name, device=device if self.settings.same_device else ""))

    def _end(self, row: Row, told: dict[str, Any], member: _Member) -> None:
        """Write down what became of a row."""
        story = self._stories.setdefault(row.name, _Story())
        files = [self._shown(name) for name in told.get("files") or []]
        line = {
            "name": row.name, "outcome": told["outcome"], "file": files[0] if files else None, "files": files,
            "report": told.get("report") and self._shown(told["report"]), "reason": told.get("reason"), "tries": story.tries,
            "seconds": round(story.seconds, 3), "worker": member.name, "device": member.device,
            "went_on": [*story.told, *([told["note"]] if told.get("note") else [])],
            "warnings": told.get("warnings", []), "digest": row.digest,
        }  # fmt: skip
        self._finish(line)
        self.books.result(line)
        if told["outcome"] == FINISHED:
            self.seen.finished += 1
            self.seen.done += row.frames
        else:
            self.seen.bad += 1
            self.seen.frames -= row.frames
            self.shown.say(f"{row.name} (line {row.line}): {told['outcome']}: {told.get('reason')}")

    def _shown(self, name: str) -> str:
        """A file as results name it: an address as it is, else counted from the batch's folder."""
        return name if "://" in name or not self.settings.output else f"{self.settings.output}/{name}"

    # ---- looking

    def _look(self) -> None:
        """Ask workers how far they are; whoever does not answer is not waited for."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        done, _ = ray.wait(list(self._looks), num_returns=len(self._looks), timeout=0) if self._looks else ([], [])
        for ref in done:
            member = self._looks.pop(ref)
            try:
                self.seen.under_way[member.name] = [each for each in ray.get(ref) if each[0] in member.under_way]
            except ray.exceptions.RayError:
                self.seen.under_way.pop(member.name, None)
        asked = {member.name for member in self._looks.values()}
        for member in self.members.values():
            if member.up and member.name not in asked:
                self._looks[member.actor.look.remote()] = member
        self._tell_waits()
        self.shown.update()

    def _tell_waits(self) -> None:
        """Say once what rows wait for that no worker is; refuse those that are too large for all."""
        here = [member for member in self.members.values() if not member.given_up]
        if here and all(member.up for member in here):
            most = max(member.memory for member in here)
            for row in self.order.take_all(lambda needs: needs.above >= most):
                self._give(row, max(here, key=lambda member: member.memory))
        for needs, count in self.order.waiting_for():
            if needs.device and needs not in self._told_waits:
                if not any(member.up and member.device == needs.device for member in self.members.values()):
                    self._told_waits.add(needs)
                    self.shown.say(f"{count} rows wait for a worker with {needs.device} (--same-device)")

    def _refuse_the_rest(self) -> None:
        if self.stopping:
            left = self.seen.rows - self.seen.finished - self.seen.bad
            self.shown.say(
                f"Stopped: {self.seen.finished} rows are finished, {left} are not; the same command goes on with them."
            )
