"""Two workers with real ComfyUIs and the demo model, one of them killed: no frame lost, doubled or made differently."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from tables import lines_of, rows_of

from fleet.host import HostSpec
from fleet.worker import Worker

FRAMES = 129
# prints a hash of each frame's own numbers (ffv1 is lossless), with the host's packages
HASHES = (
    "import av, hashlib, sys\n"
    "with av.open(sys.argv[1]) as file:\n"
    "    for frame in file.decode(video=0):\n"
    "        print(hashlib.sha256(frame.to_ndarray(format='gbrp16le').tobytes()).hexdigest())"
)


def frames_in_file(path: Path) -> list[str]:
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], "-c", HASHES, path], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def kill_first_with_a_state(fleet, killed: list[str]) -> None:
    """kill -9 of the worker whose video has left an autosave."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for state in fleet.output.glob("*/*.state.safetensors"):
            told = next(told for told in lines_of(fleet.folder / "tries.jsonl") if told["name"] == state.parent.name)
            os.kill(int(told["place"].rpartition(" ")[2]), signal.SIGKILL)
            killed.append(state.parent.name)
            return
        time.sleep(0.02)


def test_a_killed_workers_video_goes_on_on_the_other(fleet, tmp_path):
    if not {"COMFYUI_PATH", "COMFYUI_PYTHON"} <= set(os.environ):
        pytest.exit("COMFYUI_PATH or COMFYUI_PYTHON is not set: run `python3 run.py test fleet`", returncode=2)
    same = {"5.length": FRAMES, "4.codec": "ffv1", "4.autosave_seconds": 1, "4.keep_state": False}
    rows = rows_of(tmp_path, same, same)
    hosts = HostSpec(tmp_path / "base", fleet.output, tmp_path / "logs", threads=1, pin=True)
    killed: list[str] = []
    watch = lambda driver: threading.Thread(target=kill_first_with_a_state, args=(fleet, killed), daemon=True).start()  # noqa: E731
    assert fleet.run(rows, hosts, kind=Worker, meanwhile=watch) == 0
    results = fleet.results()
    (lost,) = killed
    (other,) = {"v1", "v2"} - {lost}
    assert results[lost]["tries"] == 2 and results[other]["tries"] == 1
    first, second = (told["worker"] for told in lines_of(fleet.folder / "tries.jsonl") if told["name"] == lost)
    assert first != second == results[lost]["worker"] and "went on from frame" in results[lost]["went_on"][0]
    report = json.loads((fleet.output / results[lost]["report"]).read_text())
    assert 0 < report["frames"] < report["frames_total"] == FRAMES
    joined, whole = (frames_in_file(fleet.output / results[name]["file"]) for name in (lost, other))
    assert len(whole) == len(set(whole)) == FRAMES and joined == whole
