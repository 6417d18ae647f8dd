"""What is shown of a rollout while it runs, and the wish to stop it.

Every rollout is listed here, so that it can be stopped. Numbers and pictures are made only for a prompt whose client has an
open socket; without one nothing more happens than that question, once a chunk. Events go to that client alone:

adastate.start      the rollout begins: its seed, length and prompts
adastate.chunk      numbers and meters of a chunk
adastate.steered    what can be changed while it runs, what waits to be and what was: whenever that is another
adastate.pictures   JPEGs of a chunk's frames, and perhaps one of its hidden state, as data URLs
adastate.end        the rollout is over: how, and what it saved
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import rerun
from .live_history import History
from .live_pictures import Encoder
from .rerun import Place
from .safely import attempt
from .server import prompt_server

log = logging.getLogger("adastate")
ENDED_RUNS = 8  # how many finished ones a page can still ask for
_SPEED_CHUNKS = 8
_LONGEST_ID = 200  # characters of a workflow's, which every event brings
_DRAINED = 10.0  # seconds that pictures of chunks are waited for before they are forgotten
# of a run's time that may go into pictures of its hidden state, and the seconds that time unwatched can save up for them
_STATE_SHARE, _STATE_SAVED = 0.003, 0.1
_lock = threading.Lock()
_runs: OrderedDict[Place, LiveRun] = OrderedDict()
MOST_PAGES = 1024
_WAITING_PAGES = 16  # that may not have opened their socket yet
# clients that run the pack's page, oldest first: it shows the pictures, so the host's own preview is not wanted there
_pages: dict[str, None] = {}


def display_id(node_id: str) -> str:
    """The node of the drawn graph that stands for an executed one (they differ where a node was expanded)."""
    try:
        from comfy_execution.progress import get_progress_state

        return str(get_progress_state().dynprompt.get_display_node_id(node_id))
    except Exception:  # noqa: BLE001  another host's registry, or none: the id itself is right for every plain graph
        return node_id


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinity, which JSON has no words for."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


class LiveRun:
    """One rollout of one node of one prompt, for whoever watches it."""

    def __init__(self, place: Place | None, workflow: str = "") -> None:
        server = prompt_server() if place is not None else None
        self.place, self.workflow = place, workflow
        self.client = getattr(server, "client_id", None)
        self.display = display_id(place.node_id) if place is not None else ""
        self.history, self.running, self.stopped, self.paused = History(), True, False, False
        # what may be asked of the run while it is under way (nodes/steering.py), once that is known
        self.steering: Any = None
        self.about: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self._encoder: Encoder | None = None
        self._times: list[tuple[float, float]] = []
        self.started()

    @property
    def watched(self) -> bool:
        """Whether the prompt's client is there to see anything."""
        server = prompt_server()
        return self.client is not None and server is not None and self.client in server.sockets

    @property
    def has_page(self) -> bool:
        """Whether who watches is the pack's own page, which shows the pictures itself."""
        return self.client in _pages and self.watched

    @property
    def stopped_by(self) -> str:
        """Who asked it to end, as the report's `stopped` says; empty: nobody did."""
        return ("pause" if self.paused else "user") if self.stopped else ""

    def stop(self) -> None:
        """Ask the rollout to end after the chunk under way."""
        self.stopped = True

    def pause(self) -> None:
        """The same, to go on later."""
        self.stopped = self.paused = True

    def went_back(self, chunk: int) -> None:
        """The run goes on from before its chunk number `chunk`: what was shown of it and of those behind is forgotten."""
        if self._encoder is not None:
            self._encoder.drain(_DRAINED)
        self.history.drop_from(chunk)
        self.started()

    def steered(self, told: dict[str, Any]) -> None:
        """Tell who watches how it is steered."""
        if self.running:
            self._send("adastate.steered", {"steering": told})

    def started(self, about: dict[str, Any] | None = None) -> None:
        """Models are loaded; speed counts from here. `about` is what is known of the run before its first chunk, JSON-able."""
        self._begun = time.perf_counter()
        self._times = [(self._begun, 0.0)]
        self._allowed, self._asked = 0.0, self._begun
        if about is not None:
            self.about = about
            self._send("adastate.start", {"about": about, "steering": self._steering()})

    def _steering(self) -> dict[str, Any] | None:
        return None if self.steering is None else self.steering.describe()

    def hidden_state(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The picture [h, w, 3] that `draw` makes, or None if that fails and while such pictures have had their share of the
        run's time. An interrupt, which any layer of a decoder may bring, is raised."""
        now = time.perf_counter()
        self._allowed = min(_STATE_SAVED, self._allowed + _STATE_SHARE * max(0.0, now - self._asked))
        self._asked = now
        if self._allowed < 0:
            return None
        try:
            return attempt("a hidden state's preview could not be made", draw)[0]
        finally:
            self._allowed -= max(0.0, time.perf_counter() - now)

    def chunk(self, facts: dict[str, Any], pictures: torch.Tensor | None, hidden: torch.Tensor | None = None) -> None:
        """Show a finished chunk: its numbers (`seconds` and `seconds_total` of video among them), and its decoded frames
        [t, H, W, 3], bytes or in 0..1, if there are any, with a picture [h, w, 3] of the hidden state after it if one was made."""
        facts = self._timed(facts)
        if pictures is None:
            self._show(facts, None)
            return
        if self._encoder is None:
            self._encoder = Encoder(self._show, self._show_pictures)
        self._encoder.offer(facts, pictures, hidden)

    def _timed(self, facts: dict[str, Any]) -> dict[str, Any]:
        """With the speed over the newest chunks (seconds of video a second) and the seconds that are left (None: unknown)."""
        now, made = time.perf_counter(), facts["seconds_made"]
        self._times = [*self._times[-_SPEED_CHUNKS:], (now, made)]
        (then, before), total = self._times[0], facts["seconds_total"]
        speed = max(0.0, made - before) / (now - then) if now > then else 0.0
        left = None if total is None or speed <= 0 else round((total - facts["seconds"]) / speed, 2)
        return facts | {"speed": round(speed, 4), "seconds_left": left}

    def _show(self, facts: dict[str, Any], meters: dict[str, float] | None) -> None:
        numbers = finite(facts) | {"meters": None if meters is None else finite(meters)}
        self.history.add(numbers)
        self._send("adastate.chunk", numbers)

    def _show_pictures(self, chunk: int, pictures: list[dict[str, Any]], hidden: str | None = None) -> None:
        self.history.add_pictures(chunk, pictures, hidden)
        self._send("adastate.pictures", {"chunk": chunk, "pictures": pictures, "hidden": hidden})

    def end(self, outcome: str) -> None:
        """The rollout is over: "done", "stopped", "paused" or "failed"; told after the last pictures."""
        self.running = False

        def tell() -> None:
            self.history.outcome = outcome
            self._send("adastate.end", {"outcome": outcome, "saved": self.saved, "steering": self._steering()})

        if self._encoder is not None:
            self._encoder.close(tell)
        else:
            tell()

    def ids(self) -> dict[str, Any]:
        """What tells this run from others."""
        return {
            "prompt_id": self.place.prompt_id,
            "node_id": self.place.node_id,
            "display_node": self.display,
            "workflow": self.workflow,
        }

    def summary(self) -> dict[str, Any]:
        """JSON-able: who it is and how far it is."""
        return self.ids() | {
            "running": self.running,
            "stopping": self.running and self.stopped,
            "outcome": self.history.outcome,
            "newest": self.history.newest,
            "about": self.about,
            "saved": self.saved,
            "steering": self._steering(),
        }

    def _send(self, event: str, data: dict[str, Any]) -> None:
        try:
            if self.watched:
                prompt_server().send_sync(event, self.ids() | data, self.client)
        except Exception as error:  # noqa: BLE001  a server that is going down; what was made is not lost for it
            log.warning("%s could not be sent: %s", event, error)


class RunEnd:
    """What a rollout tells at its end: its files, the outputs on demand that it made, whether it was stopped, and whether it is
    `short` of what was asked for, so that it is made anew when it is asked for again."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.outputs: rerun.Slots = frozenset()
        self.stopped = self.short = False


@contextmanager
def live_run(hidden: Any = None) -> Iterator[tuple[LiveRun, RunEnd]]:
    """List a rollout for the time that it runs; `hidden` are the node's hidden values."""
    run = LiveRun(rerun.executing(), _workflow_id(getattr(hidden, "extra_pnginfo", None)))
    end, outcome = RunEnd(), "failed"
    _list(run)
    try:
        yield run, end
        outcome = ("paused" if run.paused else "stopped") if end.stopped or end.short else "done"
        if run.steering is not None and run.steering.used:
            # the graph alone does not make it again, so it is neither replayed nor gone on from when the graph is queued again
            rerun.finished(run.place, [], True, end.outputs)
        else:
            rerun.finished(run.place, end.files, end.short, end.outputs)
    finally:
        run.end(outcome)
        _tidy(run)


def _workflow_id(info: Any) -> str:
    """Of what was sent beside a prompt, which may be anything: the id of the drawn workflow, or ""."""
    workflow = info.get("workflow") if isinstance(info, Mapping) else None
    name = workflow.get("id") if isinstance(workflow, Mapping) else None
    return str(name)[:_LONGEST_ID] if isinstance(name, (str, int)) else ""


def _list(run: LiveRun) -> None:
    if run.place is not None:
        with _lock:
            _runs[run.place] = run
            _runs.move_to_end(run.place)


def _tidy(run: LiveRun) -> None:
    """Drop an ended run that nobody saw anything of, and the oldest of the others."""
    with _lock:
        if run.history.newest is None and _runs.get(run.place) is run:
            del _runs[run.place]
        ended = [place for place, each in _runs.items() if not each.running]
        for place in ended[: max(0, len(ended) - ENDED_RUNS)]:
            del _runs[place]


def runs(client: str | None = None) -> list[LiveRun]:
    """Those running and the newest ended ones, oldest first; of one client if it is named."""
    with _lock:
        return [run for run in _runs.values() if client is None or run.client == client]


def find(prompt_id: str, node_id: str) -> LiveRun | None:
    """The run of a node, by its own id or by that of the drawn node that stands for it."""
    with _lock:
        exact = _runs.get(Place(prompt_id, node_id))
        if exact is not None:
            return exact
        shown = [run for run in _runs.values() if run.place.prompt_id == prompt_id and run.display == node_id]
        return shown[-1] if shown else None


def page_opened(client: str) -> None:
    """A client said that it runs the pack's page; those whose socket is closed are forgotten, but for the newest."""
    open_sockets = getattr(prompt_server(), "sockets", {})
    with _lock:
        _pages.pop(client, None)
        _pages[client] = None
        closed = [page for page in _pages if page not in open_sockets]
        for page in closed[:-_WAITING_PAGES]:
            del _pages[page]
        while len(_pages) > MOST_PAGES:
            del _pages[next(iter(_pages))]
