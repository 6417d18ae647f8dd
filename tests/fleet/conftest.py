"""One Ray on this machine for all tests that need it, with actors that play hosts or start real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import thread_ray

import fleet.driver as driver_module
from fleet.cluster import Cluster, Share
from fleet.driver import Driver, Settings
from fleet.host_client import HostClient
from fleet.manifest import Row
from fleet.results import Books
from fleet.worker import Worker

HERE = Path(__file__).resolve().parent


class QuickClient(HostClient):
    """Polls often, and gives up soon."""

    def __init__(self, url: str) -> None:
        super().__init__(url, poll_seconds=0.02, patience=2.0)


class QuickWorker(Worker):
    """A worker with such a client."""

    def __init__(self, number, hosts, output, into="") -> None:
        super().__init__(number, hosts, output, into, QuickClient)


@pytest.fixture(scope="session")
def ray_here():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    machines = Cluster(None)
    machines._env["env_vars"]["PYTHONPATH"] = os.environ.pop("PYTHONPATH")
    with machines:
        yield machines


class Fleet:
    """A batch in a folder, run by as many drivers as a test asks for; `start` makes so many workers on the given hosts."""

    def __init__(
        self, start: Callable[..., dict[str, Any]], end: Callable[[dict[str, Any]], None], folder: Path
    ) -> None:
        self._start, self._end = start, end
        self.folder, self.output = folder, folder / "videos"

    def run(
        self, rows: list[Row], hosts, workers: int = 2, into: str = "", meanwhile=None, kind=QuickWorker, **settings
    ) -> int:
        """How many rows were not finished."""
        actors = self._start(workers, Share(), hosts, self.output, into, kind=kind)
        books = Books(self.folder)
        driver = Driver(books, books.unfinished(rows), actors, settings=Settings(**settings), output=self.output)
        try:
            if meanwhile is not None:
                meanwhile(driver)
            return driver.run()
        finally:
            self._end(actors)

    def results(self) -> dict[str, dict]:
        return Books(self.folder).results


@pytest.fixture
def fleet(ray_here, tmp_path) -> Fleet:
    """Workers are processes, by Ray."""
    return Fleet(ray_here.start, ray_here.end, tmp_path / "into")


@pytest.fixture
def threads(tmp_path, monkeypatch) -> Fleet:
    """Workers are objects of this process, called in threads."""
    monkeypatch.setattr(driver_module, "ray", thread_ray)

    def start(count, share, hosts, output, into, kind):
        return {f"worker {number}": thread_ray.Actor(kind(number, hosts, output, into)) for number in range(count)}

    def end(actors):
        for actor in actors.values():
            actor.end()

    return Fleet(start, end, tmp_path / "into")
