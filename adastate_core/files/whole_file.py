"""The one way in which the pack writes a file: under a name of its own first, then at once under the name it was asked for.

A process that is killed, a full disk or a power cut leaves the file that was there before, or the new one, whole. What a
dead process leaves of its own names is removed when the next file is written to the same folder, by any process:

* A writer holds a lock (flock) on its temporary. The temporary's name tells the running system and the file system that it
  was made under, since only there a lock is seen by everyone; a temporary of the same ones that nobody has locked is dead.
* Any other is dead once nothing has been written to it for STALE_SECONDS, by the clock of the file system itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

# no writer leaves its file alone for so long
STALE_SECONDS = 3600.0
# how the names begin that are the pack's own for some time
HIDDEN = ".adastate-"
_NO_LOCK = "0" * 12
_OWN = re.compile(r"\.adastate-([0-9a-f]{12})-[0-9a-f]{16}\.tmp")
# what versions before wrote to: `<name>.<pid>.tmp`, beside it safetensors' own hidden names, and `<stem>.<pid>.tmp.mp4`
_STATE_BEFORE = re.compile(r".+\.safetensors\.[0-9]+\.tmp")
_VIDEO_BEFORE = re.compile(r"(.+)\.[0-9]+\.tmp\.mp4")
_HIDDEN_BEFORE = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_MARK_BEFORE = b'"format":"adastate.'
_MOST_HEADER = 100_000_000
# what a file system says that has no fsync
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_WINDOWS = os.name == "nt"
# seconds between tries to replace a file that another program holds: a virus scanner lets go after some tenths of a second
_HELD = (0.02, 0.05, 0.1, 0.2, 0.4)
_count = {"changes": 0}


@contextlib.contextmanager
def whole_file(path: Path | str, new: bool = False, beside: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write (and read) that becomes `path` when the block ends, and never was when it raises.

    Others may open it by its `name` meanwhile and write to it. `new`: FileExistsError if there is a `path` by then, however
    many servers share the folder; otherwise it is replaced. `beside`: a folder of the same disk in which it grows, where that of
    `path` is one run's own, to which nobody comes again who would clear up after a dead writer. OSError if the disk does not take
    it; what was at `path` stays.
    """
    path = Path(path)
    growing = path.parent if beside is None else beside
    temporary, file, locked = _create(growing)
    try:
        try:
            _sweep(growing, os.fstat(file.fileno()).st_mtime)
            yield file
            file.flush()
            _sync(file.fileno())
            if locked:  # nobody takes it for a dead one's until it has its name
                _publish(temporary, path, new)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what is told
                file.close()
            raise
        file.close()
        if not locked:
            _publish(temporary, path, new)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


