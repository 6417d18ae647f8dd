"""The power is cut while a rollout is streamed: whatever the disk then holds of all that was not asked onto it, the newest state
loads, its frames are in its files, and it goes on to the bits of the run that nobody ended. The same of every state that is listed.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from adastate_pack.adastate_core.rollout import RolloutState
from adastate_pack.adastate_core.video.animation import _blocks
from adastate_pack.adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_pack.adastate_core.video.frames import opened_alone
from adastate_pack.nodes import saved_states
from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files
from bit_equal import decoded, distance
from drawn_runs import (
    AFTER_BACK,
    CHUNK,
    FEATURES,
    Runs,
    drawn,
    streamed,  # noqa: F401  a fixture
)
from file_faults import Faults
from power_cuts import WAYS, Cut, Record, cuts
from run_checks import (
    go_on,
    require_gone_on,
    whole_run,
)
from test_steering import script  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(os.name == "nt", reason="what a power cut leaves is modelled as POSIX has it")
NAME, DRAWINGS = "trial", 12


class Cutting:
    """One drawn run, whole and recorded."""

    def __init__(self, runs: Runs, drawing: int, seed: int) -> None:
        self.runs = runs
        runs.clear()
        settings = drawn(FEATURES[drawing % len(FEATURES)], random.Random(f"{seed}/power/{drawing}"))
        self.whole = whole_run(runs, settings, Faults(runs.out))
        self.record = Record(runs.out)
        with pytest.MonkeyPatch.context() as patch:
            self._promises(patch)
            self.record.install(patch)
            self.last = runs(settings, NAME).args
            self.record.look()
        self.whole_bytes = {path.name: path.read_bytes() for path in runs.out.rglob("*.webp")}
        self.record.close()
        self.gone_on: set[tuple] = set()  # what went on well

    def _promises(self, patch: pytest.MonkeyPatch) -> None:
        save = saved_states.save_state

        def saved(state: RolloutState, path: Path) -> Path:
            made = save(state, path)
            self.record.promise(state.emitted)
            return made

        patch.setattr(saved_states, "save_state", saved)

    def check(self, cut: Cut, way: str) -> int:
        """How many states the disk holds; all of them load, and their frames are there. The newest goes on."""
        self.runs.clear()
        cut.write(self.runs.out)
        newest, drawn = self.runs.newest_state(), self.whole.drawn
        promised = [what for steps, what in self.record.promised if steps <= cut.steps]
        if not newest and promised:  # a whole video leaves none
            assert self._whole_there(), (
                f"a state of {promised[-1]} latents was saved, and neither it nor the whole is there"
            )
        listed = saved_files(STATE_SUFFIX)
        for name in listed:
            state = self.runs.loaded(name)
            if promised and name == newest and not drawn.goes_back:
                assert state.emitted >= promised[-1], (
                    f"a state of {promised[-1]} latents was saved, not {state.emitted}"
                )
            self.require_frames(state, name)
        if newest and self._is_new(newest, way):
            outputs, state = go_on(self.runs, self.whole, NAME, newest)
            require_gone_on(self.runs, self.whole, outputs, state)
        return len(listed)

    def _whole_there(self) -> bool:
        """Whether the whole video is."""
        report = json.loads(self.last[2])
        paths = [self.runs.out / name for name in (*report.get("videos", []), *report.get("frame_folders", []))]
        return all(
            self._shows(path, self.whole.drawn.length, shown)
            for path, shown in zip(paths, self.whole.shown, strict=True)
        )

    def require_frames(self, state: RolloutState, name: str) -> None:
        """What a state counts is in its files, to the bit. A state from before the run went back counts frames that went."""
        stream, drawn = state.stream, self.whole.drawn
        videos, folders = stream.get("files", []), stream.get("frame_folders", [])
        # of a run that only fills folders a state counts the frames as well
        counts = [*stream.get("file_frames", [])[: len(videos)], *[state.emitted * 4 - 3] * len(folders)]
        named = (*videos, *folders)
        went = drawn.goes_back and AFTER_BACK not in str(state.steered) and state.next_chunk > self.whole.back
        other = self.whole.back * CHUNK * 4 - 3 if went else None
        assert len(named) == len(self.whole.shown)
        for file, count, shown in zip(named, counts, self.whole.shown, strict=True):
            there = self._shows(self.runs.out / file, count, shown, other)
            assert there, f"{name} counts {count} frames of {file}, and they are not there"

    def _shows(self, path: Path, count: int, shown: tuple[Any, ...], other: int | None = None) -> bool:
        """Whether a file has the first `count` frames, those from `other` on not those of the whole."""
        if not path.exists():
            return False
        if path.suffix != ".frames":
            found = (picture for picture, _ in zip(read(path), range(count), strict=False))
        elif FRAME_FORMATS[self.whole.drawn.frames].animated:
            return self._animated(path / "000000.webp", count)
        else:
            suffix = FRAME_FORMATS[self.whole.drawn.frames].suffix
            files = [path / f"{number:06}{suffix}" for number in range(count)]
            if not all(each.is_file() for each in files):
                return False
            found = (next(decoded(each)) for each in files)
        same = [distance(one, two) == 0 for one, two in zip(found, shown, strict=False)]
        return len(same) == count and all(same[:other]) and (other is None or not same[other])

    def _animated(self, path: Path, count: int) -> bool:
        if not path.is_file():
            return False
        made, wanted = (_pictures(data, count) for data in (path.read_bytes(), self.whole_bytes[path.name]))
        return len(made) == count and made == wanted

    def _is_new(self, newest: str, way: str) -> bool:
        """Whether nobody went on from this state yet after such a cut; its header has the checksums of what is in it."""
        path = self.runs.out / newest.removesuffix(" [output]")
        key = way, path.stat().st_size, path.read_bytes()[:65536]
        known = key in self.gone_on
        self.gone_on.add(key)
        return not known


def read(path: Path) -> Iterator[Any]:
    """The pictures of a video; as the pack reads it where its end is torn so that FFmpeg alone refuses it."""
    try:
        yield from decoded(path)
    except (av.error.InvalidDataError, av.error.EOFError):
        with opened_alone(path) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb48le")


def _pictures(data: bytes, count: int) -> list[bytes]:
    """The first pictures of an animated WebP."""
    return [block for kind, block in _blocks(io.BytesIO(data)) if kind == b"ANMF"][:count]


def tried(cutting: Cutting, way: str, luck: random.Random) -> dict[str, int]:
    """Every disk that a run's record may leave in one way, once; what was seen."""
    known, states = set(), 0
    for cut in cuts(cutting.record, way, luck):
        if cut.key in known:
            continue
        known.add(cut.key)
        try:
            states = max(states, cutting.check(cut, way))
        except BaseException as error:
            error.add_note(f"{cutting.whole.drawn}, cut after {cut.steps} of {len(cutting.record.steps)} steps")
            raise
    return {"moments": len(cutting.record.steps), "disks": len(known), "states": states}


def test_a_power_cut_leaves_a_state_that_goes_on(streamed, campaign):  # noqa: F811
    made: dict[int, Cutting] = {}
    kinds = [campaign(f"power cut: {way}", full=DRAWINGS, sample=1) for way in WAYS]
    for way, trials in zip(WAYS, kinds, strict=True):
        for trial in trials:
            with trial:
                if trial.number not in made:
                    made[trial.number] = Cutting(streamed, trial.number, trial.seed)
                trial.saw(**tried(made[trial.number], way, trial.chance))


@pytest.mark.parametrize(
    ("drawing", "way"),
    [
        pytest.param(10, "all is lost", id="a file that takes over is there before it has the name"),
        pytest.param(3, "the last name is kept alone", id="a video has its name before a state counts its frames"),
    ],
)
def test_what_power_cuts_found(streamed, drawing, way):  # noqa: F811
    assert tried(Cutting(streamed, drawing, 0), way, random.Random(0))["states"]
