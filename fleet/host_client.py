"""One ComfyUI over HTTP, as any client talks to it. All that a worker knows of a host goes through here."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import requests
import websocket

from .errors import HostLost, Refused

ENDED = ("execution_success", "execution_error", "execution_interrupted")


class HostClient:
    """Talks to the host at `url`. HostLost where it has not answered for `patience` seconds.

    Ends and progress come by websocket. Where the host has none, what it does is asked for every `poll_seconds`.
    """

    def __init__(self, url: str, poll_seconds: float = 1.0, patience: float = 60.0) -> None:
        self.url, self.poll_seconds, self.patience = url.rstrip("/"), poll_seconds, patience
        self.client_id = uuid.uuid4().hex
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy does not reach a host of one's own network
        self._socket: websocket.WebSocket | None = None
        self._no_socket_until = 0.0
        self._inputs: dict[str, set[str] | None] = {}

    def close(self) -> None:
        """Give the connections up."""
        self._drop_socket()
        self._session.close()

    # ---- what can be asked

    def system(self) -> dict[str, Any]:
        """GET /system_stats: the host's device, its memory, versions."""
        return self._json("GET", "/system_stats")

    def inputs(self, class_type: str) -> set[str] | None:
        """The names of the inputs that a class of nodes takes; None where the host does not know the class."""
        if class_type not in self._inputs:
            told = self._json("GET", f"/object_info/{class_type}").get(class_type)
            groups = (told or {}).get("input", {})
            names = {name for kind in ("required", "optional") for name in groups.get(kind) or {}}
            self._inputs[class_type] = names if told else None
        return self._inputs[class_type]

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt; its id. Refused with the host's sentences."""
        self._listen()
        answer = self._json("POST", "/prompt", {"prompt": prompt, "client_id": self.client_id}, refusals=True)
        if answer.get("node_errors") or answer.get("error") or "prompt_id" not in answer:
            if "prompt_id" in answer:  # other outputs of it could run, which nobody asked for alone
                self.interrupt(answer["prompt_id"])
            raise Refused(_reasons(answer))
        return answer["prompt_id"]

    def entry(self, prompt_id: str) -> dict[str, Any] | None:
        """A prompt's entry in the history; None until it has ended."""
        return self._json("GET", f"/history/{prompt_id}").get(prompt_id)

    def queued(self) -> dict[str, dict[str, Any]]:
        """The prompts that run or wait, by id."""
        listed = [item for items in self._json("GET", "/queue").values() for item in items]
        return {item[1]: item[2] if len(item) > 2 else {} for item in listed}

    def stop(self, prompt_id: str, node_id: str) -> bool:
        """End a rollout after the chunk under way, with a state kept; False while it does not run."""
        answer = self._json("POST", "/adastate/stop", {"prompt_id": prompt_id, "node_id": node_id}, refusals=True)
        return "error" not in answer

    def take_out(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, if it waits there."""
        self._call("POST", "/queue", {"delete": [prompt_id]})

    def interrupt(self, prompt_id: str) -> None:
        """End a prompt at once, wherever it is."""
        self.take_out(prompt_id)
        self._call("POST", "/interrupt", {"prompt_id": prompt_id})

    def events(self, seconds: float) -> list[dict[str, Any]] | None:
        """What the host said, after waiting for it no longer than this; None where it has no websocket."""
        if not self._listen():
            time.sleep(min(seconds, self.poll_seconds))
            return None
        try:
            self._socket.settimeout(seconds)
            text = self._socket.recv()
            return [json.loads(text)] if isinstance(text, str) and text else []
        except websocket.WebSocketTimeoutException:
            return []
        except (OSError, ValueError, websocket.WebSocketException):
            self._drop_socket()
            return []

    # ---- how

    def _listen(self) -> bool:
        if self._socket is None and time.monotonic() >= self._no_socket_until:
            address = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}"
            try:
                self._socket = websocket.create_connection(address, timeout=10, http_no_proxy=["*"])
            except (OSError, websocket.WebSocketException):
                self._no_socket_until = time.monotonic() + 30
        return self._socket is not None

    def _drop_socket(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(Exception):
                self._socket.close()
        self._socket = None

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        """The answer, asked for again until `patience` is over. A prompt is posted once: it may have been taken."""
        end, wait = time.monotonic() + self.patience, 0.1
        while True:
            try:
                with self._connection(path) as session:
                    return session.request(method, self.url + path, json=body, timeout=(5, 30))
            except requests.RequestException as error:
                if time.monotonic() > end or path == "/prompt" or not self.alive():
                    raise HostLost(f"{self.url} does not answer ({type(error).__name__})") from error
            time.sleep(wait)
            wait = min(wait * 2, 5.0)

    @contextlib.contextmanager
    def _connection(self, path: str) -> Iterator[requests.Session]:
        """The connection that is kept; for a prompt a new one, since one that the host has just closed could not be told from one
        that has taken it."""
        if path != "/prompt":
            yield self._session
            return
        with requests.Session() as session:
            session.trust_env = False
            yield session

    def alive(self) -> bool:
        """Whether it is worth asking again; a worker that knows the host's process puts its own question here."""
        return True

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, refusals: bool = False
    ) -> dict[str, Any]:
        answer = self._call(method, path, body)
        try:
            told = answer.json()
        except ValueError:
            told = {"error": {"message": f"HTTP {answer.status_code}: {answer.text[:300]}"}}
        if not isinstance(told, dict):
            raise HostLost(f"{self.url}{path} answered something that is no JSON object")
        if answer.ok:
            return told
        if refusals and answer.status_code < 500:
            return {"error": {"message": f"HTTP {answer.status_code}"}} | told
        raise HostLost(f"{self.url}{path} answered HTTP {answer.status_code}: {answer.text[:300]}")


