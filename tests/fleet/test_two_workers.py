"""What benchmarks/fleet_real.py says of turns that were measured, and whom it kills. The measurement itself takes minutes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from benchmarks.fleet_real import Turn, kill_one, page, table


def turn(workers: int, seconds: float, killed: str = "") -> Turn:
    lines = {
        name: {"tries": 1 + (name == killed), "went_on": ["went on from frame 93 on worker 0"]} for name in ("v1", "v2")
    }
    return Turn(workers, seconds, 1026, dict.fromkeys(lines), lines, killed)


def test_the_page_has_the_ratio_turn_by_turn():
    alone, two = [turn(1, 40.0), turn(1, 44.0)], [turn(2, 20.0), turn(2, 27.5)]
    text = page(alone, two, turn(2, 30.0, "v2"), 2, "a processor")
    assert "**Two workers reach 1.80 times one worker's throughput** (turn by turn 2.00, 1.60)" in text
    assert "| one worker | 2 | 42.0 | 40.0 to 44.0 | 24.5 |" in text
    assert "| two workers, one killed in the middle | 1 | 30.0 | 30.0 to 30.0 | 34.2 |" in text
    assert (
        "Its video took 2 tries: went on from frame 93 on worker 0." in text and "2 of 2 videos of that batch" in text
    )


def test_rows_differ_by_their_seed_alone(tmp_path):
    rows = table(tmp_path, 3, 97, "v")
    assert [row.name for row in rows] == ["v1", "v2", "v3"] and {row.frames for row in rows} == {97}
    assert [row.values["5.seed"] for row in rows] == [1, 2, 3] and len({row.model for row in rows}) == 1


def test_the_worker_of_an_unfinished_video_with_a_state_is_killed(tmp_path):
    """v1 is finished, v2 has no state yet, v3 has one; its second try is the one that is under way."""
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(3)]
    try:
        told = [("v1", processes[0]), ("v3", processes[1]), ("v2", processes[0]), ("v3", processes[2])]
        text = "".join(json.dumps({"name": name, "place": f"here, process {p.pid}"}) + "\n" for name, p in told)
        (tmp_path / "tries.jsonl").write_text(text)
        (tmp_path / "results.jsonl").write_text('{"name": "v1"}\n{"name": "v2"')
        for name in ("v1", "v3"):
            (tmp_path / "videos" / name).mkdir(parents=True)
            (tmp_path / "videos" / name / f"{name}_00001_.state.safetensors").touch()
        killed: list[str] = []
        kill_one(tmp_path, 1, killed)
        assert killed == ["v3"] and processes[2].wait(10) == -signal.SIGKILL
        assert [process.poll() for process in processes[:2]] == [None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
