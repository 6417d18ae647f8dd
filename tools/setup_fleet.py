"""The environment of fleet/ for run.py: Ray and what else fleet/requirements.txt names, in .cache/fleet-env. Standard library only.

It never is the host's interpreter, also with COMFYUI_PATH. The tests of it add what they need to the same environment.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from . import setup_host
from .setup_host import ROOT, SetupError, child_env, duration, python_version, run_pip, say, setup_lock, venv_python

REQUIREMENTS = ROOT / "fleet" / "requirements.txt"
TESTED = ROOT / "tests" / "fleet" / "requirements.txt"
DASHBOARD = ROOT / "fleet" / "requirements-dashboard.txt"
NEEDED_GB = 0.8  # measured: 0.31 to stay, and while pip is at work what it fetches


def ensure_fleet(*also: Path) -> Path:
    """Make or complete the environment; its interpreter. `also`: further lists of requirements. SetupError as for the host's."""
    folder = setup_host.CACHE / "fleet-env"
    python = venv_python(folder)
    missing = [each for each in (REQUIREMENTS, *also) if not _installed(folder, each)]
    if not missing:
        return python
    with setup_lock():
        missing = [each for each in (REQUIREMENTS, *also) if not _installed(folder, each)]
        if not missing:
            return python
        started = time.monotonic()
        setup_host.check_venv_module()
        setup_host.check_disk(ROOT, NEEDED_GB)
        if python_version(python) is None or not setup_host.has_pip(python):
            say(f"Making the fleet's own environment in {folder}.")
            make_venv(folder)
            missing = [REQUIREMENTS, *also]
        setup_host.remove_half_installed(folder)
        for each in missing:
            say(f"Installing {each.relative_to(ROOT)}.")
            run_pip(python, ["install", "--no-input", "-r", str(each)], setup_host.CACHE / "setup-fleet.log")
            setup_host.write_whole(_stamp(folder, each), _told(python, each))
        say(f"The fleet's environment is ready ({duration(time.monotonic() - started)}).")
    return python


def make_venv(folder: Path) -> None:
    """An empty virtual environment. SetupError if this Python cannot make one."""
    if subprocess.run([sys.executable, "-m", "venv", "--clear", folder], env=child_env()).returncode:
        raise SetupError(f"Python could not make a virtual environment in {folder}; the lines above say why.", code=1)


def _stamp(folder: Path, requirements: Path) -> Path:
    return folder / f"adastate-{'-'.join(requirements.relative_to(ROOT).with_suffix('').parts)}.txt"


def _told(python: Path, requirements: Path) -> str:
    return f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} python {python_version(python)}\n"


def _installed(folder: Path, requirements: Path) -> bool:
    stamp, python = _stamp(folder, requirements), venv_python(folder)
    return stamp.is_file() and python.exists() and stamp.read_text() == _told(python, requirements)
