"""The books of a batch: what a kill leaves of them, and that one driver has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from tables import ROOT, lines_of, rows_of

from fleet.errors import FleetError
from fleet.results import DRIVER, RESULTS, TRIES, Books, Lines, OneDriver


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path):
    lines = Lines(tmp_path / "a.jsonl")
    lines.append({"name": "one"})
    whole = (tmp_path / "a.jsonl").read_bytes()
    for cut in range(1, len(whole)):
        (tmp_path / "a.jsonl").write_bytes(whole + whole[:cut])
        lines.append({"name": "two"})
        assert [told["name"] for told in lines.read()] == ["one", *(["one"] if cut == len(whole) - 1 else []), "two"]


def test_what_is_finished_is_not_made_again_and_the_rest_is(tmp_path):
    rows = rows_of(tmp_path, {}, {}, {}, {})
    books = Books(tmp_path / "into")
    for row, outcome in zip(rows, ("finished", "refused", "given up"), strict=False):
        books.result({"name": row.name, "outcome": outcome, "digest": row.digest})
    assert [row.name for row in Books(tmp_path / "into").unfinished(rows)] == ["v2", "v3", "v4"]


def test_a_finished_name_with_other_values_is_told(tmp_path):
    (row,) = rows_of(tmp_path, {"5.seed": 1})
    Books(tmp_path / "into").result({"name": "v1", "outcome": "finished", "digest": row.digest})
    (other,) = rows_of(tmp_path, {"5.seed": 2})
    with pytest.raises(FleetError, match="line 1: 'v1' is finished, with other values; give this row another name"):
        Books(tmp_path / "into").unfinished([other])


def test_other_values_get_another_folder_so_no_state_of_the_first_ones_is_taken(tmp_path):
    (row,), (other,) = rows_of(tmp_path, {"5.seed": 1}), rows_of(tmp_path / "b", {"5.seed": 2})
    books = Books(tmp_path / "into")
    assert books.folder_of(row) == books.folder_of(other) == "v1"
    books.begin(row, "worker 0", "cpu", 1)
    for each in (books, Books(tmp_path / "into")):
        assert each.folder_of(row) == "v1" and each.folder_of(other) == f"v1-{other.digest[:6]}"
        assert each.devices == {("v1", row.digest): "cpu"}


def test_a_store_knows_of_rows_that_the_folder_does_not(tmp_path):
    (row,) = rows_of(tmp_path, {})
    books = Books(tmp_path / "into")
    books.take_records([{"name": "v1", "outcome": "finished", "digest": row.digest}])
    assert books.unfinished([row]) == [] and lines_of(tmp_path / "into" / RESULTS)[0]["name"] == "v1"


def test_one_driver_has_a_folder(tmp_path):
    code = (
        "import sys, time; from fleet.results import OneDriver; from pathlib import Path\n"
        "with OneDriver(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "1\n"
            with (
                pytest.raises(FleetError, match=f"another driver .*process {other.pid}.* is at work"),
                OneDriver(tmp_path),
            ):
                pass
        finally:
            other.kill()
    with OneDriver(tmp_path):  # it was killed on this machine: taken over from at once
        assert json.loads((tmp_path / DRIVER).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("age", "taken"), [(0, False), (120, True)])
def test_a_driver_of_another_machine_is_gone_after_a_minute(tmp_path, age, taken):
    path = tmp_path / DRIVER
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "id": "x"}))
    os.utime(path, (time.time() - age,) * 2)
    if taken:
        with OneDriver(tmp_path):
            assert json.loads(path.read_text())["machine"] != "elsewhere"
    else:
        with pytest.raises(FleetError, match="another driver"), OneDriver(tmp_path):
            pass
        assert json.loads(path.read_text())["machine"] == "elsewhere"


def test_tries_say_where_and_when(tmp_path):
    (row,) = rows_of(tmp_path, {})
    Books(tmp_path / "into").begin(row, "worker 3", "H200", 2, "node, process 7")
    (told,) = lines_of(tmp_path / "into" / TRIES)
    assert told["worker"] == "worker 3" and told["try"] == 2 and told["place"] == "node, process 7"
