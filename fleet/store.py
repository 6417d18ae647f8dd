"""Where results lie that go further than the shared folder: any address that fsspec knows (s3://, gs://, file://, ...)."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

import fsspec

from .errors import FleetError
from .reading import parsed

RECORD = "result.json"
BUCKETS = frozenset("s3 s3a gs gcs az abfs abfss adl oss r2".split())  # have no folders; making one makes a bucket


def is_address(into: str) -> bool:
    """Whether this is an address and not a folder."""
    return "://" in into


class Store:
    """A folder at an fsspec address. A row's files are copied to `NAME/`, and its `result.json` is written there last: what has
    none is not finished."""

    def __init__(self, address: str) -> None:
        """FleetError where the address' package is missing or it cannot be reached."""
        self.address = address.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise FleetError(f"{address} cannot be used: {error}") from error
        self._root = root.rstrip("/")
        names = self._files.protocol
        self._has_folders = not BUCKETS & ({names} if isinstance(names, str) else {*names})

    def put(self, name: str, files: list[Path]) -> list[str]:
        """Copy a row's files, and folders of files; their addresses. OSError where one did not arrive whole."""
        for file in files:
            inside = sorted(each for each in file.rglob("*") if each.is_file()) if file.is_dir() else [file]
            for each in inside:
                self._put(self._path(name, each.relative_to(file.parent).as_posix()), each)
        return [f"{self.address}/{name}/{file.name}" for file in files]

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Name a row finished, once all its files are there."""
        self._files.pipe_file(self._path(name, RECORD), json.dumps(record).encode())

    def finished(self) -> list[dict[str, Any]]:
        """The records of all finished rows."""
        found = []
        self._files.invalidate_cache()
        for path in self._files.glob(f"{self._root}/*/{RECORD}"):
            try:
                record = parsed(self._files.cat_file(path))
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("name"), str):
                found.append(record)
        return found

    def write(self, name: str, data: bytes) -> None:
        """A small file beside the rows' folders."""
        self._files.pipe_file(posixpath.join(self._root, name), data)

    def check(self) -> None:
        """FleetError unless files can be written here."""
        try:
            self._make_folder(self._root)
            self.write(".fleet", b"")
        except Exception as error:  # noqa: BLE001  every protocol has errors of its own
            raise FleetError(f"nothing can be written to {self.address}: {type(error).__name__}: {error}") from error

    def _put(self, path: str, file: Path) -> None:
        size = file.stat().st_size
        self._make_folder(posixpath.dirname(path))
        self._files.put_file(str(file), path)
        self._files.invalidate_cache(posixpath.dirname(path))
        if (there := self._files.info(path)["size"]) != size:
            raise OSError(f"{file.name} has {size} bytes, and {there} of them arrived at {self.address}")

    def _make_folder(self, path: str) -> None:
        if self._has_folders:
            self._files.makedirs(path, exist_ok=True)

    def _path(self, *names: str) -> str:
        return posixpath.join(self._root, *names)
