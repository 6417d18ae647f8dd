"""The driver with workers whose hosts are scripted, on real Ray where processes die: nothing made twice, nothing lost,
everything told."""

from __future__ import annotations

import json
import threading
import time

import pytest
from conftest import QuickWorker
from scripted_host import Script
from tables import lines_of, rows_of


def made(fleet, told: dict) -> list[list[int]]:
    """Which frames a row's file has, try by try."""
    return json.loads((fleet.output / told["file"]).read_text())


def test_every_way_that_a_row_can_end(fleet, tmp_path, capsys):
    acts = {
        "good": ["whole"],
        "bad": ["refuse"],
        "broken": ["error"],
        "nan": ["fail non_finite"],
        "short": ["fail out_of_memory", "whole"],
        "host": ["die 21", "whole"],
        "node": ["kill 33", "whole"],
        "poison": ["die", "die", "whole"],
        "further": ["die 9", "die 21", "die 33", "whole"],
        "preempted": ["kill 9", "kill 21", "kill 33", "whole"],
        "stuck": ["kill 9", "kill", "kill", "whole"],
    }
    rows = rows_of(tmp_path, *({"name": name, "5.length": 97} for name in acts))
    assert fleet.run(rows, Script(fleet.output, acts)) == 5
    found = fleet.results()
    assert {name: told["outcome"] for name, told in found.items()} == {
        "good": "finished", "bad": "refused", "broken": "failed", "nan": "failed", "short": "finished",
        "host": "finished", "node": "finished", "poison": "given up", "further": "finished", "preempted": "finished",
        "stuck": "given up",
    }  # fmt: skip
    assert found["bad"]["reason"] == "node 5 (AdaStateRollout): width is 100; try 96" and found["bad"]["tries"] == 1
    assert found["broken"]["reason"] == "SaveImage (node 9): no picture" and found["broken"]["tries"] == 1
    assert found["nan"]["reason"] == "non_finite in chunk 3" and found["nan"]["tries"] == 1
    assert found["poison"]["reason"].startswith(
        "2 tries ended on worker 0, worker 1: ComfyUI ended by itself"
    ) or found["poison"]["reason"].startswith("2 tries ended on worker 1, worker 0: ComfyUI ended by itself")
    assert made(fleet, found["host"]) == [[0, 21], [21, 97]] and made(fleet, found["node"]) == [[0, 33], [33, 97]]
    for name in ("further", "preempted"):
        assert made(fleet, found[name]) == [[0, 9], [9, 21], [21, 33], [33, 97]]
    assert found["node"]["went_on"] == [f"went on from frame 33 on {found['node']['worker']}"]
    assert found["stuck"]["tries"] == found["poison"]["tries"] == 2
    tries = lines_of(fleet.folder / "tries.jsonl")
    for name in ("host", "node", "poison", "short"):  # never where it was lost
        first, second = [told["worker"] for told in tries if told["name"] == name]
        assert first != second, name
    said = capsys.readouterr().out
    assert "node: worker" in said and "its process ended; it is tried again" in said
    assert "poison (line 8): given up: 2 tries ended on" in said


def test_a_batch_that_is_run_again_makes_only_what_is_not_finished(threads, tmp_path):
    acts = {"v2": ["refuse", "whole"], "v3": ["die 21", "die", "die", "whole"]}
    rows = rows_of(tmp_path, {}, {}, {})
    assert threads.run(rows, Script(threads.output, acts)) == 2
    begun = (threads.output / "v1" / "v1_00001_.mp4").stat().st_mtime_ns
    assert threads.run(rows, Script(threads.output, acts)) == 0
    assert (threads.output / "v1" / "v1_00001_.mp4").stat().st_mtime_ns == begun
    assert [told["name"] for told in lines_of(threads.folder / "results.jsonl")].count("v1") == 1
    assert made(threads, threads.results()["v3"]) == [[0, 21], [21, 513]]


def test_a_whole_video_whose_driver_was_killed_is_not_made_again(threads, tmp_path):
    rows = rows_of(tmp_path, {})
    assert threads.run(rows, Script(threads.output)) == 0
    (threads.folder / "results.jsonl").unlink()  # as a driver leaves it that was killed before it wrote its line
    assert threads.run(rows, Script(threads.output)) == 0
    told = threads.results()["v1"]
    assert told["file"] == "v1/v1_00001_.mp4" and told["went_on"] == ["it was whole already"]
    assert len(list((threads.output / "v1").glob("*.try"))) == 1


def test_a_stop_keeps_states_and_the_next_run_goes_on_from_them(threads, tmp_path):
    rows = rows_of(tmp_path, {}, {}, {})
    waits = {row.name: ["wait", "whole"] for row in rows}

    def stop(driver) -> None:
        threading.Thread(target=_stop_on, args=(driver, threads), daemon=True).start()

    assert threads.run(rows, Script(threads.output, waits), meanwhile=stop) == 3
    assert len(list(threads.output.glob("*/*.state.safetensors"))) == 2 and threads.results() == {}
    waits = {name: ["wait", "whole"] for name in waits if (threads.output / name).exists()}
    assert threads.run(rows, Script(threads.output, waits)) == 0
    parts = sorted(len(made(threads, told)) for told in threads.results().values())
    assert parts == [1, 2, 2]


def test_a_state_that_cannot_be_gone_on_from_is_left_for_the_start(threads, tmp_path):
    assert threads.run(rows_of(tmp_path, {}), Script(threads.output, {"v1": ["die 21", "picky"]})) == 0
    assert made(threads, threads.results()["v1"]) == [[0, 513]] and threads.results()["v1"]["tries"] == 2


