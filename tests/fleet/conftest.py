"""One Ray on this machine for all tests that need it, with actors that play hosts or start real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
    """A batch in a folder, run by as many drivers as a test asks for."""

    def __init__(self, machines: Cluster, folder: Path) -> None:
        self.machines, self.folder, self.output = machines, folder, folder / "videos"
        self.driver: Driver | None = None

    def run(
        self, rows: list[Row], hosts, workers: int = 2, into: str = "", meanwhile=None, kind=QuickWorker, **settings
    ) -> int:
        """How many rows were not finished."""
        actors = self.machines.start(workers, Share(), hosts, self.output, into, kind=kind)
        books = Books(self.folder)
        self.driver = Driver(books, books.unfinished(rows), actors, settings=Settings(**settings), output=self.output)
        try:
            if meanwhile is not None:
                meanwhile(self.driver)
            return self.driver.run()
        finally:
            self.machines.end(actors)

    def results(self) -> dict[str, dict]:
        return Books(self.folder).results


@pytest.fixture
def fleet(ray_here, tmp_path) -> Fleet:
    return Fleet(ray_here, tmp_path / "into")