def _reasons(answer: dict[str, Any]) -> str:
    """One sentence a node and fault."""
    lines = []
    for node, found in (answer.get("node_errors") or {}).items():
        for error in found.get("errors", []):
            details = str(error.get("details", ""))
            sentence = details.partition(" - ")[2] or f"{error.get('message')}: {details}"
            lines.append(f"node {node} ({found.get('class_type')}): {sentence}")
    error = answer.get("error") or {}
    told = f"{error.get('message', '')} {error.get('details', '')}".strip() if isinstance(error, dict) else str(error)
    return "; ".join(dict.fromkeys(lines)) or told or "it gave no reason"


def failure_of(entry: dict[str, Any]) -> tuple[str, str]:
    """How a prompt that has ended ended: `success`, `interrupted` or `failed`, and a sentence."""
    for event, data in entry.get("status", {}).get("messages", []):
        if event == "execution_error":
            return "failed", f"{data['node_type']} (node {data['node_id']}): {str(data['exception_message']).strip()}"
        if event == "execution_interrupted":
            return "interrupted", "it was interrupted"
    good = entry.get("status", {}).get("status_str") == "success"
    return ("success", "") if good else ("failed", "it failed, and the host gave no reason")


def failed_node(entry: dict[str, Any]) -> str:
    """The id of the node that raised, or empty."""
    messages = entry.get("status", {}).get("messages", [])
    return next((str(data.get("node_id")) for event, data in messages if event == "execution_error"), "")


def files_of(entry: dict[str, Any]) -> list[str]:
    """What a prompt's nodes list of the output folder, by path in it."""
    listed = [item for node in entry.get("outputs", {}).values() for items in node.values() for item in items]
    found = [item for item in listed if isinstance(item, dict) and "filename" in item and item.get("type") == "output"]
    names = [f"{item.get('subfolder', '')}/{item['filename']}".lstrip("/").replace("\\", "/") for item in found]
    return list(dict.fromkeys(names))
