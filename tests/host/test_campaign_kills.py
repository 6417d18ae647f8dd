"""kill -9 of a child process that streams a rollout, at any instant: its files play, its newest state goes on to the bits of the
run that nobody killed, and nothing is left lying about. Children are forked, since a process of its own takes ten times as long.
"""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from adastate_pack.adastate_core.rollout import RolloutState
from adastate_pack.adastate_core.video.frame_writer import FrameWriter
from adastate_pack.nodes import saved_states
from drawn_runs import (
    CHUNK,
    FEATURES,
    Drawn,
    Runs,
    drawn,
    streamed,  # noqa: F401  a fixture
)
from file_faults import Faults
from run_checks import (
    Whole,
    go_on,
    has_pictures,
    require_begun,
    require_gone_on,
    require_no_litter,
    shown_of,
    whole_run,
)
from test_steering import script  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked, which this system cannot")
TRIES = {"autosave": 40, "transitions": 24, "absorption": 24, "8-bit cache": 24, "steering": 24, "sound": 24}
NAME = "trial"
KILLS_A_DRAWING = 4
LONGEST = 300.0  # seconds until a child that hangs is given up


@dataclass
class Told:
    """What a child said before it died: frames of its files in whole chunks, and latents that its newest written state counts."""

    frames: int = 0
    states: tuple[int, ...] = ()
    killed: bool = False
    failed: str = ""


