"""A worker: it has one host, keeps it running, and runs rows on it, one prompt each."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import HostLost, Refused
from .going_on import Begun, begun, is_whole, report_of
from .graph import LOAD, ROLLOUT, Graph, course_of, with_names
from .host import RunningHost
from .host_client import ENDED, HostClient, failed_node, failure_of, files_of
from .memory import plan_prompt, read_plan
from .store import Store

# what of a rollout's own failures another try can help (docs/api.md, error.type); the others are told once
AGAIN = ("out_of_memory", "device_error", "unfinished_chunk", "video_error", "internal_error")
NEW_HOST = ("out_of_memory", "device_error")
QUICK_LOOK = 0.05  # seconds between two looks at a prompt that has ended
SLOW_LOOK = 5.0  # seconds between two looks at a prompt of which the websocket says nothing


class Hosts(Protocol):
    """How a worker gets a host."""

    def start(self, number: int) -> RunningHost:
        """The host of worker `number`, once it answers."""


@dataclass(frozen=True)
class Task:
    """A row as a worker gets it. `folder`: of its files, in the output folder. `values`: which inputs the row sets."""

    name: str
    graph: Graph = field(repr=False)
    folder: str
    frames: int
    values: tuple[str, ...] = ()
    digest: str = ""


@dataclass
class _Run:
    """A row under way."""

    task: Task
    prompt_id: str = ""
    frame: int = 0  # from which it goes on
    steps: tuple[float, float] = (0, 0)  # of the rollout: done, of
    asked: float = 0.0  # when it was last asked to stop; infinite once it will

    @property
    def frames(self) -> float:
        """How many frames of the video there are, about."""
        done, of = self.steps
        return self.frame + (self.task.frames - self.frame) * (done / of if of else 0.0)


class Worker:
    """Runs rows on the host of its number; `slots` of them can be under way at a time, each in a thread of its own.

    `output`: the hosts' output folder as this process sees it, or None: then a row that failed starts anew. `into`: an fsspec
    address that finished rows are copied to, or empty.
    """

    def __init__(
        self,
        number: int,
        hosts: Hosts,
        output: Path | None,
        into: str = "",
        client: Callable[[str], HostClient] = HostClient,
    ) -> None:
        self.number, self._hosts, self._output = number, hosts, output
        self._store = Store(into) if into else None
        self._make_client = client
        self._host: RunningHost | None = None
        self._runs: dict[int, _Run] = {}
        self._clients: dict[int, HostClient] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    # ---- what the driver calls

    def ready(self) -> dict[str, Any]:
        """Start the host unless it runs; what device it has. FleetError or HostLost if it does not start."""
        with self._lock:
            if self._host is None or not self._host.alive():
                if self._host is not None:
                    self._host.end()
                self._host = self._hosts.start(self.number)
                self._clients.clear()
            device = (self._client().system().get("devices") or [{}])[0]
        kind = str(device.get("name", "unknown"))
        kind = kind.partition(" ")[2] or kind if kind.startswith("cuda:") else kind
        if kind == "cpu" and self._host.machine:
            kind = f"cpu, {self._host.machine}"
        where = {"machine": socket.gethostname(), "pid": os.getpid(), "url": self._host.url}
        return where | {"device": kind, "memory": int(device.get("vram_total") or 0)}

    def run(self, task: Task) -> dict[str, Any]:
        """Run a row to its end; what became of it. `outcome` is finished, stopped (a state is kept), refused or failed (for a
        reason of its own), again (another try may help) or lost (the host is gone)."""
        started = time.monotonic()
        run = self._runs[threading.get_ident()] = _Run(task)
        try:
            told = self._run(run)
        except HostLost as error:
            told = {"outcome": "lost", "reason": self._why_lost(error)}
        except Refused as error:
            told = {"outcome": "refused", "reason": str(error)}
        finally:
            self._runs.pop(threading.get_ident(), None)
        return told | {"frame": run.frame, "seconds": round(time.monotonic() - started, 3)}

    def plan(self, graph: Graph, memory: int) -> dict[str, Any]:
        """What Plan Rollout Memory says of a row, as the fields of `memory.Plan`."""
        prompt = plan_prompt(graph)
        known = {"fits": True, "known": False}
        if prompt is None:
            return known
        try:
            client = self._client()
            entry = self._wait(client, client.submit(prompt), None)
        except HostLost as error:
            return {"lost": self._why_lost(error)}
        except Refused:
            return known  # the row itself says why, when it is tried
        return vars(read_plan(entry, memory)) if failure_of(entry)[0] == "success" else known

    def look(self) -> list[tuple[str, float, int]]:
        """The rows under way: name, frames there are, frames in all."""
        return [(run.task.name, run.frames, run.task.frames) for run in list(self._runs.values())]

    def stop(self) -> None:
        """Have every rollout finish its chunk and keep a state; no further row is begun."""
        self._stopping.set()

    def interrupt(self) -> None:
        """End every prompt at once, for hosts that go on without this worker."""
        for run in list(self._runs.values()):
            if run.prompt_id:
                with contextlib.suppress(HostLost):
                    self._client().interrupt(run.prompt_id)

    # ---- how

    def _client(self) -> HostClient:
        """The calling thread's own connection."""
        thread = threading.get_ident()
        if thread not in self._clients:
            client = self._make_client(self._host.url)
            client.alive = lambda: self._host.alive()
            self._clients[thread] = client
        return self._clients[thread]

    def _why_lost(self, error: HostLost) -> str:
        words = self._host.last_words() if self._host is not None else ""
        if self._host is not None and not self._host.alive():
            last = words.splitlines()[-1:] or ["it said nothing"]
            return f"ComfyUI ended by itself (the last line of its log: {last[0][:300]})"
        return str(error)

    def _run(self, run: _Run) -> dict[str, Any]:
        task, client = run.task, self._client()
        if unknown := self._unknown(client, task):
            raise Refused(unknown)
        graph = with_names(task.graph, task.folder, task.name)
        course, passed = course_of(graph), frozenset()
        while True:
            start = begun(graph, course, self._output, task.folder, passed)
            if start.report is not None:
                return self._finished(task, start.report, start.report_file, _videos(start.report), start)
            if self._stopping.is_set():
                return {"outcome": "stopped"}
            run.frame, run.steps = start.frame, (0, 0)
            told = self._one(run, client, start)
            if not (told.pop("of_state", False) and start.frame):
                return told
            # the state cannot be gone on from (its video is gone, say): the one before it, or the start
            passed |= {start.graph[LOAD]["inputs"]["file"].removesuffix(" [output]")}

    def _one(self, run: _Run, client: HostClient, start: Begun) -> dict[str, Any]:
        """One prompt of a row."""
        try:
            run.prompt_id = client.submit(start.graph)
        except Refused as error:
            return {"outcome": "refused", "reason": str(error), "of_state": True}
        entry = self._wait(client, run.prompt_id, run)
        how, sentence = failure_of(entry)
        name, report = self._report(entry, run)
        if report is not None and report.get("ended") == "failed":
            error = report.get("error") or {}
            kind = str(error.get("type"))
            told = {"outcome": "again" if kind in AGAIN else "failed", "reason": str(error.get("message"))}
            return told | {"new_host": kind in NEW_HOST, "of_state": kind == "refused_input"}
        if how == "failed":
            of_state = failed_node(entry) in (course_of(start.graph).rollout, LOAD)
            return {"outcome": "failed", "reason": sentence, "of_state": of_state}
        stopped = (report or {}).get("stopped") or {}
        if how == "interrupted" or (report is not None and not is_whole(report)):
            if self._stopping.is_set():
                return {"outcome": "stopped", "state": (report or {}).get("state"), "at": stopped.get("frame")}
            by = "somebody stopped it" if report is not None else "it was interrupted by somebody"
            return {"outcome": "again", "reason": by}
        return self._finished(run.task, report, name, files_of(entry), start)

    def _finished(
        self, task: Task, report: dict[str, Any] | None, report_file: str, files: list[str], start: Begun
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"outcome": "finished", "files": files, "report": report_file or None}
        if start.note:
            told["note"] = start.note
        if start.report is not None:
            told["note"] = "it was whole already"
        if report is not None:
            told |= {"frames": report.get("frames_total"), "warnings": report.get("warnings", [])}
        if self._store is not None:
            folders = [str(name) for name in (report or {}).get("frame_folders", [])]
            names = dict.fromkeys([*files, *folders, *([report_file] if report_file else [])])
            try:
                put = self._store.put(task.name, [self._output / name for name in names])
            except Exception as error:  # noqa: BLE001  every protocol has errors of its own
                return {"outcome": "again", "reason": f"its files did not arrive: {type(error).__name__}: {error}"}
            addresses = dict(zip(names, put, strict=True))
            told["files"] = [addresses[name] for name in files]
            told["report"] = addresses.get(report_file)
            self._store.finish(task.name, told | {"name": task.name, "digest": task.digest})
        return told

    def _unknown(self, client: HostClient, task: Task) -> str:
        """An input that a row sets and that neither its workflow nor the host knows: the host would pass it over in silence."""
        for place in task.values:
            node, _, name = place.partition(".")
            class_type = task.graph[node]["class_type"]
            known = client.inputs(class_type)
            if known is not None and name not in known:
                return f"{place}: {class_type} has no input {name}; it has {', '.join(sorted(known))}"
        return ""

    def _report(self, entry: dict[str, Any], run: _Run) -> tuple[str, dict[str, Any] | None]:
        """The report of a prompt's rollout, and its file if it can be seen."""
        if self._output is None:
            return "", _shown_report(entry)
        found = report_of(self._output / run.task.folder, run.prompt_id)
        return (f"{run.task.folder}/{found[0]}", found[1]) if found else ("", _shown_report(entry))

    def _wait(self, client: HostClient, prompt_id: str, run: _Run | None) -> dict[str, Any]:
        """A prompt's entry of the history, once it has ended. HostLost if the host is gone or has forgotten it."""
        looked, missing, ended = time.monotonic(), 0, False
        while True:
            # the host says that a prompt has ended a moment before its history has it
            messages = client.events(QUICK_LOOK if ended else 1.0)
            ended = ended or any(_is_end(message, prompt_id) for message in messages or [])
            if run is not None:
                for message in messages or []:
                    _take_progress(run, message)
                self._pass_stop_on(client, run)
            polls = messages is None
            if not (ended or polls or time.monotonic() - looked > SLOW_LOOK):
                continue
            entry = client.entry(prompt_id)
            if entry is not None:
                return entry
            if time.monotonic() - looked > SLOW_LOOK:
                looked = time.monotonic()
                missing = 0 if prompt_id in client.queued() else missing + 1
                if missing > 1:
                    raise HostLost(
                        f"{client.url} has forgotten the prompt: it was started anew, or somebody took it out"
                    )

    def _pass_stop_on(self, client: HostClient, run: _Run) -> None:
        """After `stop`: ask the row's rollouts to end. A row that has none ends at once."""
        if not self._stopping.is_set() or time.monotonic() - run.asked < 0.5:
            return
        run.asked = time.monotonic()
        rollouts = [name for name, node in run.task.graph.items() if node["class_type"] == ROLLOUT]
        if [node for node in rollouts if client.stop(run.prompt_id, node)]:
            run.asked = float("inf")
        else:
            client.take_out(run.prompt_id)  # if it still waits behind somebody else's
        if not rollouts:
            client.interrupt(run.prompt_id)


def _is_end(message: dict[str, Any], prompt_id: str) -> bool:
    return message.get("type") in ENDED and (message.get("data") or {}).get("prompt_id") == prompt_id


def _take_progress(run: _Run, message: dict[str, Any]) -> None:
    """The steps of the rollout that is at work."""
    data = message.get("data") or {}
    if message.get("type") != "progress_state" or data.get("prompt_id") != run.prompt_id:
        return
    for name, node in (data.get("nodes") or {}).items():
        if run.task.graph.get(name, {}).get("class_type") == ROLLOUT and node.get("max", 0) > 1:
            run.steps = (float(node.get("value", 0)), float(node["max"]))


def _shown_report(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The report that the one rollout of a finished prompt shows."""
    texts = [text for node in entry.get("outputs", {}).values() for text in node.get("adastate_report", [])]
    return json.loads(texts[0]) if len(texts) == 1 else None


def _videos(report: dict[str, Any]) -> list[str]:
    return [str(name) for name in [*report.get("videos", []), *report.get("frame_folders", [])]]
