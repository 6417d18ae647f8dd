"""A host that does with each row what a test says, over HTTP: a row's n-th try is the n-th of its acts, the last one from then on.

  whole          the video is made
  refuse         the prompt is not taken
  error          a node raises, and there is no report
  fail TYPE      the rollout fails, and its report says so
  die [FRAME]    the host goes, after a state at that frame
  kill [FRAME]   so does the whole process that plays it, by kill -9
  picky          a prompt that goes on from a state fails for that, another makes the video
  wait           the rollout goes on until somebody stops it
  hang           it goes on whatever is asked

What lies in a video is JSON: which frames were made of it, try by try. Polled: there is no websocket.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PREFIX_NODE, ROLLOUT = "4", "5"  # of long_video.json


@dataclass(frozen=True)
class Script:
    """The acts of each row, and of each worker its device's name and memory."""

    output: Path
    acts: dict[str, list[str]] = field(default_factory=dict)
    devices: dict[int, tuple[str, int]] = field(default_factory=dict)
    fits: int = 0  # bytes that a row takes

    def start(self, number: int) -> ScriptedHost:
        """The host of worker `number`."""
        return ScriptedHost(self, number)


class ScriptedHost:
    """Answers on a port of its own until it dies."""

    machine = ""

    def __init__(self, script: Script, number: int) -> None:
        self.script, self.number = script, number
        self.history: dict[str, Any] = {}
        self.stopped: dict[str, threading.Event] = {}
        self.graphs: dict[str, Any] = {}
        self._alive = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def alive(self) -> bool:
        return self._alive

    def end(self) -> None:
        self._alive = False
        threading.Thread(target=self._server.shutdown, daemon=True).start()

    def last_words(self) -> str:
        return "scripted: out of luck"

    # ---- what is asked of it

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        kind, _, name = path.strip("/").partition("/")
        if kind == "system_stats":
            device, memory = self.script.devices.get(self.number, ("scripted", 10))
            return 200, {"devices": [{"name": device, "vram_total": memory}]}
        if kind == "object_info":
            return 200, {
                name: {"input": {"required": {"filename_prefix": [], "seed": [], "length": [], "max_seconds": []}}}
            }
        if kind == "prompt":
            return self._submit(body["prompt"])
        if kind == "history":
            return 200, {name: self.history[name]} if name in self.history else {}
        if kind == "queue":
            return 200, {
                "queue_running": [[0, each, graph] for each, graph in self.graphs.items()],
                "queue_pending": [],
            }
        if kind == "interrupt" and body["prompt_id"] in self.stopped:
            self.stopped[body["prompt_id"]].set()
        if (kind, name) == ("adastate", "stop") and body["prompt_id"] in self.stopped:
            self.stopped[body["prompt_id"]].set()
            return 200, {"stopping": True}
        return (404, {"error": {"message": "no rollout"}}) if kind == "adastate" else (200, {})

    def _submit(self, graph: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt_id = os.urandom(8).hex()
        if ROLLOUT not in graph:
            self.history[prompt_id] = self._planned()
            return 200, {"prompt_id": prompt_id}
        prefix = graph[PREFIX_NODE]["inputs"]["filename_prefix"]
        folder = (self.script.output / prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        tries = len(list(folder.glob("*.try")))
        (folder / f"{tries}.try").touch()
        acts = self.script.acts.get(Path(prefix).name, ["whole"])
        act = acts[min(tries, len(acts) - 1)]
        if act == "refuse":
            error = {"message": "Custom validation failed", "details": "width - width is 100; try 96"}
            return 400, {"error": {}, "node_errors": {ROLLOUT: {"class_type": "AdaStateRollout", "errors": [error]}}}
        self.stopped[prompt_id], self.graphs[prompt_id] = threading.Event(), graph
        threading.Thread(
            target=self._act, args=(act, prompt_id, graph, f"{prefix}_{tries + 1:05}_"), daemon=True
        ).start()
        return 200, {"prompt_id": prompt_id}

    def _planned(self) -> dict[str, Any]:
        memory = self.script.devices.get(self.number, ("", 10))[1]
        fits = self.script.fits <= memory
        needs = f"the rollout's caches need {self.script.fits} and {memory} are free; window_frames 3 would fit"
        words = "planned" if fits else needs
        numbers = json.dumps({"fits": fits, "total_bytes": self.script.fits})
        outputs = {"fleet_plan": {"text": [words]}, "fleet_shown": {"text": [numbers]}}
        return {"status": {"status_str": "success", "messages": []}, "outputs": outputs}

    def _act(self, act: str, prompt_id: str, graph: dict[str, Any], video: str) -> None:
        what, _, more = act.partition(" ")
        made, length = self._made(graph), graph[ROLLOUT]["inputs"]["length"]
        first = made[-1][1] if made else 0
        if what in ("die", "kill"):
            if more:
                self._save(video, [*made, [first, int(more)]])
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.end()
            return
        if what == "hang":
            threading.Event().wait()
        if what == "wait":
            self.stopped[prompt_id].wait()
            self._save(video, [*made, [first, first + 4]])
            self._end(prompt_id, video, "stopped", {"stopped": {"frame": first + 4, "of": length, "by": "user"}})
        elif what == "picky" and first:
            error = {"type": "refused_input", "message": "join is on, but the video is missing"}
            self._end(prompt_id, video, "failed", {"error": error})
        elif what == "fail":
            self._end(prompt_id, video, "failed", {"error": {"type": more, "message": f"{more} in chunk 3"}})
        elif what == "error":
            data = {"node_type": "SaveImage", "node_id": "9", "exception_message": "no picture\n"}
            self.history[prompt_id] = {
                "status": {"status_str": "error", "messages": [["execution_error", data]]},
                "outputs": {},
            }
        else:
            (self.script.output / f"{video}.mp4").write_text(json.dumps([*made, [first, length]]))
            self._end(prompt_id, video, "whole", {})
        self.stopped.pop(prompt_id)
        self.graphs.pop(prompt_id)

    def _end(self, prompt_id: str, video: str, ended: str, more: dict[str, Any]) -> None:
        told = {
            "ended": ended,
            "prompt_id": prompt_id,
            "videos": [f"{video}.mp4"],
            "frames_total": 1,
            "warnings": [],
        } | more
        part = self.script.output / f"{video}.part"
        part.write_text(json.dumps(told))
        part.rename(self.script.output / f"{video}.report.json")
        good = ended != "failed"
        data = {"node_type": "AdaStateRollout", "node_id": ROLLOUT, "exception_message": "failed"}
        messages = [] if good else [["execution_error", data]]
        folder, _, name = video.rpartition("/")
        files = [{"filename": f"{name}.mp4", "subfolder": folder, "type": "output"}] if ended == "whole" else []
        status = {"status_str": "success" if good else "error", "messages": messages}
        self.history[prompt_id] = {"status": status, "outputs": {ROLLOUT: {"images": files}}}

    def _save(self, video: str, made: list[list[int]]) -> None:
        """A state as far as a fleet reads it: the header."""
        told = json.dumps({"emitted": 0, "made": made, "stream": {"file_frames": [made[-1][1]]}})
        header = json.dumps({"__metadata__": {"state": told}}).encode()
        (self.script.output / f"{video}.state.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)

    def _made(self, graph: dict[str, Any]) -> list[list[int]]:
        """The frames of the state that a prompt goes on from; it has to be joined."""
        load = next((node for node in graph.values() if node["class_type"] == "AdaStateLoadState"), None)
        if load is None:
            return []
        assert graph[PREFIX_NODE]["inputs"]["join"] is True
        data = (self.script.output / load["inputs"]["file"].removesuffix(" [output]")).read_bytes()
        return json.loads(json.loads(data[8:])["__metadata__"]["state"])["made"]


def _handler(host: ScriptedHost) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            if not host.alive():
                self.close_connection = True
                return
            status, told = (404, {}) if self.path.startswith("/ws") else host.answer(self.path, body)
            text = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