def child(write: int, make: Callable[[], Any]) -> None:
    """Make a run and tell of it; never returns."""
    try:
        say = lambda words: os.write(write, f"{words}\n".encode())  # noqa: E731
        written, save = FrameWriter._write, saved_states.save_state

        def write_frames(writer: FrameWriter, given: Any) -> None:
            written(writer, given)
            sink = writer.sinks[0]
            sink = sink.sinks[0] if hasattr(sink, "sinks") else sink
            say(f"frames {sink._sent if hasattr(sink, '_sent') else sink.frames}")

        def save_state(state: RolloutState, path: Any) -> Any:
            made = save(state, path)
            say(f"state {state.emitted}")
            return made

        FrameWriter._write, saved_states.save_state = write_frames, save_state
        say("begun")
        make()
    except BaseException as error:  # noqa: BLE001
        with suppress(OSError):
            os.write(write, f"failed {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def killed(make: Callable[[], Any], waits_for: str, seconds: float) -> Told:
    """Fork a child that makes a run, and kill it so many seconds after it said a word, or when it has ended."""
    read, write = os.pipe()
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # a child that clears away a decoder of ours waits for threads that it has not
    pid = os.fork()
    if not pid:
        os.close(read)
        child(write, make)
    gc.unfreeze()
    os.close(write)
    said, kill_at = b"", None
    end = time.monotonic() + LONGEST
    while True:
        left = (kill_at or end) - time.monotonic()
        ready = select.select([read], [], [], max(0.0, left))[0] if left > 0 else []
        if not ready:
            break
        if not (more := os.read(read, 1 << 16)):
            break
        said += more
        if kill_at is None and waits_for.encode() in said:
            kill_at = time.monotonic() + seconds
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    while more := os.read(read, 1 << 16):
        said += more
    os.close(read)
    died_of = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    assert died_of in (0, signal.SIGKILL), f"the child died of signal {died_of}"
    return told_of(said.decode(), bool(died_of))


def told_of(said: str, was_killed: bool) -> Told:
    told = Told(killed=was_killed)
    for line in said.splitlines():
        word, _, value = line.partition(" ")
        if word == "frames":
            told.frames = int(value)
        elif word == "state":
            told.states += (int(value),)
        elif word == "failed":
            told.failed = value
    assert not told.failed, f"the child failed: {told.failed}"
    return told


class Killing:
    """Kills runs of one drawing."""

    def __init__(self, runs: Runs, whole: Whole, luck: random.Random) -> None:
        self.runs, self.whole, self.luck = runs, whole, luck
        self.seconds, self.at = whole.seconds, ""

    def first(self) -> Told:
        """A run from the start that was killed before its end."""
        for _ in range(20):
            if (told := self.once(None)).killed:
                return told
            self.runs.clear()
        raise AssertionError("no child was killed before it had ended")

    def once(self, listed: str | None) -> Told:
        """A run, from a state or from the start, that is killed by the clock or at an operation on files. It may have ended by
        then."""
        make = lambda: go_on(self.runs, self.whole, NAME, listed)  # noqa: E731
        if self.luck.random() < 0.5:
            place = self.luck.choice(self.whole.points)
            self.at = f"at {place}"
            return killed(lambda: self.until(place, make), "never", LONGEST)
        word, wait = self.luck.choice(("begun", "frames", "state", "state")), self.luck.uniform(0, self.seconds)
        self.at = f"{wait:.3f} s after {word}"
        told = killed(make, word, wait)
        self.seconds *= 1 if told.killed else 0.7
        return told

    def until(self, place: tuple[str, int], make: Callable[[], Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(self.runs.out, place)
            faults.when = lambda: os.kill(os.getpid(), signal.SIGKILL)
            faults.install(patch)
            make()


def require_state(runs: Runs, told: Told, drawn: Drawn) -> None:
    """The state that a user would go on from counts no less than what the child said was written, but where a run went back."""
    name = runs.newest_state()
    if not name and told.frames == drawn.length:  # the video was whole, and its state had gone with that
        return
    assert name or not told.states, f"states of {told.states} latents were written, and none is listed"
    if told.states and not drawn.goes_back:
        found = runs.loaded(name).emitted
        assert found >= told.states[-1], f"a state of {told.states[-1]} latents was written, not {found}"


def kill_and_go_on(runs: Runs, whole: Whole, luck: random.Random) -> dict[str, float]:
    """One trial; what was seen of it."""
    drawn, killing, kills = whole.drawn, Killing(runs, whole, luck), 1
    told = killing.first()
    try:
        stays = (
            whole.back * CHUNK * 4 - 3 if drawn.goes_back else told.frames
        )  # what was shown beyond may be taken back
        files = runs.files(drawn, NAME, 1)
        # a file gets its name once its first chunk is in it, and may be killed in between
        unnamed = told.frames <= CHUNK * 4 - 3 and not told.states and not any(map(has_pictures, files))
        shown = require_begun(whole, files, 0 if unnamed else min(stays, told.frames))
        require_state(runs, told, drawn)
        if runs.newest_state() and luck.random() < 0.3:
            again = killing.once(runs.newest_state())
            kills += again.killed
            shown += [len(list(shown_of(path, drawn))) for path in runs.files(drawn, NAME, 2) if has_pictures(path)]
        outputs, state = go_on(runs, whole, NAME, runs.newest_state())
        require_gone_on(runs, whole, outputs, state, again=kills > 1)
        if outputs is None:  # somebody has to come by who clears up
            runs(drawn, NAME)
        require_no_litter(runs, drawn, NAME)
    except BaseException as error:
        error.add_note(f"{drawn}, killed {killing.at}; {told}")
        raise
    return {"frames_that_played": max(shown), "latents_gone_on_from": state.emitted if state else 0, "kills": kills}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_killed_child_loses_nothing(streamed, campaign, feature):  # noqa: F811
    wholes: dict[int, Whole] = {}
    for trial in campaign(f"kill -9 of a child process: {feature}", full=TRIES[feature], sample=1):
        with trial:
            streamed.clear()
            drawing = trial.number // KILLS_A_DRAWING
            if drawing not in wholes:
                wholes.clear()
                settings = drawn(feature, random.Random(f"{trial.seed}/{feature}/{drawing}"))
                wholes[drawing] = whole_run(streamed, settings, Faults(streamed.out))
            trial.saw(**kill_and_go_on(streamed, wholes[drawing], trial.chance))
