"""A server of the host, and what a client needs to run a prompt on it. Standard library only."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from tools.setup_host import ROOT, Host, SetupError, child_env, duration, say

PACK_NAME = "ComfyUI-AdaState"


def link_pack(base: Path) -> None:
    """Put the checkout into the base folder's custom_nodes, as a link."""
    link = base / "custom_nodes" / PACK_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise SetupError(f"{link} is not a link to {ROOT}; move it away.")
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except FileExistsError:  # another worker that shares the folder was first
        link_pack(base)
    except OSError:  # Windows wants a privilege for links, but none for junctions
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, stdout=subprocess.DEVNULL)


def give_example(host: Host, base: Path) -> None:
    """The picture that an installed ComfyUI has in its input folder, for the base folder's."""
    source, target = host.path / "input" / "example.png", base / "input" / "example.png"
    if source.is_file() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def has_cuda(python: Path) -> bool:
    """Whether this interpreter's torch sees a GPU; asked once, since it takes seconds."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", code], env=child_env(), stderr=subprocess.DEVNULL).returncode == 0


def server_command(
    host: Host, base: Path, output: Path, port: int, linked: bool = True, cuda: bool | None = None
) -> list[str]:
    """How the host is started, with those flags that this version of it knows; `linked` puts the checkout into it. `cuda`: whether
    there is a GPU; None: its torch is asked."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "user").mkdir(exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if linked:
        link_pack(base)
    give_example(host, base)
    command = [str(host.python), str(host.path / "main.py"), "--port", str(port), "--base-directory", str(base)]
    command += ["--output-directory", str(output)] + (
        [] if (has_cuda(host.python) if cuda is None else cuda) else ["--cpu"]
    )
    flags = (host.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    if '"--disable-api-nodes"' in flags:  # paid services: slow to load, and nothing here uses them
        command.append("--disable-api-nodes")
    if '"--database-url"' in flags:
        command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
    return command


class Server:
    """A host on a free port, for a `with` block: it is stopped at the end, however that comes."""

    def __init__(self, host: Host, base: Path, output: Path, log: Path, linked: bool = True):
        self.port, self.log = free_port(), log
        command = server_command(host, base, output, self.port, linked)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            # A session of its own, so that Ctrl-C reaches run.py alone, which then ends it in order.
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=host.path, env=host.env(), start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def request(self, path: str, body: dict | None = None) -> dict:
        """GET, or POST with a body; an HTTP error's JSON is returned with its `error`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this address
        try:
            with direct.open(request, timeout=30) as answer:
                return json.loads(answer.read() or b"{}")  # some routes answer with nothing
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError):
                if isinstance(answered := json.loads(text), dict):
                    return {"error": {"message": f"HTTP {error.code}"}} | answered
            return {"error": {"message": f"HTTP {error.code}: {text[:300]}"}}

    def check_alive(self) -> None:
        """Raise with the end of the log if the server is gone."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SetupError(f"{tail}\nComfyUI ended by itself; its whole log is {self.log}.", code=1)

    def wait_ready(self, timeout: float = 300) -> None:
        """Return when the server answers."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.check_alive()
            with contextlib.suppress(OSError):
                if "error" not in self.request("/system_stats"):
                    return
            time.sleep(0.3)
        raise SetupError(f"ComfyUI did not answer within {duration(timeout)}; its log is {self.log}.", code=1)


def parse_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The whole websocket frames in `data` as (opcode, payload), and the bytes after them (RFC 6455, unmasked)."""
    frames = []
    while len(data) >= 2:
        length, start = data[1] & 0x7F, 2
        if length >= 126:
            start = 4 if length == 126 else 10
            length = int.from_bytes(data[2:start], "big")
        if len(data) < start or len(data) < start + length:
            break
        frames.append((data[0] & 0x0F, data[start : start + length]))
        data = data[start + length :]
    return frames, data


class Events:
    """The host's messages as they come. Without a connection there are none, and the caller's polling has to do."""

    def __init__(self, port: int, client_id: str):
        self.data, self.socket = b"", socket.create_connection(("127.0.0.1", port), timeout=10)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.data:
            if not (more := self.socket.recv(4096)):
                break
            self.data += more
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            self.close()

    def close(self) -> None:
        """Give the connection up."""
        if self.socket:
            self.socket.close()
            self.socket = None

    def read(self, timeout: float) -> list[dict]:
        """What came, after waiting for it no longer than this."""
        try:
            return [json.loads(payload) for opcode, payload in self.frames(timeout) if opcode == 1]
        except ValueError:
            self.close()
            return []

    def frames(self, timeout: float) -> list[tuple[int, bytes]]:
        """The same as (opcode, payload), previews among them (opcode 2); pings are answered."""
        if not self.socket:
            time.sleep(timeout)
            return []
        self.socket.settimeout(timeout)
        try:
            if more := self.socket.recv(1 << 20):
                self.data += more
            else:
                self.close()
            frames, self.data = parse_frames(self.data)
            for _, payload in (frame for frame in frames if frame[0] == 9):  # a mask of zeros changes nothing
                self.socket.sendall(bytes([0x8A, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
            return frames
        except TimeoutError:
            return []
        except OSError:
            self.close()
            return []


def progress_text(message: dict, prompt: dict) -> str | None:
    """`AdaStateRollout 12 of 44`: what a progress_state message says of the node at work, if it counts at all."""
    if message.get("type") != "progress_state":
        return None
    nodes = message["data"].get("nodes", {})
    for name, node in nodes.items():
        if node.get("state") == "running" and node.get("max", 0) > 1:
            title = prompt.get(name, {}).get("class_type", name)
            return f"{title} {node['value']:.0f} of {node['max']:.0f}"
    return None


class ProgressLine:
    """One line that is rewritten on a terminal; elsewhere a line at most every five seconds."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()
        self.live, self.width = sys.stdout.isatty(), 0

    def show(self, text: str) -> None:
        """Say how far it is."""
        now = time.monotonic()
        text = f"  [{duration(now - self.started)}] {text}"
        if self.live:
            say("\r" + text.ljust(self.width), end="")
            self.width = len(text)
        elif now - self.said >= 5:
            self.said = now
            say(text)

    def end(self) -> None:
        """Leave the line."""
        if self.width:
            say("")


def refusal_text(answer: dict, prompt: dict) -> str:
    """Why the host did not take a prompt, node by node."""
    lines = []
    if error := answer.get("error"):
        lines.append(" ".join(str(error.get(key) or "") for key in ("message", "details")).strip())
    for name, node in (answer.get("node_errors") or {}).items():
        title = f"node {name} ({node.get('class_type') or prompt.get(name, {}).get('class_type')})"
        lines += [f"{title}: {each['message']}: {each.get('details', '')}".rstrip(": ") for each in node["errors"]]
    return "\n".join(lines)


def run_prompt(server: Server, prompt: dict) -> dict:
    """Queue a prompt, show its progress, and return its entry of the host's history."""
    client_id = uuid.uuid4().hex
    events, line = Events(server.port, client_id), ProgressLine()
    answer = server.request("/prompt", {"prompt": prompt, "client_id": client_id})
    if answer.get("error") or answer.get("node_errors"):
        raise SetupError(f"ComfyUI refused the workflow.\n{refusal_text(answer, prompt)}\nIts log is {server.log}.", 1)
    asked = time.monotonic()
    try:
        while True:
            messages = events.read(timeout=1)
            for text in filter(None, (progress_text(message, prompt) for message in messages)):
                line.show(text)
            ended = any(message.get("type", "").startswith("execution_") for message in messages)
            if ended or time.monotonic() - asked > 1:
                asked = time.monotonic()
                server.check_alive()
                history = server.request(f"/history/{answer['prompt_id']}")
                if entry := history.get(answer["prompt_id"]):
                    return entry
    finally:
        line.end()
        events.close()
