"""Finished rows go to a real S3 server, which runs here: moto's."""

from __future__ import annotations

import json

import fsspec
import pytest
import requests
from moto.server import ThreadedMotoServer
from tables import LONG

from benchmarks.fleet_host import Pace, PlayedHosts
from fleet.errors import FleetError
from fleet.graph import with_values
from fleet.results import Books
from fleet.store import RECORD, Store
from fleet.worker import Task, Worker

ADDRESS = "s3://videos/batch"


@pytest.fixture
def s3(monkeypatch):
    """A server with the bucket `videos`, which fsspec is told of as a user's environment would."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    requests.post(f"{url}/moto-api/reset").raise_for_status()  # what a test before has left in this process
    options = {
        "key": "a", "secret": "b", "endpoint_url": url, "client_kwargs": {"region_name": "eu-central-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }  # fmt: skip
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("videos")
    yield server
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def worker(s3, tmp_path):
    hosts = PlayedHosts(tmp_path / "videos", tmp_path / "played", LONG, pace=Pace(beat=0.05))
    made = Worker(0, hosts, hosts.output, ADDRESS)
    made.ready()
    yield made
    made._host.end()


def task(name: str, length: int = 97) -> Task:
    graph = with_values(json.loads(LONG.read_text()), {"5.length": length, "4.keep_state": False})
    return Task(name, graph, name, length, ("5.length",), "digest")


def far(name: str) -> bytes:
    with fsspec.open(f"{ADDRESS}/{name}") as file:
        return file.read()


def test_a_finished_row_is_copied_there_then_named(worker, tmp_path):
    told = worker.run(task("v1"))
    assert told["outcome"] == "finished" and told["files"] == [f"{ADDRESS}/v1/v1_00001_.mp4"]
    assert far("v1/v1_00001_.mp4") == (tmp_path / "videos" / "v1" / "v1_00001_.mp4").read_bytes() == b"[[0, 97]]"
    assert json.loads(far("v1/v1_00001_.report.json"))["ended"] == "whole"
    (record,) = Store(ADDRESS).finished()
    assert (record["name"], record["digest"], record["files"]) == ("v1", "digest", told["files"])
    # another driver, with a folder that knows nothing, takes it from there
    books = Books(tmp_path / "new")
    books.take_records(Store(ADDRESS).finished())
    assert books.results["v1"]["files"] == told["files"]


def test_a_worker_that_is_lost_before_that_leaves_the_row_unfinished(worker, tmp_path, monkeypatch):
    def lost(self, name, record):
        raise KeyboardInterrupt  # it ends here, with all files copied and nothing said

    with monkeypatch.context() as patched:
        patched.setattr(Store, "finish", lost)
        with pytest.raises(KeyboardInterrupt):
            worker.run(task("v1"))
    assert far("v1/v1_00001_.mp4") and Store(ADDRESS).finished() == []
    again = worker.run(task("v1"))
    assert again["outcome"] == "finished" and again["note"] == "it was whole already"
    assert [record["name"] for record in Store(ADDRESS).finished()] == ["v1"]
    assert len(list((tmp_path / "videos" / "v1").glob("*.mp4"))) == 1, "and it is not made twice"


def test_a_server_that_goes_is_told_and_the_row_is_tried_again(worker, s3):
    s3.stop()
    told = worker.run(task("v1"))
    assert told["outcome"] == "again" and told["reason"].startswith("its files did not arrive: ")


def test_many_rows_and_large_files(s3, tmp_path):
    """Beyond one page of a listing's 1000 names would take minutes; a file of several parts does not."""
    store = Store(ADDRESS)
    store.check()
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(range(256)) * 4096 * 60)  # 60 MiB: more than one part of an upload
    (address,) = store.put("large", [large])
    assert fsspec.filesystem("s3").info(address)["size"] == large.stat().st_size
    for number in range(30):
        store.finish(f"row{number}", {"name": f"row{number}"})
    fsspec.filesystem("s3").pipe_file(f"{ADDRESS}/torn/{RECORD}", b'{"name": ')
    assert {record["name"] for record in store.finished()} == {f"row{number}" for number in range(30)}


def test_a_bucket_that_is_not_there_is_told_before_anything_is_made(s3):
    with pytest.raises(FleetError, match="nothing can be written to s3://absent/batch"):
        Store("s3://absent/batch").check()
    assert fsspec.filesystem("s3").ls("", refresh=True) == ["videos"], "nobody asked for another bucket"
