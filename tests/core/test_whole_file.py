"""The one function that writes files: whole or not at all, under any failure, kill and company."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from state_cases import made
from test_video_sink import decoded, moving

from adastate_core.files import whole_file as module
from adastate_core.files.tensor_file import TensorFile, write_tensors
from adastate_core.files.whole_file import STALE_SECONDS, Unnamed, changes, not_written, reserve, whole_file
from adastate_core.states.state_file import load_state, save_state
from adastate_core.video.sink import VideoSink, remux

ROOT = Path(__file__).resolve().parents[2]
posix_only = pytest.mark.skipif(
    module.fcntl is None or not module._system(), reason="no locks, or no name of the system"
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, data: bytes, **more: bool) -> None:
    with whole_file(path, **more) as file:
        file.write(data)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process with the core on its path; it has to print a line once it is under way."""
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def aged(path: Path, data: bytes = b"x", seconds: float = STALE_SECONDS + 60) -> Path:
    path.write_bytes(data)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_a_file_is_replaced_at_the_end_of_the_block_and_not_before(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert os.path.dirname(file.name) == str(tmp_path) and "a" != os.path.basename(file.name)
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_of_the_system_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.EIO, "the disk is broken")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(OSError, match="broken"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    told, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        inode = os.fstat(descriptor).st_ino
        told.append("folder" if inode == tmp_path.stat().st_ino else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    monkeypatch.setattr(module.os, "fsync", synced)
    monkeypatch.setattr(module.os, "replace", lambda *names: (told.append("name"), replace(*names)))
    save_state(made("none")[1], tmp_path / "a.state.safetensors")
    assert told == [f"file of {(tmp_path / 'a.state.safetensors').stat().st_size}", "name", "folder"]


def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch):
    def none(_):
        raise OSError(errno.EINVAL, "no such thing here")

    monkeypatch.setattr(module.os, "fsync", none)
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_name_is_nobodys_else(tmp_path, monkeypatch, links):
    if not links:

        def none(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(module.os, "link", none)
    path = tmp_path / "a"
    write(path, b"mine", new=True)
    assert path.read_bytes() == b"mine" and names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError):
        write(path, b"another's", new=True)
    with pytest.raises(FileExistsError), whole_file(tmp_path / "b", new=True) as file:
        file.write(b"later")
        (tmp_path / "b").write_bytes(b"first")
    with pytest.raises(FileExistsError):
        reserve(path)
    assert path.read_bytes() == b"mine" and (tmp_path / "b").read_bytes() == b"first" and names(tmp_path) == ["a", "b"]


def test_of_many_writers_of_one_new_name_one_wins(tmp_path):
    """16 at once: one file, of one writer, whole; and writers do not sweep one another."""
    won, gate = [], threading.Barrier(16)

    def run(i):
        gate.wait()
        try:
            write(tmp_path / "a", bytes([i]) * 100_000, new=True)
            won.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (tmp_path / "a").read_bytes() == bytes(won) * 100_000 and names(tmp_path) == ["a"]


WRITING = """
from adastate_core.files.whole_file import whole_file
with whole_file(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    print("there", flush=True)
    sys.stdin.readline()
"""


@posix_only
def test_what_a_dead_writer_left_goes_with_the_next_file_and_a_living_ones_stays(tmp_path):
    living, dead = child(WRITING, tmp_path / "a"), child(WRITING, tmp_path / "b")
    assert len(names(tmp_path)) == 2
    kill(dead)
    write(tmp_path / "c", b"new")
    assert len(names(tmp_path)) == 2 and "c" in names(tmp_path)
    # even where its clock says that nothing was written to it for long
    left = next(path for path in tmp_path.iterdir() if path.name != "c")
    os.utime(left, (time.time() - 2 * STALE_SECONDS,) * 2)
    write(tmp_path / "c", b"newer")
    assert left.exists()
    living.communicate("go on\n")
    assert names(tmp_path) == ["a", "c"] and (tmp_path / "a").read_bytes() == b"half"


def test_temporaries_of_other_systems_go_by_their_age(tmp_path):
    """Made under another running system, where a lock would not be seen, and without any: only what is old is dead."""
    old = [aged(tmp_path / f".adastate-{where}-{'a' * 16}.tmp") for where in ("0" * 12, "f" * 12)]
    young = [aged(tmp_path / f".adastate-{where}-{'b' * 16}.tmp", seconds=60) for where in ("0" * 12, "f" * 12)]
    write(tmp_path / "a", b"new")
    assert not any(path.exists() for path in old) and all(path.exists() for path in young)


def test_leftovers_of_packs_before_go_and_nothing_else_does(tmp_path):
    """`<name>.<pid>.tmp`, what safetensors wrote beside it, and `<stem>.<pid>.tmp.mp4` beside its video."""
    save_file({"x": torch.zeros(4)}, tmp_path / "own", metadata={"format": "adastate.rollout", "state": "{}" * 5000})
    save_file({"x": torch.zeros(4)}, tmp_path / "foreign", metadata={"format": "pt"})
    own, foreign = ((tmp_path / name).read_bytes() for name in ("own", "foreign"))
    (tmp_path / "take_00001_.mp4").write_bytes(b"the growing video")
    gone = [
        aged(tmp_path / "take_00001_.state.safetensors.4242.tmp"),
        aged(tmp_path / "a.absorption.safetensors.1.tmp"),
        aged(tmp_path / ".tmpGejZvt", own),
        aged(tmp_path / ".tmp000000", own[:-8]),
        aged(tmp_path / "take_00001_.4242.tmp.mp4"),
    ]
    stay = [
        aged(tmp_path / ".tmpAbCdEf", foreign),
        aged(tmp_path / ".tmpAbCdEg", b""),
        aged(tmp_path / ".tmpAbCdEh", b"\xff" * 64),
        aged(tmp_path / "holiday.2024.tmp.mp4"),
        aged(tmp_path / "notes.tmp"),
        aged(tmp_path / "a.state.safetensors"),
        aged(tmp_path / "weights.safetensors.tmp"),
        aged(tmp_path / ".adastate-x.tmp"),
        aged(tmp_path / "b.state.safetensors.7.tmp", seconds=60),
        aged(tmp_path / ".tmpGejZvu", own, seconds=60),
    ]
    (tmp_path / "folder.safetensors.4242.tmp").mkdir()
    outside = aged(tmp_path.parent / "outside")
    os.symlink(outside, tmp_path / "link.safetensors.4242.tmp")
    stay += [tmp_path / "folder.safetensors.4242.tmp", tmp_path / "link.safetensors.4242.tmp", outside]
    write(tmp_path / "new", b"new")
    assert [path.name for path in gone if path.exists()] == []
    assert [path.name for path in stay if not path.exists()] == []


def test_sweeping_that_fails_is_nobodys_trouble(tmp_path, monkeypatch):
    aged(tmp_path / "a.state.safetensors.1.tmp")

    def fail(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(module, "_remove_dead", fail)
    write(tmp_path / "a", b"new")
    monkeypatch.setattr(module.os, "scandir", fail)
    write(tmp_path / "b", b"new")
    assert names(tmp_path) == ["a", "a.state.safetensors.1.tmp", "b"]


def test_a_system_without_locks_writes_and_sweeps_by_age(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    old, young = (aged(tmp_path / f".adastate-{'f' * 12}-{c * 16}.tmp", seconds=s) for c, s in (("a", 9e3), ("b", 9)))
    write(tmp_path / "a", b"new")
    write(tmp_path / "a", b"newer")
    assert (
        not old.exists() and young.exists() and (tmp_path / "a").read_bytes() == b"newer" and len(names(tmp_path)) == 2
    )


@posix_only
def test_a_file_system_without_locks_is_swept_by_age(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(module.fcntl, "flock", none)
    with whole_file(tmp_path / "a") as first:
        first.write(b"new")
        write(tmp_path / "b", b"new")
        assert os.path.exists(first.name)
    assert names(tmp_path) == ["a", "b"]


def test_a_very_long_name_has_a_temporary(tmp_path):
    path = tmp_path / ("\u00e4" * 118 + ".state.safetensors")  # 255 bytes, the most that there is
    save_state(made("none")[1], path)
    assert load_state(path).next_chunk and names(tmp_path) == [path.name]


# fsync takes its time, as on a disk that is busy: so most kills come inside a write
SAVING = """
import os, time
from dataclasses import replace
from adastate_core.files import whole_file
from adastate_core.states.state_file import save_state
from adastate_core.video.sink import remux
from state_cases import made
fsync = os.fsync
whole_file.os.fsync = lambda descriptor: (time.sleep(.02), fsync(descriptor))
state = made("watched")[1]
print("there", flush=True)
for _ in sys.stdin:
    worker = os.fork()
    while not worker:
        save_state(replace(state, stream={"frames_written": time.time_ns() % 10**9}), sys.argv[1] + "/a.state.safetensors")
        remux(whole_file.Path(sys.argv[1], "a.mp4"))
    print(worker, flush=True)
    os.waitpid(worker, 0)
    print("ended", flush=True)
"""


@posix_only
def test_a_kill_inside_a_save_leaves_whole_files_and_the_next_write_sweeps(tmp_path):
    with VideoSink(tmp_path / "a.mp4", 64, 64, 16) as sink:
        sink.write(moving(9))
    chance, left, state = random.Random(3), 0, tmp_path / "a.state.safetensors"
    save_state(made("watched")[1], state)
    process = child(SAVING, tmp_path)
    for _ in range(25):
        process.stdin.write("\n")
        process.stdin.flush()
        worker = int(process.stdout.readline())
        time.sleep(chance.uniform(0.01, 0.25))
        os.kill(worker, signal.SIGKILL)
        process.stdout.readline()
        rest = set(names(tmp_path)) - {"a.mp4", state.name}
        assert len(rest) <= 1 and all(name.startswith(".adastate-") for name in rest)
        left += len(rest)
        load_state(state)
        assert len(decoded(tmp_path / "a.mp4")) == 9
        if chance.random() < 0.5:
            save_state(made("watched")[1], state)
        else:
            remux(tmp_path / "a.mp4")
        assert names(tmp_path) == ["a.mp4", state.name]
    process.communicate()
    assert left > 2


def test_a_write_of_tensors_that_fails_leaves_the_file_before(tmp_path):
    class Broken(torch.Tensor):
        def detach(self):
            raise MemoryError

    path = write_tensors(tmp_path / "a", {"x": torch.ones(3)}, {})
    with pytest.raises(MemoryError):
        write_tensors(path, {"x": torch.zeros(3), "y": torch.zeros(2).as_subclass(Broken)}, {})
    with open(path, "rb") as file:
        assert torch.equal(TensorFile(file).read(checked=True)["x"], torch.ones(3))
    assert names(tmp_path) == ["a"]


def held(monkeypatch, name: str, times: int) -> list[Path]:
    """The first calls of a function of `os` fail as Windows says that another program holds the file; what they were for."""
    original, calls = getattr(os, name), []

    def call(source, *rest):
        calls.append(Path(rest[0] if rest else source))
        if len(calls) <= times:
            raise PermissionError(13, "used by another process")
        return original(source, *rest)

    monkeypatch.setattr(module.os, name, call)
    return calls


@pytest.mark.parametrize("times", [1, 5, 6])
def test_a_file_that_a_scanner_holds_for_a_moment_is_replaced_then(tmp_path, monkeypatch, times):
    path, waited = tmp_path / "a", []
    path.write_bytes(b"old")
    monkeypatch.setattr(module.time, "sleep", waited.append)
    calls = held(monkeypatch, "replace", times)
    if times < 6:
        write(path, b"new")
    else:
        with pytest.raises(PermissionError):
            write(path, b"new")
    assert path.read_bytes() == (b"new" if times < 6 else b"old") and names(tmp_path) == ["a"]
    assert len(calls) == min(times + 1, 6) and len(waited) == min(times, 5) and sum(waited) < 1


@pytest.mark.parametrize("last", [OSError(errno.ENOSPC, "no room"), None], ids=["full", "free"])
def test_what_fails_first_is_told_though_the_file_cannot_be_closed(tmp_path, monkeypatch, last):
    opened = []

    class File:
        """Keeps what is written back until it is closed, and meets a full disk then."""

        def __init__(self, file):
            self.file = file
            opened.append(self)

        def close(self):
            self.file.close()
            if last:
                raise last

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opening(path, mode):
        return File(open(path, mode)) if mode == "x+b" else open(path, mode)

    monkeypatch.setattr(module, "open", opening, raising=False)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a"):
        raise KeyboardInterrupt
    assert opened[0].file.closed and names(tmp_path) == []


def test_a_new_name_that_cannot_be_given_and_not_taken_back_tells_the_first(tmp_path, monkeypatch):
    """A file system without links: an empty file holds the name, and may not be removed."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(
        module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "the disk is broken"))
    )
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "held")))
    with pytest.raises(OSError, match="the disk is broken"):
        write(tmp_path / "a", b"new", new=True)


def test_windows_renames_to_a_new_name_and_leaves_no_empty_file(tmp_path, monkeypatch):
    """Without links, as on exFAT: a rename replaces nothing there."""
    rename, path = os.rename, tmp_path / "a"

    def windows(source, target):
        if os.path.lexists(target):
            raise FileExistsError(17, "there is one")
        rename(source, target)

    monkeypatch.setattr(module, "_WINDOWS", True)
    monkeypatch.setattr(module.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    monkeypatch.setattr(module.os, "rename", windows)
    monkeypatch.setattr(module, "reserve", lambda path: pytest.fail("an empty file"))
    write(path, b"mine", new=True)
    with pytest.raises(FileExistsError):
        write(path, b"another's", new=True)
    assert path.read_bytes() == b"mine" and names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "used"), OSError("?")]
)
def test_what_cannot_be_written_is_named_and_stays_of_its_kind(error):
    told = not_written("a.mp4", error)
    reason = error.strerror or "?"
    assert str(told).startswith(f"a.mp4 could not be written ({reason})") and told.reason == reason
    assert (type(told), told.errno) == (type(error), error.errno)
    assert ("room" in str(told)) == (error.errno == errno.ENOSPC) and ("another program" in str(told)) == (
        error.errno == 13
    )


def test_a_file_grows_under_a_hidden_name_and_nobody_elses_is_taken(tmp_path):
    (tmp_path / "a").write_bytes(b"another's")
    before, file = changes(), Unnamed(tmp_path)
    with open(file.path, "wb", buffering=0) as growing:  # by its name, as PyAV does it
        growing.write(b"one")
        assert [name for name in names(tmp_path) if not name.startswith(".adastate-")] == ["a"]
        with pytest.raises(FileExistsError):
            file.name(tmp_path / "a")
        assert changes() == before
        file.name(tmp_path / "b")
        file.discard()
        growing.write(b" two")
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "b").read_bytes() == b"one two" and changes() > before
    other = Unnamed(tmp_path)
    other.discard()
    other.discard()
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "a").read_bytes() == b"another's"


GROWING = """
from pathlib import Path
from adastate_core.files.whole_file import Unnamed
files = [Unnamed(Path(sys.argv[1])) for _ in range(2)]
files[0].path.write_bytes(b"a part")
print("there", flush=True)
sys.stdin.readline()
"""


@posix_only
def test_what_a_killed_process_was_growing_is_swept_and_a_living_ones_is_not(tmp_path):
    living, dead = child(GROWING, tmp_path), child(GROWING, tmp_path)
    kill(dead)
    assert len(names(tmp_path)) == 4 and all(name.startswith(".adastate-") for name in names(tmp_path))
    Unnamed(tmp_path).discard()
    assert len(names(tmp_path)) == 2
    kill(living)
    write(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
