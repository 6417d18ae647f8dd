"""The oldest packages that requirements.txt promises, in a folder of their own, and the tests that run with them.

    python3 run.py test bounds                                   # the lower bounds, installed into .cache/bounds once
    ADASTATE_AV_PATHS=DIR:DIR2 python3 run.py test bounds        # instead: what lies in these folders, one after the other

A folder is made with `pip install --no-deps --target DIR av==15.1.0` and goes in front of the environment's packages. The
tests are those of files, videos and plots: they alone use these packages. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tools import setup_host
from tools.setup_host import ROOT, Host, SetupError, child_env, python_version, run_pip, say, stamp_of

BOUNDS = ROOT / "requirements.txt"
NEWEST_PYTHON = (3, 12)  # matplotlib 3.8 has no packages for newer ones
TESTS = {
    "core": [
        "test_video_sink.py", "test_video_colour.py", "test_video_join.py", "test_video_tail.py", "test_metrics.py",
        "test_video_frames.py", "test_video_pairs.py", "test_codecs.py", "test_frame_files.py",
        "test_sound_in_videos.py", "test_sound_beside.py", "test_sound_file.py",
        "test_state_files.py", "test_whole_file.py", "test_checkpoints.py", "test_lora_file.py", "test_file_kinds.py",
    ],
    "host": [
        "test_stream.py", "test_sound.py", "test_frames.py", "test_codecs_in_rollouts.py", "test_continue.py", "test_analysis.py",
        "test_absorption.py", "test_models.py",
    ],
}  # fmt: skip


def lower_bounds(requirements: str) -> list[str]:
    """`av>=14.2` as `av==14.2`, for each line; ValueError for a line that promises no oldest version."""
    lines = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    found = {line: re.fullmatch(r"([\w.-]+)>=([\d.]+)", line) for line in lines if line}
    for line, parts in found.items():
        if parts is None:
            raise ValueError(
                f"requirements.txt has {line!r}; each line there is a name, >= and the oldest version tested"
            )
    return [f"{parts[1]}=={parts[2]}" for parts in found.values()]


def named_folders() -> list[Path]:
    """The folders of ADASTATE_AV_PATHS; SetupError for one that is not there."""
    folders = [Path(name).absolute() for name in os.environ.get("ADASTATE_AV_PATHS", "").split(os.pathsep) if name]
    for folder in folders:
        if not folder.is_dir():
            raise SetupError(
                f"ADASTATE_AV_PATHS names {folder}, which is no folder; make it with pip install --target."
            )
    return folders


def why_skipped(host: Host) -> str | None:
    """A sentence if the lower bounds cannot be installed here, else None."""
    if os.environ.get("COMFYUI_PATH"):
        return "COMFYUI_PATH is set, and then nothing is installed; name folders with ADASTATE_AV_PATHS"
    version = python_version(host.python) or "0"
    if tuple(map(int, version.split("."))) > NEWEST_PYTHON:
        return f"the oldest packages were never made for Python {version}"
    return None


def ensure_bounds(host: Host) -> Path:
    """Install the lower bounds unless they are there as requirements.txt has them now; returns their folder."""
    target = setup_host.CACHE / "bounds"
    stamp = stamp_of(BOUNDS, str(python_version(host.python)))
    mark = target / "adastate-setup.txt"
    if mark.is_file() and mark.read_text() == stamp:
        return target
    wanted = lower_bounds(BOUNDS.read_text())
    say(f"Installing the oldest packages that are promised ({', '.join(wanted)}) into {target}, once.")
    with setup_host.setup_lock(), setup_host.temporary_folder("bounds-") as folder:
        new = folder / "new"
        options = ["install", "--no-deps", "--only-binary", ":all:", "--target", str(new)]
        run_pip(host.python, [*options, *wanted], setup_host.CACHE / "setup-bounds.log")
        (new / mark.name).write_text(stamp)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
    return target


def versions(host: Host, folder: Path) -> str:
    """`av 14.2.0, kornia 0.7.1`: the packages of requirements.txt that this folder brings."""
    names = [bound.partition("==")[0] for bound in lower_bounds(BOUNDS.read_text())]
    code = (
        "import importlib.metadata as m, sys; found = {d.name.lower(): d.version for d in m.distributions(path=sys.argv[1:2])}; "
        "print(', '.join(f'{n} {found[n.lower()]}' for n in sys.argv[2:] if n.lower() in found))"
    )
    command = [host.python, "-c", code, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env())
    return done.stdout.strip() or str(folder)
