"""Ray: one on this machine, or a cluster that is there already; workers as its actors."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor without a GPU sees none
# Ray's clusters ask for a token, and a client shows the one that it has only if told so before Ray is imported
_TOKEN = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
if "ray" not in sys.modules and (os.environ.get("RAY_AUTH_TOKEN") or _TOKEN.is_file()):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
import ray  # noqa: E402

from tools.setup_host import ROOT  # noqa: E402

from .errors import FleetError  # noqa: E402
from .reading import read_yaml_table  # noqa: E402
from .worker import Hosts, Worker  # noqa: E402

STORE_BYTES = 100 * 2**20  # of Ray's object store: nothing large goes through it


@dataclass(frozen=True)
class Share:
    """What a worker has of its machine. `threads` of 0 leaves that to its host."""

    gpus: float = 0
    cpus: float = 0
    threads: int = 0


class Cluster:
    """A connection to Ray, for a `with` block. Without an address one is started here, and ended with it."""

    def __init__(self, address: str | None, runtime_env: Path | None = None, dashboard: bool = False) -> None:
        """FleetError for a runtime environment that cannot be read."""
        self.address, self._dashboard = address, dashboard
        self._env: dict[str, Any] = {}
        if runtime_env is not None:
            try:
                self._env = read_yaml_table(runtime_env)
            except ValueError as error:
                raise FleetError(f"{runtime_env} cannot be read as a runtime environment: {error}") from error
        if "working_dir" not in self._env:  # the checkout is in a shared folder, or this is the machine
            named = self._env.setdefault("env_vars", {})
            named.setdefault("PYTHONPATH", str(ROOT))

    def __enter__(self) -> Cluster:
        asked: dict[str, Any] = {"runtime_env": self._env, "logging_level": "error", "log_to_driver": False}
        if self.address:
            asked["address"] = self.address
        else:
            asked |= {"include_dashboard": self._dashboard, "object_store_memory": STORE_BYTES}
        try:
            ray.init(**asked)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise FleetError(f"Ray at {self.address or 'this machine'} cannot be used: {error}", code=1) from error
        return self

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def workers(self, asked: int, threads: int) -> tuple[int, Share]:
        """How many workers there are, and what each has. FleetError where there is nothing to tell it by."""
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        if gpus or (self.address and asked and not threads):
            return asked or gpus, Share(
                gpus=1 if not asked or asked <= gpus or self.address else gpus / asked, threads=threads
            )
        count = asked or 1
        if self.address and not asked:
            raise FleetError("this cluster has no GPU now; say with --workers how many workers there are to be")
        return count, Share(cpus=0 if not self.address else threads, threads=threads or max(1, cpus // count))

    def start(
        self,
        count: int,
        share: Share,
        hosts: Hosts,
        output: Path | None,
        into: str = "",
        slots: int = 1,
        kind: type = Worker,
        names: list[str] | None = None,
    ) -> dict[str, Any]:
        """Handles of the workers' actors by name. Ray starts one that dies again, on another machine if it has to."""
        actor = ray.remote(kind).options(
            num_gpus=share.gpus, num_cpus=share.cpus, max_restarts=-1, max_task_retries=0, max_concurrency=slots + 3
        )
        names = names or [f"worker {number}" for number in range(count)]
        return {name: actor.remote(number, hosts, output, into) for number, name in enumerate(names)}

    def end(self, actors: dict[str, Any], at_once: bool = True) -> None:
        """End the workers, and with them the hosts that they started. Not `at_once`: prompts that still run on other hosts
        first."""
        if not at_once:
            with contextlib.suppress(Exception):
                ray.wait([actor.interrupt.remote() for actor in actors.values()], num_returns=len(actors), timeout=5)
        for actor in actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)


@contextlib.contextmanager
def two_signals(first: Callable[[], None], second: Callable[[], None] | None = None) -> Iterator[None]:
    """Within, the first Ctrl-C (or SIGTERM) calls `first`, the next one `second`, and a further one raises KeyboardInterrupt."""
    steps = iter([each for each in (first, second) if each is not None])

    def told(*_: object) -> None:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    names = [signal.SIGINT, signal.SIGTERM]
    before = {name: signal.signal(name, told) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
