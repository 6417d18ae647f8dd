"""The ComfyUI of a worker: one that is started with the pack, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import requests

from tools import host_client as local
from tools.setup_host import Host as Installed
from tools.setup_host import SetupError, ensure_ready

from .errors import FleetError, HostLost
from .graph import Graph
from .host_client import HostClient
from .keeper import KEPT_BY
from .results import runs

SHARED = ("models", "input", "custom_nodes")  # of a base folder; user (the database) and temp are each worker's own
OWN = "adastate-fleet-"  # begins the names of base folders
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class RunningHost(Protocol):
    """What a worker needs to know of its host."""

    url: str
    machine: str  # the kind of processor, where it is known

    def alive(self) -> bool:
        """Whether its process is there, as far as one can tell."""

    def end(self) -> None:
        """Give it up; ends the process if it is one's own."""

    def last_words(self) -> str:
        """The end of its log, or empty."""


@dataclass(frozen=True)
class HostSpec:
    """How hosts are started: `base` has the models, input and custom_nodes that all share, `output` is the folder that all write
    to. Each has a base folder of its own on its machine. `threads` of 0 leaves processors to the host; `pin` gives worker N
    processors of its own."""

    base: Path
    output: Path
    logs: Path
    threads: int = 0
    pin: bool = False

    def start(self, number: int) -> RunningHost:
        """The host of worker `number`, once it answers. FleetError if it does not start."""
        return StartedHost(self, number)


@dataclass(frozen=True)
class GivenHosts:
    """Hosts that run already, a worker each. Prompts whose files go to the folder `prefix` are those of a driver that is gone, and
    are ended first: what they have made is gone on from."""

    urls: tuple[str, ...]
    patience: float = 60.0  # seconds in which one has to answer
    prefix: str = ""

    def start(self, number: int) -> RunningHost:
        """The one of worker `number`, once it answers."""
        host = GivenHost(self.urls[number], self.patience)
        if self.prefix:
            _end_prompts(host.url, self.prefix, self.patience)
        return host


def _end_prompts(url: str, prefix: str, patience: float) -> None:
    """End the prompts that write to a folder, and wait until they have."""
    client, end = HostClient(url, patience=patience), time.monotonic() + patience
    with contextlib.closing(client):
        while time.monotonic() < end:
            found = [name for name, graph in client.queued().items() if any(_prefixes(graph, f"{prefix}/"))]
            if not found:
                return
            for name in found:
                client.interrupt(name)
            time.sleep(0.5)
    raise HostLost(f"{url} is still at work on prompts of an earlier batch")


def _prefixes(graph: Graph, folder: str) -> Iterator[bool]:
    """Of each file name in a prompt, whether it is in a folder."""
    for node in graph.values():
        name = node.get("inputs", {}).get("filename_prefix")
        yield isinstance(name, str) and name.startswith(folder)


class GivenHost:
    """A host that somebody else started."""

    machine = ""

    def __init__(self, url: str, patience: float) -> None:
        self.url = url.rstrip("/")
        _wait(self, time.monotonic() + patience)

    def alive(self) -> bool:
        return True

    def end(self) -> None:
        pass

    def last_words(self) -> str:
        return ""


class StartedHost:
    """A ComfyUI with the pack on a free port of this machine, with a base folder and database of its own. It ends with this
    process, however that ends."""

    def __init__(self, spec: HostSpec, number: int) -> None:
        try:
            host = ensure_ready()
            base = _base(spec.base)
            port = local.free_port()
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # Ray gave this worker no GPU
            command = local.server_command(host, base, spec.output, port, linked=False, cuda=False if hidden else None)
        except SetupError as error:
            raise FleetError(str(error)) from error
        self.url, self.machine = f"http://127.0.0.1:{port}", processor()
        spec.logs.mkdir(parents=True, exist_ok=True)
        self.log = spec.logs / f"worker-{number}.log"
        with self.log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("keeper.py")), cores_of(spec, number), str(base), *command],
                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, cwd=host.path, env=_env(host, spec.threads),
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait(self, time.monotonic() + 600)
        except BaseException:
            self.end()
            raise

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
        except OSError:
            return ""


def _wait(host: RunningHost, end: float) -> None:
    """Return when the host answers."""
    session = requests.Session()
    session.trust_env = False
    while time.monotonic() < end:
        if not host.alive():
            raise HostLost(f"ComfyUI ended by itself while it started:\n{host.last_words()}")
        with contextlib.suppress(requests.RequestException):
            if session.get(f"{host.url}/system_stats", timeout=10).ok:
                return
        time.sleep(0.3)
    raise HostLost(f"{host.url} did not answer:\n{host.last_words()}".rstrip(":\n"))


def _env(host: Installed, threads: int) -> dict[str, str]:
    """The host's environment: that of this process without what Ray put there for itself."""
    env = host.env() | ({name: str(threads) for name in THREADS} if threads else {})
    if not threads:
        env.pop("OMP_NUM_THREADS", None)  # Ray sets it to the processors that it counts for the actor
    return env


def _base(shared: Path) -> Path:
    """A base folder of one's own: links to what all share, and room for the rest. It is on this machine, since a database is none
    for a network's disk."""
    local.link_pack(shared)
    _remove_left()
    base = Path(tempfile.mkdtemp(prefix=OWN))
    for name in SHARED:
        (shared / name).mkdir(parents=True, exist_ok=True)
        (base / name).symlink_to((shared / name).resolve(), target_is_directory=True)
    return base


def _remove_left() -> None:
    """Remove the folders of hosts whose keeper was killed, and so could not."""
    for kept_by in Path(tempfile.gettempdir()).glob(f"{OWN}*/{KEPT_BY}"):
        with contextlib.suppress(OSError, ValueError):
            if kept_by.stat().st_uid == os.getuid() and not runs(int(kept_by.read_text())):
                shutil.rmtree(kept_by.parent)


def cores_of(spec: HostSpec, number: int) -> str:
    """The processors of worker `number`: `threads` of them, no two workers the same ones while there are enough."""
    if not (spec.pin and spec.threads and hasattr(os, "sched_getaffinity")):
        return "all"
    cores = sorted(os.sched_getaffinity(0))
    first = number * spec.threads
    return ",".join(str(cores[(first + i) % len(cores)]) for i in range(min(spec.threads, len(cores))))


def processor() -> str:
    """The name of this machine's processor, or empty."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""
