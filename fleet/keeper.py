"""Runs a program and ends it when whoever started this is gone, be it by kill -9: its standard input then ends.

  python keeper.py CORES FOLDER PROGRAM [ARGUMENT ...]

CORES are the numbers of the processors that the program may use, with commas; `all` leaves it as it is. FOLDER is the program's
own, and goes with it. On Linux the program also ends with the keeper itself, should that be killed; elsewhere it then stays.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

KEPT_BY = "keeper.pid"  # in the program's folder
PR_SET_PDEATHSIG = 1  # prctl(2)


def _end_with_parent() -> Callable[[], None] | None:
    """What the new process does before it becomes the program: it asks for SIGKILL when the thread that started it ends. None where
    there is no prctl."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(1)

    return ask


def main(cores: str, folder: str, command: list[str]) -> int:
    """Run the program; its exit status."""
    if cores != "all" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    (Path(folder) / KEPT_BY).write_text(str(os.getpid()))
    # a session of its own, so that a Ctrl-C at the terminal does not reach it, and all that it starts ends with it
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent())

    def kill() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        kill()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=watch, daemon=True).start()
    try:
        return process.wait()
    finally:
        kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
