"""A suite that is ended by SIGTERM stops what it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
SUITE = """
import pathlib, time, pytest
@pytest.fixture(scope="session")
def server():
    pathlib.Path("started").touch()
    yield
    pathlib.Path("stopped").touch()
def test_it(server):
    time.sleep(60)
def test_next(server):
    pathlib.Path("went on").touch()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_servers_are_stopped(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ended", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": HERE}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == pytest.ExitCode.INTERRUPTED
    assert (tmp_path / "stopped").exists() and not (tmp_path / "went on").exists()
