"""A door for files, tried in a child process of its own: under limits, and watched for whatever a file should not bring about.

The child is a fork, so a crash, a hang and gigabytes are its own, and what it has loaded is what the tests have loaded.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# seconds of the processor: others may be at work beside it. One that waits has so many times as long
SECONDS, MEGABYTES, PATIENCE = 30, 2048, 20
_ROOM = 3 * 2**30  # of addresses, beyond what the process has: a machine is not to suffer
# what only Python and its libraries say
PYTHONISMS = re.compile(
    r"\b(Traceback|[A-Z]\w+(Error|Exception)|NoneType|Expecting value|object has no|subscriptable|unhashable|positional|"
    r"NotImplemented|object is|unsupported operand|codec can't|Errno|unpack requires|list index|out of bounds|not enough values|"
    r"too many values|avcodec_\w+|cannot convert|invalid literal|dtype\('|torch\.Size)\b|0x[0-9a-f]{6,}|<class|[a-z]{2,}\(\)|/tmp/"
)
_NEVER = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "subprocess.Popen",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "urllib.Request",
    "webbrowser.open",
    "ftplib.connect",
}
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.rmtree",
    "shutil.copyfile",
    "shutil.move",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Outcome:
    """What became of a file: the sentence that refused it, empty where it went through, and what that took of the processor."""

    told: str
    seconds: float
    megabytes: float

    @property
    def held(self) -> bool:
        return not self.told


def canary(folder: Path) -> Path:
    """What code in a file would create."""
    return folder / "canary"


def tried(door: Callable[[], object], folder: Path, what: str, names: tuple[str, ...] = ()) -> Outcome:
    """Call a door in a child. AssertionError, with `what`, for anything but a result or one clear sentence: a crash, more than 30 s
    or 2 GB, code that ran, a file changed outside `folder`, an error that is no sentence or names none of `names`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    reads, writes = os.pipe()
    started, log = time.monotonic(), folder / "child.log"
    child = os.fork()
    if not child:
        os.close(reads)
        _inside(door, folder, log, writes)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        answer = pipe.read()
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    if not answer or status:
        end = log.read_text(errors="replace")[-1500:] if log.is_file() else ""
        why = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
        raise AssertionError(
            f"{what}: the process ended with {why} after {seconds:.1f} s of {time.monotonic() - started:.1f}: {end}"
        )
    told = json.loads(answer)
    assert not told["broken"], (what, "it did what no file may bring about", told["broken"])
    assert not canary(folder).exists(), (what, "code in the file ran")
    assert told["megabytes"] < MEGABYTES, (what, f"{told['megabytes']:.0f} MB", told["text"])
    check(told["kind"], told["text"], names, what, told["where"])
    return Outcome(told["text"], seconds, told["megabytes"])


def check(kind: str, text: str, names: tuple[str, ...], what: str, where: str = "") -> None:
    """One clear sentence, or nothing where `kind`, an exception's, is empty."""
    if not kind:
        return
    shown = (what, kind, text, where)
    assert kind in ("user", "ValueError", "OSError", "RuntimeError", "MemoryError"), shown
    assert 8 < len(text) < 900 and not PYTHONISMS.search(text), shown
    assert all(line.strip() for line in text.split("\n")) and text.count("\n") < 25, shown
    assert not names or any(name in text for name in names), shown
    text.encode()  # it is sent to a page as UTF-8


def _inside(door: Callable[[], object], folder: Path, log: Path, pipe: int) -> None:
    """The child's life; it does not return."""
    code = 1
    gc.freeze()  # else a collection writes to every object, and so copies every page
    try:
        _quiet(log)
        _limit()
        broken = _watch(folder)
        before = _megabytes("VmRSS")
        kind = text = where = ""
        try:
            door()
        except BaseException as error:  # noqa: BLE001  whatever it is, it is told
            kind, text, where = _kind(error), str(error), _where(error)
        grown = max(0.0, _megabytes("VmHWM") - before)
        told = {"kind": kind, "text": text, "where": where, "broken": broken[:5], "megabytes": grown}
        os.write(pipe, json.dumps(told).encode())
        code = 0
    finally:
        os._exit(code)


def _quiet(log: Path) -> None:
    """What it says goes to a file; a crash says where."""
    import faulthandler

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(file=2)


def _limit() -> None:
    """Time, addresses, threads of arithmetic: a fork has none of its parent's."""
    for name in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * PATIENCE)
    room = int(_megabytes("VmSize") * 2**20) + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")  # the highest VmRSS so far is forgotten
    import torch

    torch.set_num_threads(1)


def _watch(folder: Path) -> list[str]:
    """A list that grows by each thing done that no file may bring about."""
    broken: list[str] = []
    root = os.path.realpath(folder)
    sys.dont_write_bytecode, tempfile.tempdir = True, str(folder)

    def own(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith((root, "/dev/", "/proc/self"))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _NEVER:
            broken.append(f"{event} {args!r:.200}")
        elif event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITES and not own(path):
                broken.append(f"open {path!r:.200}")
        elif event in _CHANGES and not own(_placed(args)):
            broken.append(f"{event} {args!r:.200}")

    sys.addaudithook(hook)
    return broken


def _placed(args: tuple[Any, ...]) -> Any:
    """The path of an operation, which may be told within an open folder."""
    path, folder = args[0], args[-1]
    if isinstance(path, str) and not os.path.isabs(path) and isinstance(folder, int) and folder > 2 and len(args) > 1:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return path


def _megabytes(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


def _kind(error: BaseException) -> str:
    """The class of an error that is meant for a user, or its own name."""
    own = type(error).__module__.split(".")[0] in ("adastate_pack", "adastate_core", "fleet")
    if own:
        return "user"
    if type(error) in (ValueError, OSError, RuntimeError, MemoryError):
        return type(error).__name__
    return f"{type(error).__module__}.{type(error).__name__}"


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    places = []
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(places[-8:])
