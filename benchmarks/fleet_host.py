"""A host that only plays: the HTTP API of a ComfyUI with the pack, as far as a fleet uses it, and no model behind it.

A video takes the time that the demo's took when it was measured, compressed. What lies in its file is which frames were made, so
that a lost or doubled frame can be seen. A played host can be slow, die, or take its whole process with it. Standard library only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import signal
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# benchmarks/results/demo.md: seconds of 513 frames (least, median, most), and what the whole command takes beside them
MEASURED_FRAMES, MEASURED_SECONDS, START_SECONDS = 513, (10.01, 10.68, 11.46), 10.6
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
STATE, REPORT = ".state.safetensors", ".report.json"


@dataclass(frozen=True)
class Pace:
    """`compression`: seconds of waiting for one second of a video's work. `beat`: seconds between two messages of progress."""

    compression: float = 0.01
    beat: float = 0.5

    def seconds_a_frame(self, name: str) -> float:
        """Waited for a frame of the video `name`: between the least and the most that were measured, always the same for a name."""
        least, median, most = MEASURED_SECONDS
        return random.Random(name).triangular(least, most, median) / MEASURED_FRAMES * self.compression


@dataclass(frozen=True)
class Ills:
    """What befalls a worker, drawn with `seed`. Mean seconds between deaths of the host, and of its whole process (0: never);
    `slow`: by how much the workers of `slow_workers` take longer."""

    seed: int = 0
    host_dies: float = 0.0
    process_dies: float = 0.0
    slow: float = 1.0
    slow_workers: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlayedHosts:
    """Hosts for a fleet's workers: each plays `slots` prompts at a time. `output` is the folder that all write to; `log` gets a
    file from each of what it did."""

    output: Path
    log: Path
    workflow: Path
    slots: int = 1
    pace: Pace = field(default_factory=Pace)
    ills: Ills = field(default_factory=Ills)

    def start(self, number: int) -> PlayedHost:
        """The host of worker `number`, once it answers."""
        time.sleep(START_SECONDS * self.pace.compression)
        return PlayedHost(self, number)


@dataclass
class _Prompt:
    """A prompt that runs or waits. It goes on from frame `first`, runs since `began` (0: it waits), and takes `frame` seconds for
    each."""

    prompt_id: str
    graph: dict[str, Any]
    client: str
    ending: str = ""  # stopped or interrupted: what it was asked
    first: int = 0
    began: float = 0.0
    frame: float = 0.0
    length: int = 0

    @property
    def done(self) -> int:
        """Frames that the video has now."""
        return (
            min(self.length, self.first + int((time.monotonic() - self.began) / self.frame + 1e-6)) if self.began else 0
        )


