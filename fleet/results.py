"""The batch's books, in its folder: results.jsonl, what became of each row; tries.jsonl, which row was begun where.

Shared storage is taken for ordinary (NFS): a name can be created exclusively, and nobody else appends to a file of this driver.
That it is the only one is held by driver.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from .errors import FleetError
from .manifest import Row
from .reading import parsed

RESULTS, TRIES, DRIVER = "results.jsonl", "tries.jsonl", "driver.json"
FINISHED = "finished"
_BEAT, _STALE = 10.0, 60.0  # seconds between two signs of life; after which a driver counts as gone


class Lines:
    """A file of JSON lines that is appended to. A last line that a kill cut off is passed over, and what follows begins a new
    one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        found = []
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return found
        for line in text.split(b"\n"):
            with contextlib.suppress(ValueError):
                told = parsed(line)
                if isinstance(told, dict):
                    found.append(told)
        return found

    def append(self, told: dict[str, Any], sync: bool = True) -> None:
        """Add a line; `sync`: it is on the disk when this returns."""
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                file.seek(0, os.SEEK_END)
            else:
                torn = False
            file.write((b"\n" if torn else b"") + json.dumps(told).encode() + b"\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())


class Books:
    """What is known of a batch's rows from earlier drivers, and what this one adds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._results, self._tries = Lines(folder / RESULTS), Lines(folder / TRIES)
        self.results = {told["name"]: told for told in self._results.read() if isinstance(told.get("name"), str)}
        self._begun: dict[str, str] = {}  # name -> digest of the row that its plain folder belongs to
        self.devices: dict[tuple[str, str], str] = {}  # (name, digest) -> the kind of device of the newest try
        for told in self._tries.read():
            if isinstance(told.get("name"), str) and isinstance(told.get("digest"), str):
                self._begun.setdefault(told["name"], told["digest"])
                self.devices[told["name"], told["digest"]] = str(told.get("device", ""))

    def take_records(self, records: list[dict[str, Any]]) -> None:
        """Results that a store knows of and this folder does not."""
        for record in records:
            if self.results.get(record["name"], {}).get("outcome") != FINISHED:
                self.result(record)

    def unfinished(self, rows: list[Row]) -> list[Row]:
        """The rows that are still to be made. FleetError for one that was finished with other values."""
        left, faults = [], []
        for row in rows:
            told = self.results.get(row.name, {})
            if told.get("outcome") != FINISHED:
                left.append(row)
            elif told.get("digest") != row.digest:
                faults.append(
                    f"line {row.line}: {row.name!r} is finished, with other values; give this row another name"
                )
        if faults:
            raise FleetError("\n".join(faults[:20]))
        return left

    def folder_of(self, row: Row) -> str:
        """The folder of a row's files: its name, and for other values than the first ones under that name more."""
        return row.name if self._begun.get(row.name, row.digest) == row.digest else f"{row.name}-{row.digest[:6]}"

    def begin(self, row: Row, worker: str, device: str, number: int, place: str = "") -> None:
        """A row is given to a worker; known before the worker is."""
        self._begun.setdefault(row.name, row.digest)
        self.devices[row.name, row.digest] = device
        told = {"name": row.name, "digest": row.digest, "try": number, "worker": worker, "device": device}
        self._tries.append(told | {"place": place, "at": _now()}, sync=False)

    def result(self, told: dict[str, Any]) -> None:
        """What became of a row."""
        self.results[told["name"]] = told
        self._results.append(told)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class OneDriver:
    """Holds a batch's folder for one driver, for a `with` block. One that was killed is taken over from at once on the same
    machine, and elsewhere when it has given no sign of life for a minute."""

    def __init__(self, folder: Path) -> None:
        self.path, self._end = folder / DRIVER, threading.Event()
        self._own = {"machine": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}

    def __enter__(self) -> OneDriver:
        while not self._create():
            self._take_away()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._read() == self._own:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as out:
            out.write(json.dumps(self._own))
        return True

    def _read(self) -> dict[str, Any]:
        try:
            told = parsed(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def _take_away(self) -> None:
        """Remove the file of a driver that is gone; FleetError if it is not."""
        told = self._read()
        try:
            age = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        here = told.get("machine") == self._own["machine"] and isinstance(told.get("pid"), int)
        if (here and told["pid"] != os.getpid() and runs(told["pid"])) or (not here and age < _STALE):
            raise FleetError(
                f"another driver ({told.get('machine', 'unknown')}, process {told.get('pid', 'unknown')}) is at work in "
                f"{self.path.parent}; wait for it, or end it and try again after a minute"
            )
        # of several who see this, one gets to rename it
        with contextlib.suppress(FileNotFoundError):
            gone = self.path.with_name(f"{DRIVER}.{self._own['id']}")
            self.path.rename(gone)
            gone.unlink()

    def _beat(self) -> None:
        while not self._end.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def runs(pid: int) -> bool:
    """Whether a process of this machine is there; no number that none can have."""
    if not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
