"""The states that a stream saves of itself: in a thread, spaced by what they cost, only where there is room, and gone when the
video is whole unless somebody asked for them."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.states import disk_room, spacing
from adastate_pack.adastate_core.states.state_file import load_state, state_bytes
from adastate_pack.adastate_core.states.state_thread import NAME, StateThread
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes import saved_states
from adastate_pack.nodes.host.codec import HostDecoder

LENGTH, CHUNKS = 57, 5
STATE = "take_00001_.state.safetensors"


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"autosave_seconds": 1e-9} | inputs))


@pytest.fixture
def out(folders):
    return folders / "output"


def report(result) -> dict:
    return json.loads(result.args[2])


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == NAME]


@pytest.fixture
def told(monkeypatch):
    """(thread, frames) of every state that was written on the way, and how many frames of its video were on the disk."""
    found, save = [], saved_states.save_state

    def saving(state, path):
        found.append((threading.current_thread().name, state.emitted))
        return save(state, path)

    monkeypatch.setattr(saved_states, "save_state", saving)
    return found


def test_states_are_written_in_a_thread_that_ends(rollout, stream, out, told):
    result = rollout(length=LENGTH, stream=stream())
    assert told == [(NAME, 3), (NAME, 6), (NAME, 9), (NAME, 12)]
    assert threads() == [] and report(result)["autosave"]["count"] == 4
    assert sorted(path.name for path in out.iterdir()) == ["take_00001_.mp4", "take_00001_.report.json"]
    assert report(result)["state"] is None


def test_the_files_are_those_that_the_rollouts_thread_would_write(rollout, stream, out, monkeypatch, every_autosave):
    every_autosave.undo()
    monkeypatch.setattr(spacing, "SHARE", float("inf"))
    kept, save = {}, saved_states.save_state

    def slow(state, path):
        time.sleep(0.05)  # the rollout goes on meanwhile
        save(state, path)
        kept[state.emitted] = path.read_bytes()

    monkeypatch.setattr(saved_states, "save_state", slow)
    rollout(length=LENGTH, stream=stream())
    beside, kept_here = dict(kept), {}
    monkeypatch.setattr(StateThread, "run", lambda thread, work: work())  # so none is left out
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: kept_here.update({state.emitted: state}))
    rollout(length=LENGTH, stream=stream(filename_prefix="take"))
    assert beside and set(beside) <= set(kept_here)
    for emitted, data in beside.items():
        (out / "file.safetensors").write_bytes(data)
        found, expected = load_state(out / "file.safetensors"), kept_here[emitted]
        assert found.next_chunk == expected.next_chunk and torch.equal(found.latents, expected.latents)
        for one, other in zip(found.cache, expected.cache, strict=True):
            assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_a_state_that_is_due_while_one_is_written_waits_for_the_next_chunk(
    rollout, stream, monkeypatch, every_autosave
):
    """At most one state waits: taken are only those that the thread has time for."""
    every_autosave.undo()
    monkeypatch.setattr(spacing, "SHARE", float("inf"))
    go, taken, written = threading.Event(), [], []
    snapshot, step = Rollout.snapshot, HostDecoder.step
    monkeypatch.setattr(Rollout, "snapshot", lambda self, *more: (taken.append(self.emitted), snapshot(self, *more))[1])
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: (go.wait(30), written.append(state.emitted)))

    def decode(self, latents, *takes):
        if len(taken) == 1 and len(written) == 0 and steps.append(1) is None and len(steps) == 4:
            go.set()
            while threads():
                time.sleep(0.01)
        return step(self, latents, *takes)

    steps: list[int] = []
    monkeypatch.setattr(HostDecoder, "step", decode)
    rollout(length=117, stream=stream())
    assert taken[0] == 3 and written[0] == 3
    assert taken[1] >= 12 and written == [emitted for emitted in taken if emitted < 30][: len(written)]
    assert threads() == []


def test_a_kept_state_is_never_left_out_for_a_slow_disk(rollout, stream, out, monkeypatch, every_autosave):
    every_autosave.undo()
    from adastate_pack.adastate_core.states import kept_states

    save = kept_states.save_state
    monkeypatch.setattr(kept_states, "save_state", lambda *given, **more: (time.sleep(0.1), save(*given, **more))[1])
    result = rollout(length=LENGTH, stream=stream(history_chunks=1))
    assert report(result)["history"] == [1, 2, 3, 4, 5]


def test_spacing_is_told(rollout, stream, monkeypatch, every_autosave):
    """Chunks take 100 s and saving takes 3 s, which is 1 % of three chunks."""
    every_autosave.undo()
    now, written, save, step = [0.0], [], saved_states.save_state, HostDecoder.step
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (spacing, saved_states):
        monkeypatch.setattr(module, "time", clock)

    def saving(state, path):
        now[0] += 3
        written.append(state.emitted)
        save(state, path)

    def decode(self, latents, *takes):
        while threads():  # what takes its time by this clock is over
            time.sleep(0.001)
        now[0] += 100
        return step(self, latents, *takes)

    monkeypatch.setattr(HostDecoder, "step", decode)
    monkeypatch.setattr(saved_states, "save_state", saving)
    result = rollout(length=12 * 30 - 3, stream=stream(autosave_seconds=60))
    chunks = [emitted // 3 for emitted in written]
    assert chunks[0] == 1 and len(chunks) > 5
    assert {after - before for before, after in zip(chunks[1:], chunks[2:], strict=False)} <= {2, 3}
    told = report(result)["autosave"]
    assert told["count"] == len(written) and 0 < told["share"] <= 0.0101 and 270 < told["seconds_apart"] <= 310


# ---- who leaves a state


@pytest.mark.parametrize(
    ("asked", "length", "kept"),
    [
        ({}, LENGTH, False), ({"keep_state": True}, LENGTH, True), ({"keep_state": True, "autosave_seconds": 0.0}, 21, True),
        ({"history_chunks": 1}, LENGTH, True), ({"autosave_seconds": 0.0}, LENGTH, False),
        ({"history_chunks": 999, "autosave_seconds": 0.0}, 21, True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.sampled(2)
def test_a_whole_video_leaves_a_state_only_where_it_was_asked_for(rollout, stream, out, asked, length, kept):
    result = rollout(length=length, stream=stream(**asked))
    assert (out / STATE).is_file() == kept and report(result)["state"] == (f"{STATE} [output]" if kept else None)
    if kept:
        assert load_state(out / STATE).emitted == result.args[1].emitted
        again = rollout(length=length + 12, resume=load_state(out / STATE), stream=stream(join=True))
        assert torch.equal(again.args[0]["samples"], rollout(length=length + 12).args[0]["samples"])


@pytest.mark.parametrize("autosave_seconds", [0.0, 1e-9])
def test_a_run_that_ends_early_leaves_its_state(rollout, stream, out, monkeypatch, autosave_seconds):
    result = rollout(length=LENGTH, max_seconds=1e-9, stream=stream(autosave_seconds=autosave_seconds))
    assert report(result)["ended"] == "stopped" and load_state(out / STATE).emitted == 3
    step, calls = HostDecoder.step, []

    def decode(self, latents, *takes):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device has failed")
        return step(self, latents, *takes)

    monkeypatch.setattr(HostDecoder, "step", decode)
    with pytest.raises(RuntimeError, match="the device has failed"):
        rollout(length=LENGTH, stream=stream(autosave_seconds=autosave_seconds))
    assert load_state(out / "take_00002_.state.safetensors").emitted == 6


def test_only_what_this_run_wrote_is_removed(rollout, stream, out, monkeypatch):
    """A file that lies there by another hand stays, put there before the run or while it is under way."""
    save = saved_states.save_state

    def replaced(state, path):
        save(state, path)
        other = path.with_name("other")
        other.write_bytes(b"somebody's")
        other.replace(path)

    first = rollout(length=LENGTH, stream=stream(keep_state=True))
    second = rollout(length=LENGTH, stream=stream())
    assert load_state(out / STATE).emitted == first.args[1].emitted == second.args[1].emitted
    calls = []

    def saving(state, path):
        calls.append(path)
        save(state, path)

    monkeypatch.setattr(saved_states, "save_state", saving)
    close = video_sink.VideoSink.close

    def closing(sink):
        path = close(sink)
        replaced(second.args[1], calls[0])
        return path

    monkeypatch.setattr(video_sink.VideoSink, "close", closing)
    rollout(length=LENGTH, stream=stream(filename_prefix="own"))
    assert (out / "own_00001_.state.safetensors").read_bytes() == b"somebody's"


def test_a_state_that_cannot_be_removed_is_told(rollout, stream, out, monkeypatch):
    unlink = Path.unlink

    def held(path, *more, **options):
        if path.name.endswith(".state.safetensors"):
            raise PermissionError(errno.EACCES, "used by another process")
        unlink(path, *more, **options)

    monkeypatch.setattr(Path, "unlink", held)
    result = rollout(length=LENGTH, stream=stream())
    assert f"{STATE} could not be removed (used by another process); the video is whole without it" in "".join(
        report(result)["warnings"]
    )
    assert (out / STATE).is_file() and report(result)["state"] == f"{STATE} [output]"


def test_a_video_that_cannot_be_rewritten_keeps_its_state(rollout, stream, out, monkeypatch):
    def fail(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video_sink, "remux", fail)
    result = rollout(length=LENGTH, stream=stream())
    assert load_state(out / STATE).emitted == result.args[1].emitted
    assert any("could not be rewritten" in sentence for sentence in report(result)["warnings"])


# ---- room on the disk


def with_room(monkeypatch, free):
    """A disk that has `free()` bytes left."""
    usage = lambda path: SimpleNamespace(total=10**12, free=free())  # noqa: E731
    monkeypatch.setattr(disk_room.shutil, "disk_usage", usage)


@pytest.mark.parametrize("room", ["none", "for a state alone", "for both"])
def test_a_state_is_saved_only_where_the_video_has_its_room(rollout, stream, out, told, monkeypatch, caplog, room):
    state = rollout(length=21, stream=stream(filename_prefix="first")).args[1]
    size = state_bytes(state)
    told.clear()
    # a video of 57 frames of 32x32 takes far less than a state; what it is thought to need is less than another
    free = {"none": 0, "for a state alone": size, "for both": 3 * size}[room]
    with_room(monkeypatch, lambda: free)
    with caplog.at_level(logging.WARNING, "adastate"):
        result = rollout(length=LENGTH, stream=stream())
    warnings = [sentence for sentence in report(result)["warnings"] if "for want of room" in sentence]
    assert frames_in(out / "take_00001_.mp4") == LENGTH and report(result)["ended"] == "whole"
    if room == "for both":
        assert len(told) == 4 and warnings == []
        return
    assert told == [] and report(result)["autosave"]["count"] == 0
    [warning] = warnings
    assert f"a state of take_00001_.mp4 was not saved for want of room: it takes {size / 1e6:.1f} MB"[:60] in warning
    assert "and the video still needs" in warning and "the video went on without" in warning
    assert sum("for want of room" in record.message for record in caplog.records) == 1


def test_where_one_state_was_refused_the_next_is_not_copied_in_vain(rollout, stream, monkeypatch):
    taken, snapshot = [], Rollout.snapshot
    monkeypatch.setattr(Rollout, "snapshot", lambda self, *more: (taken.append(self.emitted), snapshot(self, *more))[1])
    free = [0]
    with_room(monkeypatch, lambda: free[0])
    rollout(length=LENGTH, stream=stream())
    assert taken == [3, 15]  # the first, whose size nobody knew, and STATE
    taken.clear()
    step, steps = HostDecoder.step, []

    def decode(self, latents, *takes):
        steps.append(1)
        if len(steps) == 3:
            free[0] = 10**12  # somebody made room
        return step(self, latents, *takes)

    monkeypatch.setattr(HostDecoder, "step", decode)
    rollout(length=LENGTH, stream=stream())
    assert taken == [3, 9, 12, 15]


def test_an_older_state_stays_where_the_last_one_has_no_room(rollout, stream, out, monkeypatch, told):
    """The video is finished first. What was saved before is not given up for what cannot be saved."""
    free, step, calls = [10**12], HostDecoder.step, []
    with_room(monkeypatch, lambda: free[0])

    def decode(self, latents, *takes):
        calls.append(1)
        if len(calls) == 4:
            free[0] = 1000
            raise RuntimeError("the device has failed")
        return step(self, latents, *takes)

    monkeypatch.setattr(HostDecoder, "step", decode)
    with pytest.raises(RuntimeError, match="the device has failed"):
        rollout(length=LENGTH, stream=stream())
    assert load_state(out / STATE).emitted == told[-1][1] == 6
    told_there = json.loads((out / "take_00001_.report.json").read_text())
    assert "was not saved for want of room: it takes" in "".join(told_there["warnings"])
    assert "the video still needs" not in "".join(told_there["warnings"])
    assert frames_in(out / "take_00001_.mp4") == 33


@pytest.fixture
def small_disk(folders):
    """`small_disk(size)`: the output folder is a disk of `size` bytes."""
    mounted, folder = [], folders / "output"

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("early", [False, True])
def test_a_disk_with_too_little_room_for_state_and_video_gets_the_video(rollout, stream, out, small_disk, early):
    """A real disk: the video's bytes, its second copy and a state do not fit together, and it is finished."""
    size = state_bytes(rollout(length=21, stream=stream(filename_prefix="probe")).args[1])
    small_disk(size // 4096 * 4096)
    result = rollout(length=LENGTH, stream=stream(keep_state=True), **({"max_seconds": 1e-9} if early else {}))
    assert report(result)["ended"] == ("stopped" if early else "whole")
    assert frames_in(out / "take_00001_.mp4") == (9 if early else LENGTH)
    assert not (out / STATE).exists() and "for want of room" in "".join(report(result)["warnings"])
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".mp4"]


# ---- failures in the thread


def test_an_interrupt_in_the_thread_ends_the_run_with_its_state(rollout, stream, out, monkeypatch):
    save, calls = saved_states.save_state, []

    def interrupted(state, path):
        calls.append(state.emitted)
        if len(calls) == 2:
            raise comfy.model_management.InterruptProcessingException
        return save(state, path)

    monkeypatch.setattr(saved_states, "save_state", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        rollout(length=LENGTH, stream=stream())
    assert calls[:2] == [3, 6] and load_state(out / STATE).emitted == calls[-1] > 6 and threads() == []


def test_a_thread_that_cannot_be_started_costs_no_state(rollout, stream, monkeypatch, told):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == NAME:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = rollout(length=LENGTH, stream=stream())
    here = threading.current_thread().name
    assert told == [(here, 3), (here, 6), (here, 9), (here, 12)]
    assert not [sentence for sentence in report(result)["warnings"] if "state" in sentence]
