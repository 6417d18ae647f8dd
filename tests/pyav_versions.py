"""The tests of videos under other versions of PyAV than the environment's: each has to write files that play.

    pip install --no-deps --target DIR av==14.2.0          # a folder a version
    ADASTATE_AV_PATHS=DIR:DIR2 python tests/pyav_versions.py [pytest arguments]

The core's tests of files always run; those of the streams on the host too, where COMFYUI_PATH names one. One line a version
says how it went; the exit code is 0 if all passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LAYERS = {
    "core": [
        "test_video_sink.py",
        "test_video_tail.py",
        "test_metrics.py",
        "test_video_frames.py",
        "test_video_pairs.py",
    ],
    "host": ["test_stream.py", "test_continue.py", "test_analysis.py"],
}


def run(folder: str, layer: str, arguments: list[str]) -> tuple[int, str]:
    """The exit code and the last line of one layer's tests with PyAV from `folder`."""
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, "-m", "pytest", *LAYERS[layer], *arguments]
    done = subprocess.run(command, cwd=TESTS / layer, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was said"]
    if done.returncode:
        print("\n".join(lines))  # noqa: T201
    return done.returncode, lines[-1]


def version(folder: str) -> str:
    """What `import av` gives with `folder` in front."""
    command = [sys.executable, "-c", "import av; print(av.__version__)"]
    environment = os.environ | {"PYTHONPATH": folder}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    folders = [folder for folder in os.environ.get("ADASTATE_AV_PATHS", "").split(os.pathsep) if folder]
    if not folders:
        print("ADASTATE_AV_PATHS names no folder; see the first lines of this file")  # noqa: T201
        return 2
    layers = ["core", "host"] if os.environ.get("COMFYUI_PATH") else ["core"]
    failed = 0
    for folder in folders:
        for layer in layers:
            code, last = run(folder, layer, arguments)
            failed += bool(code)
            print(f"PyAV {version(folder)} {layer}: {last}", flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