def test_a_second_ctrl_c_does_not_wait_for_rows(threads, tmp_path):
    def end(driver) -> None:
        driver.stop()
        threading.Thread(target=lambda: [_until_begun(threads, 1), driver.end()], daemon=True).start()

    script = Script(threads.output, {"v1": ["hang"]})
    begin = lambda driver: threading.Thread(target=lambda: [_until_begun(threads, 1), end(driver)], daemon=True).start()  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        threads.run(rows_of(tmp_path, {}), script, workers=1, meanwhile=begin)


def _until_begun(threads, count: int) -> None:
    while len(list(threads.output.glob("*/*.try"))) < count:
        time.sleep(0.02)


def test_on_another_kind_of_device_it_says_so(threads, tmp_path):
    rows = rows_of(tmp_path, {})
    devices = {0: ("cuda:0 A", 10), 1: ("cuda:0 B", 10)}
    assert threads.run(rows, Script(threads.output, {"v1": ["die 21", "whole"]}, devices)) == 0
    told = threads.results()["v1"]
    first = "A" if told["device"] == "B" else "B"
    assert told["went_on"][0] == (
        f"goes on on {told['device']}, and was begun on {first}: its frames may differ in their last bits"
    )


def test_same_device_waits_for_one_also_for_the_next_driver(threads, tmp_path, capsys):
    rows = rows_of(tmp_path, {})
    script = Script(threads.output, {"v1": ["die 21", "wait"]}, {0: ("cuda:0 A", 10)})
    stopped = lambda driver: threading.Thread(target=_stop_on, args=(driver, threads), daemon=True).start()  # noqa: E731
    assert threads.run(rows, script, workers=1, meanwhile=stopped, same_device=True) == 1
    capsys.readouterr()
    other = Script(threads.output, {"v1": ["whole"]}, {0: ("cuda:0 B", 10)})
    patient = lambda driver: threading.Thread(target=_stop_once_told, args=(driver,), daemon=True).start()  # noqa: E731
    assert threads.run(rows, other, workers=1, meanwhile=patient, same_device=True) == 1
    assert "1 rows wait for a worker with A (--same-device)" in capsys.readouterr().out and threads.results() == {}
    again = Script(threads.output, {"v1": ["whole"]}, {0: ("cuda:0 B", 10), 1: ("cuda:1 A", 10)})
    assert threads.run(rows, again, same_device=True) == 0 and threads.results()["v1"]["device"] == "A"


def _stop_once_told(driver) -> None:
    while not driver._told_waits:
        time.sleep(0.02)
    driver.stop()


def _stop_on(driver, threads) -> None:
    _until_begun(threads, 2)
    driver.stop()


@pytest.mark.parametrize("large", [False, True])
def test_a_row_is_placed_where_it_fits_or_refused_with_what_would(threads, tmp_path, large):
    rows = rows_of(tmp_path, {}, {})
    devices = {0: ("small", 5), 1: ("large", 99 if large else 6)}
    bad = threads.run(rows, Script(threads.output, {}, devices, fits=50))
    if large:
        assert bad == 0 and {told["device"] for told in threads.results().values()} == {"large"}
    else:
        assert bad == 2 and not list(threads.output.glob("*/*.try"))
        reasons = {told["reason"] for told in threads.results().values()}
        assert reasons <= {
            f"it fits on no worker: the rollout's caches need 50 and {memory} are free; window_frames 3 would fit"
            for memory in (5, 6)
        }


def test_an_input_that_nobody_knows_is_told_and_not_passed_over(threads, tmp_path):
    assert threads.run(rows_of(tmp_path, {"5.lenght": 9}), Script(threads.output), workers=1) == 1
    assert "5.lenght: AdaStateRollout has no input lenght; it has" in threads.results()["v1"]["reason"]


def test_a_finished_row_is_named_when_it_has_arrived(threads, tmp_path):
    far = tmp_path / "far"
    assert threads.run(rows_of(tmp_path, {}), Script(threads.output), workers=1, into=f"file://{far}") == 0
    told = threads.results()["v1"]
    assert told["file"] == f"file://{far}/v1/v1_00001_.mp4" and (far / "v1" / "v1_00001_.mp4").is_file()
    assert json.loads((far / "v1" / "result.json").read_text())["digest"] == told["digest"]
    assert told["report"] == f"file://{far}/v1/v1_00001_.report.json"


def test_no_worker_that_starts_is_told(threads, tmp_path):
    from fleet.errors import FleetError
    from fleet.host import GivenHosts

    with pytest.raises(FleetError, match="no worker is left: worker 0: .*http://127.0.0.1:9"):
        threads.run(rows_of(tmp_path, {}), GivenHosts(("http://127.0.0.1:9",), patience=0.2), workers=1)


class SlowWorker(QuickWorker):
    """Its process takes its time to start, as torch on a busy machine does."""

    def __init__(self, *given) -> None:
        time.sleep(2.5)
        super().__init__(*given)


def test_a_process_that_takes_its_time_to_start_again_is_waited_for(fleet, tmp_path):
    rows = rows_of(tmp_path, {"name": "node", "5.length": 97})
    acts = {"node": ["kill 33", "whole"]}
    assert fleet.run(rows, Script(fleet.output, acts), workers=1, kind=SlowWorker) == 0
    assert made(fleet, fleet.results()["node"]) == [[0, 33], [33, 97]]
