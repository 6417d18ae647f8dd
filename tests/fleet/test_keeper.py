"""The program beside every host: it ends with whoever started it, with all that it started and its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tables import ROOT

from fleet import host

KEEPER = ROOT / "fleet" / "keeper.py"
# a program that has a child of its own, and says both ids
PROGRAM = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen(['sleep', '60'])\n"
    "print(os.getpid(), child.pid, *sorted(os.sched_getaffinity(0)), flush=True)\n"
    "time.sleep(60)"
)


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends within this time; one that nobody has waited for counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def start(folder: Path, cores: str = "all") -> subprocess.Popen:
    folder.mkdir()
    command = [sys.executable, KEEPER, cores, folder, sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_closed_input_ends_all_of_it(tmp_path):
    with start(tmp_path / "own") as keeper:
        pids = [int(each) for each in keeper.stdout.readline().split()[:2]]
        keeper.stdin.close()
        assert all(gone(pid) for pid in pids) and keeper.wait(20) != 0 and not (tmp_path / "own").exists()


def test_kill_9_of_who_started_it_ends_all_of_it(tmp_path):
    (tmp_path / "own").mkdir()
    starter = "import subprocess, sys, time\nsubprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)\ntime.sleep(60)"
    command = [sys.executable, KEEPER, "all", tmp_path / "own", sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        [sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        pids = [int(each) for each in parent.stdout.readline().split()[:2]]
        os.kill(parent.pid, signal.SIGKILL)
        assert all(gone(pid) for pid in pids)
    end = time.monotonic() + 20
    while (tmp_path / "own").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not (tmp_path / "own").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_kill_9_of_the_keeper_itself_ends_its_program_and_the_next_start_clears_up(tmp_path, monkeypatch):
    """Ray ends the children of a worker that died with SIGKILL, and the keeper is one."""
    monkeypatch.setattr(host.tempfile, "tempdir", str(tmp_path))
    with start(tmp_path / f"{host.OWN}left") as keeper, start(tmp_path / f"{host.OWN}runs") as other:
        pid = int(keeper.stdout.readline().split()[0])
        other.stdout.readline()
        keeper.kill()
        assert gone(pid)
        keeper.wait(20)
        host._remove_left()
        assert [path.name for path in tmp_path.iterdir()] == [f"{host.OWN}runs"] and other.poll() is None
        other.stdin.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes to processors")
def test_it_has_the_processors_that_it_is_given(tmp_path):
    core = max(os.sched_getaffinity(0))
    with start(tmp_path / "own", str(core)) as keeper:
        told = keeper.stdout.readline().split()
        keeper.stdin.close()
    assert told[2:] == [str(core)]


def test_it_ends_as_its_program_does(tmp_path):
    (tmp_path / "own").mkdir()
    command = [sys.executable, KEEPER, "all", tmp_path / "own", sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as keeper:
        assert keeper.wait(20) == 7
