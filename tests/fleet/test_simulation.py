"""A sample of benchmarks/fleet.py: 200 rows on workers that die, by a driver that is ended and begun again. And its accounts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import fleet as bench
from benchmarks.fleet_host import Ills, Pace, PlayedHosts
from benchmarks.fleet_simulated import (
    FOLDER,
    LOG,
    RESULTS,
    VIDEOS,
    WORKFLOW,
    Scenario,
    lines,
    manifest,
    outcome,
    tries,
    whole,
)
from fleet.cluster import Share
from fleet.driver import Driver, Settings
from fleet.manifest import read_manifest
from fleet.results import Books
from fleet.worker import Worker

SAMPLE = Scenario("a sample", 200, (97, 9601), Ills(host_dies=6.0, process_dies=8.0), workers=2, pace=Pace(beat=0.2))


class Ended(Exception):
    """The driver is gone, in the midst of its work."""


class Fragile(Driver):
    """Goes once so many rows are finished."""

    def _look(self) -> None:
        if self.seen.finished >= 60:
            raise Ended
        super()._look()


def life(machines, folder, kind) -> int:
    """One driver on new workers, until it ends; how many rows it did not finish."""
    hosts = PlayedHosts(folder / FOLDER / VIDEOS, folder / LOG, WORKFLOW, SAMPLE.slots, SAMPLE.pace, SAMPLE.ills)
    actors = machines.start(SAMPLE.workers, Share(), hosts, hosts.output, "", slots=SAMPLE.slots, kind=Worker)
    books = Books(folder / FOLDER)
    left, settings = books.unfinished(read_manifest(folder / "batch.jsonl")), Settings(output=VIDEOS, tries=9)
    driver = kind(books, left, actors, SAMPLE.slots, settings, quiet=True, output=hosts.output)
    try:
        return driver.run()
    finally:
        machines.end(actors)


def test_no_row_is_lost_and_little_is_made_twice(ray_here, tmp_path):
    manifest(SAMPLE, tmp_path)
    with pytest.raises(Ended):
        life(ray_here, tmp_path, Fragile)
    between = len(lines(tmp_path / FOLDER / RESULTS))
    assert 60 <= between < 200
    assert life(ray_here, tmp_path, Driver) == 0
    told = lines(tmp_path / FOLDER / RESULTS)
    assert [each["outcome"] for each in told] == ["finished"] * 200
    assert len({each["name"] for each in told}) == 200, "none is told twice"
    found = outcome(SAMPLE, tmp_path, [])
    assert (found.rows, found.lost, found.given_up) == (200, 0, 0)
    # what was under way when a driver ended or a worker died is no more than 16 rows each time
    assert 0 <= found.twice < 0.5 and found.went_on <= 16 * (found.deaths + 1)
    assert 0 < found.overhead < 5 and 0 < found.idle < 1
    cells = bench.row(SAMPLE, found)
    assert len(cells) == len(bench.HEADER) and cells[-1] == "**0**"
    assert cells[-1] in bench.page([cells], 60.0, 0.5)


def test_a_video_is_whole_with_every_frame_once(tmp_path):
    cases = {"[[0, 9]]": True, "[[0, 5], [5, 9]]": True, "[[0, 4], [5, 9]]": False, "[[0, 6], [5, 9]]": False,
             "[[0, 8]]": False, "[[1, 9]]": False, "[]": False, "": False}  # fmt: skip
    for text, good in cases.items():
        (tmp_path / "v.mp4").write_text(text)
        assert whole(tmp_path / "v.mp4", 9) is good, text
    assert not whole(tmp_path / "absent.mp4", 9)


def batch(folder, told: list[dict], rows: dict[str, int], made: dict[str, str]) -> None:
    """A batch's folder as it is left: the table, lines of the played hosts, finished rows and what their files say."""
    (folder / LOG).mkdir()
    (folder / FOLDER).mkdir()
    (folder / "batch.jsonl").write_text("".join(json.dumps({"name": n, "5.length": k}) + "\n" for n, k in rows.items()))
    (folder / LOG / "0-a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told) + '{"torn')
    results = [{"name": name, "outcome": "finished", "file": name, "tries": 1} for name in made]
    (folder / FOLDER / RESULTS).write_text("".join(json.dumps(each) + "\n" for each in results))
    for name, text in made.items():
        (folder / FOLDER / name).write_text(text)


def line(what: str, at: float, row: str, first: int, done: int) -> dict:
    return {
        "what": what,
        "at": at,
        "row": row,
        "prompt": f"{row}{first}",
        "first": first,
        "done": done,
        "seconds_a_frame": 0.1,
    }


def test_the_accounts_are_those_of_a_sum_by_hand(tmp_path):
    """Two slots. a: 0 to 10 s. b: begun at 0, saved at 2 s with 20 frames, its host dies at 4 s with 40; the rest from 5 to 13 s.
    c: begun at 10 s, and the driver that had it is killed at 12 s; nobody takes it up."""
    told = [
        line("begun", 0.0, "a", 0, 0), line("ended", 10.0, "a", 0, 100),
        line("begun", 0.0, "b", 0, 0), line("saved", 2.0, "b", 0, 20), line("lost", 4.0, "b", 0, 40),
        line("begun", 5.0, "b", 20, 20), line("ended", 13.0, "b", 20, 100),
        line("begun", 10.0, "c", 0, 0),
    ]  # fmt: skip
    batch(tmp_path, told, {"a": 100, "b": 100, "c": 100}, {"a": "[[0, 100]]", "b": "[[0, 20], [20, 100]]"})
    found = outcome(replace(SAMPLE, workers=1, slots=2), tmp_path, [12.0])
    assert (found.rows, found.lost, found.deaths, found.seconds) == (3, 1, 2, 13.0)
    assert found.twice == pytest.approx((100 + 40 + 80 + 20 - 200) / 200)
    # the last row is begun at 10 s; until then a worked 10 s and b 4 + 5
    assert found.overhead == pytest.approx((20 - 19) / 4) and found.idle == pytest.approx(1 / 20)
    assert found.idle_to_the_end == pytest.approx(1 - (10 + 4 + 8 + 2) / 26)


def test_a_row_whose_file_lacks_a_frame_is_lost(tmp_path):
    told = [
        line("begun", 0.0, "a", 0, 0),
        line("ended", 10.0, "a", 0, 100),
        line("begun", 1.0, "b", 0, 0),
        line("ended", 11.0, "b", 0, 100),
    ]
    batch(tmp_path, told, {"a": 100, "b": 100}, {"a": "[[0, 100]]", "b": "[[0, 20], [21, 100]]"})
    assert outcome(replace(SAMPLE, workers=1, slots=2), tmp_path, []).lost == 1


def test_a_try_that_was_saved_after_its_driver_was_killed_counts_until_then(tmp_path):
    (tmp_path / LOG).mkdir()
    told = [line("begun", 0.0, "a", 0, 0), line("saved", 3.0, "a", 0, 30)]
    (tmp_path / LOG / "0.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    (one,) = tries(tmp_path / LOG, [2.0], {"a": 100})
    assert (one.frames, one.ended) == (30, 3.0)