class Unnamed:
    """A file in `folder` that grows at `path`, a hidden name of its own, until `name` gives it one that nobody has.

    What a killed process leaves of it goes with the next file that is written to the folder. `has_links`: whether the file
    system gives a file a second name; one without should be named before anybody writes to it. OSError if the folder takes no
    file.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._file, locked = _create(folder)
        try:
            _sweep(folder, os.fstat(self._file.fileno()).st_mtime)
            if not locked:
                self._file.close()
            self.has_links = _has_links(self.path)
        except BaseException:
            self.discard()
            raise

    def name(self, path: Path) -> None:
        """Give the file its name. FileExistsError if it is taken, however many servers share the folder."""
        _publish(self.path, path, new=True)

    def unname(self, path: Path) -> None:
        """Take the name `path` back, so that `name` can give another."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self.path):
                path.unlink(missing_ok=True)
            else:  # it was moved, where there are no links
                os.replace(path, self.path)

    def discard(self) -> None:
        """Remove the hidden name; the file stays where it was given another. It never fails: what is held goes later."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()


class WholeFiles:
    """Files that are written one after another, as many as frames of a video: whole whenever the process is killed, as those of
    `whole_file` are, and after a power cut if they were given to `sync_file`.

    They grow in `beside`, a folder of the same disk, where what dead writers left is removed at the start and not for every file.
    OSError if the folder takes no file.
    """

    def __init__(self, beside: Path) -> None:
        self._beside = beside
        temporary, file, _ = _create(beside)
        try:
            _sweep(beside, os.fstat(file.fileno()).st_mtime)
        finally:
            file.close()
            temporary.unlink(missing_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Replace `path`, at once, by a file of `data`. OSError if the disk does not take it; what was at `path` stays."""
        temporary, file, locked = _create(self._beside)
        try:
            with file:
                file.write(data)
                file.flush()
                if locked:
                    _patiently(os.replace, temporary, path)
            if not locked:
                _patiently(os.replace, temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def changes() -> int:
    """A number that is another one after this process has given a file its name: whoever keeps a listing looks again."""
    return _count["changes"]


def not_written(what: str, error: OSError) -> OSError:
    """What to raise for `what` (a file's name, what it holds) that met `error`: the same kind, in a sentence.

    Its `reason` is the system's own words.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "; free some room on the disk"
    elif isinstance(error, PermissionError):
        advice = "; another program may hold it, or its folder may not be written to"
    else:
        advice = ""
    told = type(OSError(error.errno or 0, ""))(f"{what} could not be written ({reason}){advice}")
    told.errno, told.reason = error.errno, reason
    return told


def reserve(path: Path | str) -> None:
    """Create an empty file of a name that nobody has. FileExistsError otherwise, however many servers share the folder."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def sync_file(path: Path | str) -> None:
    """Have the system put on the disk what was written to a file; nothing where it cannot or the file has gone."""
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        _sync(file.fileno())


def sync_folder(path: Path | str) -> None:
    """The same for a folder's names; there are systems that know no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_way(folder: Path, root: Path) -> None:
    """Have the disk keep the names of the folders that lead from `root` to `folder`, which may have been made just now."""
    at = root
    for part in Path(os.path.relpath(folder, root)).parts:
        sync_folder(at)
        at = at / part


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _publish(temporary: Path, path: Path, new: bool) -> None:
    if not new:
        _patiently(os.replace, temporary, path)
    else:
        _publish_new(temporary, path)
    _count["changes"] += 1


def _publish_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        raise
    except (OSError, NotImplementedError, AttributeError):
        pass  # a file system without links
    if _WINDOWS:  # where a rename replaces nothing
        _patiently(os.rename, temporary, path)
        return
    reserve(path)
    try:
        _patiently(os.replace, temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _patiently(move: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Move a file, once more after some time where another program holds it. PermissionError if it still does."""
    for wait in _HELD:
        try:
            move(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    move(source, target)


def _has_links(path: Path) -> bool:
    """Whether the file system gives a file a second name."""
    second = path.with_name(f"{path.name.rpartition('-')[0]}-{secrets.token_hex(8)}.tmp")
    try:
        os.link(path, second)
    except (OSError, NotImplementedError, AttributeError):
        return False
    with contextlib.suppress(OSError):
        second.unlink()
    return True


@cache
def _system() -> str:
    """What this running system is called; empty where it has no name that ends with it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _where(folder: Path) -> str:
    """The system and file system that a lock on a file of `folder` counts in."""
    if fcntl is None or not _system():
        return _NO_LOCK
    device = os.stat(folder).st_dev
    return hashlib.blake2b(f"{_system()} {device}".encode(), digest_size=6).hexdigest()


def _lock(file: IO[bytes]) -> bool:
    """Whether this process has the file to itself now. BlockingIOError if another has, OSError where there are no locks."""
    if fcntl is None:
        return False
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _create(folder: Path) -> tuple[Path, IO[bytes], bool]:
    """A fresh temporary in `folder`, open, and whether it is locked."""
    where = _where(folder)
    while True:
        path = folder / f"{HIDDEN}{where}-{secrets.token_hex(8)}.tmp"
        file = open(path, "x+b")  # noqa: SIM115
        if where == _NO_LOCK:
            return path, file, False
        try:
            # between its making and its lock it looked dead: a sweep may hold it, or have removed it
            if _lock(file) and _is_at(file, path):
                return path, file, True
        except BlockingIOError:
            pass
        except OSError:
            where = _NO_LOCK
        file.close()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _sweep(folder: Path, now: float) -> None:
    """Remove what dead writers left in `folder`; whatever goes wrong with that is nobody's trouble."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        where = _where(folder)
        for entry in entries:
            with contextlib.suppress(OSError):
                if _is_ours(entry) and entry.is_file(follow_symlinks=False):
                    _remove_dead(Path(entry.path), where, now)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether it is a temporary by its name, and where that could be anyone's, by what it lies beside or holds."""
    name = entry.name
    if _OWN.fullmatch(name) or _STATE_BEFORE.fullmatch(name):
        return True
    if match := _VIDEO_BEFORE.fullmatch(name):
        return Path(entry.path).with_name(f"{match[1]}.mp4").is_file()
    if not _HIDDEN_BEFORE.fullmatch(name) or not entry.is_file(follow_symlinks=False):
        return False
    with open(entry.path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return size <= _MOST_HEADER and _MARK_BEFORE in file.read(size)


def _remove_dead(path: Path, where: str, now: float) -> None:
    with open(path, "rb") as file:
        try:
            mine_to_lock = _lock(file)
        except BlockingIOError:
            return
        except OSError:
            mine_to_lock = False
        match = _OWN.fullmatch(path.name)
        dead = mine_to_lock and match is not None and match[1] == where != _NO_LOCK
        if not dead and now - os.fstat(file.fileno()).st_mtime < STALE_SECONDS:
            return
        if fcntl is not None:
            path.unlink(missing_ok=True)
    if fcntl is None:
        path.unlink(missing_ok=True)