class PlayedHost:
    """One host, which answers on a port of its own in a thread of this process."""

    machine = "played"

    def __init__(self, hosts: PlayedHosts, number: int) -> None:
        self.hosts, self.number = hosts, number
        self._graph = json.loads(hosts.workflow.read_text(encoding="utf-8"))
        self._slow = hosts.ills.slow if number in hosts.ills.slow_workers else 1.0
        self._prompts: dict[str, _Prompt] = {}
        self._history: dict[str, dict[str, Any]] = {}
        self._sockets: dict[str, asyncio.StreamWriter] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._free = asyncio.Semaphore(hosts.slots)
        self._ready, self._alive = threading.Event(), True
        hosts.log.mkdir(parents=True, exist_ok=True)
        self._log = (hosts.log / f"{number}-{uuid.uuid4().hex}.jsonl").open("a", buffering=1)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True).start()
        self._ready.wait()

    # ---- what a worker asks of a host that it started

    def alive(self) -> bool:
        return self._alive

    def end(self) -> None:
        self._die("it was ended")

    def last_words(self) -> str:
        return "a played host"

    # ---- dying

    def _die(self, why: str) -> None:
        """Answer nobody any more; what is under way is lost."""
        if self._alive:
            self._alive = False
            self._write_deaths(why)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._close)

    def _write_deaths(self, why: str) -> None:
        for prompt in list(self._prompts.values()):
            if prompt.began:
                self._note("lost", prompt, prompt.done, why=why)

    def _close(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._loop.stop()

    async def _befall(self, mean: float, kill: bool) -> None:
        """Die after a time that is drawn. The draw is another one for each host that is started."""
        drawn = random.Random(f"{self.hosts.ills.seed} {self.number} {time.time_ns()}").expovariate(1 / mean)
        await asyncio.sleep(drawn)
        if kill:
            self._write_deaths("kill -9")
            os.kill(os.getpid(), signal.SIGKILL)
        self._die("the host died")

    # ---- HTTP

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        ills = self.hosts.ills
        befalls = [(ills.host_dies, False), (ills.process_dies, True)]
        fates = [self._loop.create_task(self._befall(mean, kill)) for mean, kill in befalls if mean]
        self._loop.run_forever()
        left = {*fates, *asyncio.all_tasks(self._loop)}
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()
        self._log.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=256)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while head := await _head(reader):
                method, path, headers = head
                if path.startswith("/ws?clientId="):
                    await self._websocket(path.partition("=")[2], headers, reader, writer)
                    return
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, told = self._answer(method, path, json.loads(body or b"{}"))
                text = json.dumps(told).encode()
                writer.write(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: %d\r\n\r\n" % len(text) + text)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of one request."""
        kind, _, name = path.strip("/").partition("/")
        if kind == "system_stats":
            return 200, {"system": {}, "devices": [{"name": "played", "vram_total": 80 * 2**30}]}
        if kind == "object_info":
            return 200, {name: _class_like(self._graph, name)}
        if kind == "prompt":
            return 200, {"prompt_id": self._submitted(body), "node_errors": {}}
        if kind == "history":
            return 200, {name: self._history[name]} if name in self._history else {}
        if kind == "queue" and method == "GET":
            return 200, {"queue_running": [[0, each] for each in self._prompts], "queue_pending": []}
        if (kind, name) == ("adastate", "stop"):
            return self._asked_to_end(body["prompt_id"], "stopped")
        if kind == "interrupt":
            self._asked_to_end(body.get("prompt_id", ""), "interrupted")
        return 200, {}

    def _asked_to_end(self, prompt_id: str, how: str) -> tuple[int, dict[str, Any]]:
        if prompt_id not in self._prompts:
            return 404, {"error": {"message": "no rollout of it runs"}}
        self._prompts[prompt_id].ending = how
        return 200, {"stopping": True}

    async def _websocket(
        self, client: str, headers: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        key = base64.b64encode(hashlib.sha1(headers["sec-websocket-key"].encode() + GUID).digest())
        writer.write(b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
        writer.write(b"Sec-WebSocket-Accept: " + key + b"\r\n\r\n")
        self._sockets[client] = writer
        try:
            while await reader.read(4096):  # what clients say is of no interest
                pass
        finally:
            self._sockets.pop(client, None)

    def _say(self, prompt: _Prompt, kind: str, **data: Any) -> None:
        """A text message to who queued the prompt."""
        writer = self._sockets.get(prompt.client)
        if writer is not None:
            text = json.dumps({"type": kind, "data": {"prompt_id": prompt.prompt_id} | data}).encode()
            size = bytes([len(text)]) if len(text) < 126 else b"\x7e" + struct.pack(">H", len(text))
            writer.write(b"\x81" + size + text)

    # ---- prompts

    def _submitted(self, body: dict[str, Any]) -> str:
        prompt = _Prompt(uuid.uuid4().hex, body["prompt"], body.get("client_id", ""))
        self._prompts[prompt.prompt_id] = prompt
        self._loop.create_task(self._run(prompt))
        return prompt.prompt_id

    async def _run(self, prompt: _Prompt) -> None:
        rollout = _node(prompt.graph, "AdaStateRollout")
        if rollout is None:
            self._ended(prompt, "success", _planned(prompt.graph))
            return
        async with self._free:
            await self._roll_out(prompt, rollout)

    async def _roll_out(self, prompt: _Prompt, rollout: str) -> None:
        inputs = prompt.graph[rollout]["inputs"]
        stream = prompt.graph[inputs["stream"][0]]["inputs"]
        made = _made_before(self.hosts.output, prompt.graph)
        video = _next_name(self.hosts.output, stream["filename_prefix"])
        pace = self.hosts.pace
        every = stream.get("autosave_seconds", 60.0) * pace.compression
        prompt.first, prompt.length = made[-1][1] if made else 0, inputs["length"]
        prompt.frame = pace.seconds_a_frame(stream["filename_prefix"]) * self._slow
        prompt.began = saved = time.monotonic()
        self._note("begun", prompt, prompt.first, seconds_a_frame=prompt.frame)
        while (done := prompt.done) < prompt.length and not prompt.ending:
            waits = [pace.beat, (prompt.length - done) * prompt.frame]
            await asyncio.sleep(min([*waits, max(0.01, saved + every - time.monotonic())] if every else waits))
            done = prompt.done
            self._say(
                prompt, "progress_state", nodes={rollout: {"state": "running", "value": done, "max": prompt.length}}
            )
            if every and time.monotonic() - saved >= every and done < prompt.length:
                saved = time.monotonic()
                self._save(video, [*made, (prompt.first, done)])
                self._note("saved", prompt, done)
        whole = [*made, (prompt.first, done)]
        if prompt.ending or stream.get("keep_state"):
            self._save(video, whole)
        video.with_suffix(".mp4").write_text(json.dumps(whole))
        self._note("ended", prompt, done)
        self._report(prompt, rollout, video, done)

    def _report(self, prompt: _Prompt, rollout: str, video: Path, done: int) -> None:
        """The report beside the video, and the prompt's entry in the history."""
        folder = video.parent.relative_to(self.hosts.output).as_posix()
        ending = prompt.ending
        told = {
            "ended": ending or "whole", "error": None, "prompt_id": prompt.prompt_id, "node_id": rollout,
            "videos": [f"{folder}/{video.name}.mp4"], "state": f"{folder}/{video.name}{STATE} [output]" if ending else None,
            "length": prompt.length, "frames_total": done, "frames": done - prompt.first, "warnings": [],
        }  # fmt: skip
        if ending == "stopped":
            told["stopped"] = {"frame": done, "of": prompt.length, "by": "user"}
        _replace(video.with_name(video.name + REPORT), json.dumps(told).encode())
        files = [{"filename": f"{video.name}.mp4", "subfolder": folder, "type": "output"}]
        how = "interrupted" if ending == "interrupted" else "success"
        self._ended(prompt, how, {} if how == "interrupted" else {rollout: {"images": files}})

    def _ended(self, prompt: _Prompt, how: str, outputs: dict[str, Any]) -> None:
        status = {"status_str": "success" if how == "success" else "error", "messages": [[f"execution_{how}", {}]]}
        self._history[prompt.prompt_id] = {"status": status, "outputs": outputs}
        del self._prompts[prompt.prompt_id]
        self._say(prompt, f"execution_{how}")

    def _save(self, video: Path, made: list[tuple[int, int]]) -> None:
        """A state as far as anybody but the host reads it: the header, with how many frames its video has."""
        told = {"emitted": 0, "stream": {"file_frames": [made[-1][1]]}, "made": made}
        header = json.dumps({"__metadata__": {"state": json.dumps(told)}}).encode()
        _replace(video.with_name(video.name + STATE), struct.pack("<Q", len(header)) + header)

    def _note(self, what: str, prompt: _Prompt, done: int, **more: Any) -> None:
        if self._log.closed:
            return
        prefix = next(
            (n["inputs"]["filename_prefix"] for n in prompt.graph.values() if "filename_prefix" in n["inputs"]), ""
        )
        told = {"what": what, "at": time.time(), "row": prefix.rpartition("/")[2], "prompt": prompt.prompt_id}
        self._log.write(json.dumps(told | {"first": prompt.first, "done": done} | more) + "\n")


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]] | None:
    """The method, the path and the headers of the next request; None at the end of the connection."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        pairs = (line.partition(":") for line in lines[1:] if line)
        return method, path, {name.strip().lower(): value.strip() for name, _, value in pairs}
    return None


def _node(graph: dict[str, Any], class_type: str) -> str | None:
    return next((name for name, node in graph.items() if node["class_type"] == class_type), None)


def _class_like(graph: dict[str, Any], class_type: str) -> dict[str, Any]:
    """A class of nodes as /object_info says it, with the inputs that the workflow gives it."""
    names = {name for node in graph.values() if node["class_type"] == class_type for name in node["inputs"]}
    return {"input": {"required": {name: ["*"] for name in names}}}


def _planned(graph: dict[str, Any]) -> dict[str, Any]:
    """What a prompt shows that only plans: everything fits."""
    numbers = json.dumps({"fits": True, "total_bytes": 2**30})
    return {name: {"text": [numbers]} for name, node in graph.items() if node["class_type"] == "PreviewAny"}


def _made_before(output: Path, graph: dict[str, Any]) -> list[tuple[int, int]]:
    """Which frames the state was made of that the graph goes on from, part by part."""
    load = _node(graph, "AdaStateLoadState")
    if load is None:
        return []
    data = (output / graph[load]["inputs"]["file"].removesuffix(" [output]")).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return [tuple(part) for part in json.loads(header["__metadata__"]["state"])["made"]]


def _next_name(output: Path, prefix: str) -> Path:
    """`prefix_00001_` or the next number that nobody has; its video is created, empty."""
    (output / prefix).parent.mkdir(parents=True, exist_ok=True)
    for number in _numbers():
        path = output / f"{prefix}_{number:05}_"
        with contextlib.suppress(FileExistsError):
            path.with_suffix(".mp4").open("x").close()
            return path
    raise AssertionError


def _numbers() -> Iterator[int]:
    number = 1
    while True:
        yield number
        number += 1


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
