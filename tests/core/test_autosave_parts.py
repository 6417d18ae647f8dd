"""What autosaves are made of: when they are due, the thread that writes them, the room that they need."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from state_cases import CASES, made

from adastate_core.states import disk_room, spacing
from adastate_core.states.disk_room import Growing, free_bytes, size_of, video_needs
from adastate_core.states.spacing import Spacing
from adastate_core.states.state_file import save_state, state_bytes
from adastate_core.states.state_thread import NAME, StateThread


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(spacing, "time", clock)
    return clock


def saved(clock, least, copying, writing, hours):
    """When states are saved in a run of so many hours with chunks of half a second, and the run's spacing at its end."""
    times, start, every = [], clock.now, Spacing(least)
    while clock.now - start < 3600 * hours:
        clock.now += 0.5
        if every.due:
            times.append(clock.now - start)
            clock.now += copying
            every.taken(copying)
            every.written(writing, True)
    every.end()
    return times, every


@pytest.mark.parametrize(
    ("least", "copying", "writing"),
    [(60, 0.01, 0.02), (60, 0.5, 1.0), (60, 2.0, 1.5), (60, 3.0, 30.0), (5, 0.2, 0.3), (1000, 5, 5), (86400, 1, 1)],
)
def test_autosaves_are_spaced_by_what_they_cost(clock, least, copying, writing):
    times, every = saved(clock, least, copying, writing, 6)
    gaps = [after - before for before, after in zip([0, *times], times, strict=False)]
    furthest = max(600, least)
    assert all(least <= gap <= furthest + 1 + copying for gap in gaps)
    assert gaps == [] if least > 6 * 3600 else gaps[0] == least
    told = every.describe()
    assert told["count"] == len(times) and told["share"] == pytest.approx(
        len(times) * (copying + writing) / 21600, abs=1e-5
    )
    for number, at in enumerate(times[1:], 2):
        # where one came sooner than at the furthest, all so far took 1 % or less
        if gaps[number - 1] < furthest:
            assert number * (copying + writing) <= 0.01 * at + 1e-6
    if len(times) > 2:
        dear = 100 * (copying + writing)
        assert gaps[-1] == pytest.approx(min(max(dear, least), furthest), abs=1 + copying)
        assert told["seconds_apart"] == pytest.approx(gaps[-1], abs=1 + copying)


def test_autosaves_that_become_cheaper_or_dearer(clock):
    every = Spacing(10)
    clock.now += 10
    every.taken(1.0)
    every.written(1.0, True)
    assert every.apart == pytest.approx(390)  # 4 s in all are 1 % of 400 s
    clock.now += 390
    assert every.due
    every.taken(0.05)
    every.written(0.05, True)
    assert every.apart == 10  # 2.2 s of 400 are less than 1 %
    clock.now += 9
    assert not every.due
    clock.now += 1
    every.taken(10.0)
    every.written(90.0, False)
    assert every.apart == 600 and every.count == 2


def test_no_autosave_on_the_way(clock):
    every = Spacing(0)
    clock.now += 1e6
    assert not every.due and every.describe() == {"seconds_apart": None, "count": 0, "share": 0.0}


def test_one_that_is_passed_over_is_due_as_long_after(clock):
    every = Spacing(60)
    clock.now += 61
    assert every.due
    every.passed_over()
    assert not every.due
    clock.now += 60
    assert every.due


def test_the_thread_does_one_thing_after_the_other_and_ends():
    thread, go, done, names = StateThread(), threading.Event(), [], []

    def first():
        names.append(threading.current_thread().name)
        go.wait(10)
        done.append(1)

    before = threading.active_count()
    thread.run(first)
    assert thread.busy and threading.active_count() == before + 1
    thread.look()  # does not wait
    threading.Timer(0.1, go.set).start()
    thread.run(lambda: done.append(2))
    assert done[0] == 1
    thread.wait()
    assert done == [1, 2] and not thread.busy and names == [NAME]
    assert not [each for each in threading.enumerate() if each.name == NAME]
    thread.wait()


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(errno.EAGAIN, "again"), MemoryError()]
)
def test_where_no_thread_can_be_started_work_is_done_here(monkeypatch, error):
    def start(self):
        raise error

    monkeypatch.setattr(threading.Thread, "start", start)
    thread, where = StateThread(), []
    thread.run(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()] and not thread.busy
    thread.wait()


