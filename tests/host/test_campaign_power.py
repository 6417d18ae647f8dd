"""The power is cut while a rollout is streamed: whatever the disk then holds of all that was not asked onto it, the newest state
loads, its frames are in its files, and it goes on to the bits of the run that nobody ended. The same of every state that is listed.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from adastate_pack.adastate_core.rollout import RolloutState
from adastate_pack.adastate_core.video.animation import _blocks
from adastate_pack.adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_pack.nodes import saved_states
from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files
from bit_equal import decoded, distance
from drawn_runs import (
    FEATURES,
    Runs,
    drawn,
    go_on,
    require_gone_on,
    streamed,  # noqa: F401  a fixture
    whole_run,
)
from file_faults import Faults
from power_cuts import WAYS, Cut, Record, cuts
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

    def check(self, cut: Cut) -> int:
        """How many states the disk holds; all of them load, and their frames are there. The newest goes on."""
        self.runs.clear()
        cut.write(self.runs.out)
        newest, drawn = self.runs.newest_state(), self.whole.drawn
        promised = [what for steps, what in self.record.promised if steps <= cut.steps]
        removed = cut.steps == len(self.record.steps) or not promised
        assert newest or removed or self._whole_there(), (
            f"a state of {promised[-1]} latents was saved, and none is there"
        )
        listed = saved_files(STATE_SUFFIX)
        for name in listed:
            state = self.runs.loaded(name)
            if promised and name == newest and not drawn.goes_back:
                assert state.emitted >= promised[-1], (
                    f"a state of {promised[-1]} latents was saved, not {state.emitted}"
                )
            self.require_frames(state, name)
        if newest and self._is_new(newest):
            state = self.runs.loaded(newest)
            outputs, state = go_on(self.runs, self.whole, NAME, newest)
            require_gone_on(self.runs, self.whole, outputs, state)
        return len(listed)

    def _whole_there(self) -> bool:
        """A whole video leaves no state: then all its frames are in it."""
        report = json.loads(self.last[2])
        paths = [self.runs.out / name for name in (*report.get("videos", []), *report.get("frame_folders", []))]
        return all(
            self._shows(path, self.whole.drawn.length, shown)
            for path, shown in zip(paths, self.whole.shown, strict=True)
        )

    def require_frames(self, state: RolloutState, name: str) -> None:
        """What a state counts is in its files, to the bit."""
        stream = state.stream
        counts = list(stream.get("file_frames", [])) + [state.emitted * 4 - 3] * len(stream.get("frame_folders", []))
        named = (*stream.get("files", []), *stream.get("frame_folders", []))
        assert len(named) == len(self.whole.shown)
        for file, count, shown in zip(named, counts, self.whole.shown, strict=True):
            path = self.runs.out / file
            assert self._shows(path, count, shown), f"{name} counts {count} frames of {file}, which is not so"

    def _shows(self, path: Path, count: int, shown: tuple[Any, ...]) -> bool:
        drawn = self.whole.drawn
        if not path.exists():
            return False
        if path.suffix != ".frames":
            found = (picture for picture, _ in zip(decoded(path), range(count), strict=False))
        elif FRAME_FORMATS[drawn.frames].animated:
            return self._animated(path / "000000.webp", count)
        else:
            suffix = FRAME_FORMATS[drawn.frames].suffix
            files = [path / f"{number:06}{suffix}" for number in range(count)]
            if not all(each.is_file() for each in files):
                return False
            found = (next(decoded(each)) for each in files)
        made = [distance(one, two) == 0 for one, two in zip(found, shown, strict=False)]
        return len(made) == count and (all(made) or drawn.goes_back)

    def _animated(self, path: Path, count: int) -> bool:
        def first(data: bytes) -> list[bytes]:
            import io

            return [block for kind, block in _blocks(io.BytesIO(data)) if kind == b"ANMF"][:count]

        return (
            path.is_file()
            and len(made := first(path.read_bytes())) == count
            and made == first(self.whole_bytes[path.name])
        )

    def _is_new(self, newest: str) -> bool:
        """Whether no disk that looked alike to whoever goes on was tried before: the state, and how long its files are."""
        path = self.runs.out / newest.removesuffix(" [output]")
        key = (path.read_bytes()[:4096], path.stat().st_size)
        known = hash(key) in self.gone_on
        self.gone_on.add(hash(key))
        return not known


def test_a_power_cut_leaves_a_state_that_goes_on(streamed, campaign):  # noqa: F811
    made: dict[int, Cutting] = {}
    kinds = [campaign(f"power cut: {way}", full=DRAWINGS, sample=1) for way in WAYS]
    for way, trials in zip(WAYS, kinds, strict=True):
        for trial in trials:
            with trial:
                if trial.number not in made:
                    made[trial.number] = Cutting(streamed, trial.number, trial.seed)
                cutting, tried, states = made[trial.number], set(), 0
                for cut in cuts(cutting.record, way, trial.chance):
                    if cut.key in tried:
                        continue
                    tried.add(cut.key)
                    try:
                        states = max(states, cutting.check(cut))
                    except BaseException as error:
                        error.add_note(
                            f"{cutting.whole.drawn}, cut after {cut.steps} of {len(cutting.record.steps)} steps"
                        )
                        raise
                trial.saw(moments=len(cutting.record.steps), disks=len(tried), states=states)