@pytest.mark.parametrize("looks", ["look", "wait", "run"])
def test_what_the_work_raises_is_raised_by_the_next_look_once(looks):
    def stop():
        raise KeyboardInterrupt("stop")

    thread, done = StateThread(), []
    thread.run(stop)
    thread._thread.join()
    with pytest.raises(KeyboardInterrupt, match="stop"):
        thread.run(lambda: done.append(1)) if looks == "run" else getattr(thread, looks)()
    thread.wait()
    assert done == []
    thread.run(lambda: done.append(2))
    thread.wait()
    assert done == [2]


def test_what_a_video_still_needs():
    # 100 bytes a frame, a quarter more for those to come; then the whole once more
    assert video_needs([Growing(1000, 10, 10, 999)]) == 1250 + 2250
    assert video_needs([Growing(1000, 10, 0, 999)]) == 1000
    assert video_needs([Growing(0, 0, 10, 50)]) == 500 + 500
    # two videos grow together, and are rewritten one after the other
    assert video_needs([Growing(1000, 10, 10, 9), Growing(2000, 10, 10, 9)]) == 1250 + 2500 + 4500
    assert video_needs([]) == 0


def test_room_is_asked_of_the_system(tmp_path, monkeypatch):
    assert free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert free_bytes(tmp_path / "missing") is None
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert free_bytes(tmp_path) is None
    (tmp_path / "a").write_bytes(b"12345")
    assert size_of(tmp_path / "a") == 5 and size_of(tmp_path / "b") == 0


@pytest.mark.parametrize("name", CASES)
def test_a_states_bytes_on_disk_are_known_to_the_byte(name, tmp_path):
    _, state = made(name)
    path = save_state(state, tmp_path / "a.safetensors")
    assert state_bytes(state) == os.path.getsize(path) > state.nbytes


def test_a_state_is_written_while_its_run_goes_on(tmp_path):
    """The bits are those of a state that nothing went on from, on a device that does nothing before somebody waits."""
    import test_late_device as late_device
    from late_device import LateDevice
    from no_double_device import model_on

    files = []
    for name, when in (("calm", "at once"), ("late", "late"), ("early", "early")):
        with LateDevice(when) as late:
            make = late_device.on_device(**late_device.EMA)
            rollout = make(model_on(late.device, late_device.model()), None, None)
            list(rollout.chunks(9))
            state, thread, go = rollout.snapshot(), StateThread(), threading.Event()
            path = tmp_path / f"{name}.safetensors"
            thread.run(lambda go=go, state=state, path=path: (go.wait(60), save_state(state, path)))
            if name != "calm":
                list(rollout.chunks(18))
                late.synchronize()
            go.set()
            thread.wait()
            files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_snapshot_that_fails_leaves_the_next_one_whole(monkeypatch):
    """Each of the steps of a copy fails once: gathering, locking, copying, waiting."""
    import test_late_device as late_device
    from late_device import LateDevice
    from no_double_device import model_on

    from adastate_core.cache import host_copies

    with LateDevice("late") as late:
        make = late_device.on_device(**late_device.EMA)
        rollout = make(model_on(late.device, late_device.model()), None, None)
        list(rollout.chunks(9))
        expected = late_device.tensors_of(rollout.snapshot())
        for owner, name in (
            (host_copies, "_room"), (host_copies, "_shaped"), (host_copies._Stage, "settle"), (host_copies, "_blocks"),
            (torch.cuda.Event, "record"), (torch.cuda.Event, "synchronize"), (host_copies.HostCopies, "wait"),
        ):  # fmt: skip
            for number in (1, 2, 3):
                with monkeypatch.context() as patch:
                    calls = failing_once(patch, owner, name, number)
                    if name == "wait" and number > 1:
                        continue
                    with pytest.raises(RuntimeError, match="the device has failed"):
                        rollout.snapshot()
                    assert len(calls) == number
                found = late_device.tensors_of(rollout.snapshot())
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        list(rollout.chunks(15))
        late.synchronize()


def failing_once(patch, owner, name, number):
    whole, calls = getattr(owner, name), []

    def fail(*given, **more):
        calls.append(name)
        if len(calls) == number:
            raise RuntimeError("the device has failed")
        return whole(*given, **more)

    patch.setattr(owner, name, fail)
    return calls
