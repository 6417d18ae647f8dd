"""What has to be true of drawn runs (drawn_runs.py) wherever they end: their files play, their newest state goes on to the bits of
the run that nobody ended, and nothing is left lying about."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adastate_pack.adastate_core.rollout import RolloutState
from adastate_pack.adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_pack.nodes.host.output_files import STATE_SUFFIX
from bit_equal import decoded, differences, distance
from drawn_runs import AFTER_BACK, FPS, HISTORY, RATE, Drawn, Runs
from file_faults import Faults
from PIL import Image
from sounds import around, lag, played, siren

NEAR = 0.1  # mean difference, as a share of white


@dataclass(frozen=True)
class Whole:
    """A run that nobody ended, and the seconds that it took. `points` are its operations on files, `timeline` how it was steered in
    the end, and `back` the chunk that it went back to."""

    drawn: Drawn
    seconds: float
    latents: torch.Tensor | None
    state: RolloutState
    pictures: dict[int, torch.Tensor]
    shown: tuple[tuple[numpy.ndarray, ...], ...]  # of each file
    points: tuple[tuple[str, int], ...]
    timeline: str
    back: int


def whole_run(runs: Runs, drawn: Drawn, counting: Faults) -> Whole:
    """Make it, and clear it away."""
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        counting.install(patch)
        outputs = runs(drawn, "whole").args
    seconds = time.monotonic() - start
    shown = tuple(tuple(shown_of(path, drawn)) for path in runs.files(drawn, "whole", 1))
    assert {len(each) for each in shown} == {drawn.length} == {len(runs.written)}
    steering = json.loads(outputs[2]).get("steering", {"done": [], "timeline": ""})
    assert not [one for one in steering["done"] if "error" in one], steering
    back = [one["taken_back"]["chunk"] for one in steering["done"] if "taken_back" in one]
    assert bool(back) == drawn.goes_back, f"it went back to {back}: {steering}"
    latents = outputs[0]["samples"] if drawn.keep_latents else None
    points = tuple(place for place, _ in counting.points)
    made = Whole(
        drawn,
        seconds,
        latents,
        outputs[1],
        dict(runs.written),
        shown,
        points,
        steering["timeline"],
        min(back, default=0),
    )
    runs.clear()
    return made


def go_on(runs: Runs, whole: Whole, name: str, listed: str | None) -> tuple[Any, RolloutState | None]:
    """The node's outputs for a run that goes on from a state as it is `listed`, or begins anew, and the state; None for outputs if
    it is that of the whole video. Of a steered run it takes the timeline that the state tells; of a state from before the last
    change, that of the whole. Where that one went back, such a state may be behind what stayed: then the run goes on from its
    history."""
    drawn, timeline = whole.drawn, ""
    state = runs.loaded(listed) if listed else None
    if state is not None and drawn.wishes:
        changed = state.next_chunk > drawn.wishes[-1][0] or drawn.goes_back and AFTER_BACK in str(state.steered)
        timeline = changed and state.steered.get("timeline") or whole.timeline  # where it was joined, it told all
        if drawn.goes_back and AFTER_BACK not in str(state.steered):
            timeline = whole.timeline
            if state.next_chunk > whole.back:
                state = kept_at(runs, listed, whole.back)
    return None if is_whole(whole, state) else runs(drawn, name, state, timeline).args, state


def kept_at(runs: Runs, listed: str, chunk: int) -> RolloutState:
    """The kept state after so many chunks or fewer: of the run that it is listed for, or, where that one itself had gone on from a
    later chunk, of the first."""
    try:
        return runs.loaded(listed, chunk)
    except ValueError:
        return runs.loaded(listed.replace("_00002_", "_00001_"), chunk)


def shown_of(path: Path, drawn: Drawn) -> Iterator[numpy.ndarray]:
    """The pictures of a video or of a folder of frames, in order, each [H, W, 3]. Whatever does not decode raises."""
    if path.suffix != ".frames":
        yield from decoded(path)
    elif FRAME_FORMATS[drawn.frames].animated:
        with Image.open(path / f"000000{FRAME_FORMATS[drawn.frames].suffix}") as image:
            for number in range(image.n_frames):
                image.seek(number)
                yield numpy.asarray(image.convert("RGB"))
    else:
        for number, each in enumerate(sorted(path.glob(f"*{FRAME_FORMATS[drawn.frames].suffix}"))):
            assert int(each.stem) == number, f"{each.name} stands where frame {number} belongs"
            (picture,) = decoded(each)
            yield picture


def require_begun(whole: Whole, paths: list[Path], least: int) -> list[int]:
    """How many frames each file of an ended run shows: at least `least`, less the newest of a video, and each as in the whole, but
    where the run goes back."""
    found = []
    for path, wanted in zip(paths, whole.shown, strict=True):
        shown = list(shown_of(path, whole.drawn)) if has_pictures(path) else []
        missing = least - (path.suffix != ".frames") - len(shown)
        assert missing <= 0, f"{path.name} shows {len(shown)} of {least} frames"
        if not whole.drawn.goes_back:
            require_as_wanted(path, shown, wanted, len(shown))
        found.append(len(shown))
    return found


def require_as_wanted(path: Path, shown: list[numpy.ndarray], wanted: tuple[numpy.ndarray, ...], exact: int) -> None:
    """The first `exact` frames to the bit, and those behind them nearly: an encoder that has just begun gives them other bits."""
    most = [0.0 if i < exact else NEAR for i in range(len(shown))]
    far = {i: distance(one, two) for i, (one, two) in enumerate(zip(shown, wanted, strict=False))}
    far = {i: round(value, 4) for i, value in far.items() if value > most[i]}
    assert not far, f"frames of {path.name} are others: {far}, of which {exact} are to be the same"


def has_pictures(path: Path) -> bool:
    """Whether it is there with anything in it; an animation of no picture is none yet."""
    if path.suffix != ".frames":
        return path.is_file()
    return path.is_dir() and any(each.suffix in (".png", ".tiff", ".exr") or _animated(each) for each in path.iterdir())


def _animated(path: Path) -> bool:
    return path.suffix == ".webp" and b"ANMF" in path.read_bytes()


def is_whole(whole: Whole, state: RolloutState | None) -> bool:
    """Whether nothing is left to be made: the run ended just before its state was cleared away."""
    return state is not None and state.emitted == whole.state.emitted


def require_all_there(runs: Runs, whole: Whole, state: RolloutState) -> None:
    """A state behind the last frame is that of the whole, and its files show all."""
    bad = [name for name in differences(state, whole.state) if name != "steered" or not whole.drawn.wishes]
    assert not bad, f"of the last state differ: {', '.join(bad)}"
    names = (*state.stream.get("files", []), *state.stream.get("frame_folders", []))
    for name, wanted in zip(names, whole.shown, strict=True):
        shown = list(shown_of(runs.out / name, whole.drawn))
        assert len(shown) == whole.drawn.length, f"{name} shows {len(shown)} frames of {whole.drawn.length}"
        require_as_wanted(runs.out / name, shown, wanted, 0)


def require_gone_on(runs: Runs, whole: Whole, outputs: Any, state: RolloutState | None, again: bool = False) -> None:
    """A run that went on from `state`, or from nothing, is the whole one: latents, state, pictures, files. `again`: what is joined
    to was joined itself."""
    if outputs is None:
        require_all_there(runs, whole, state)
        return
    drawn, before, report = whole.drawn, 0 if state is None else state.emitted * 4 - 3, json.loads(outputs[2])
    if whole.latents is not None:
        assert torch.equal(outputs[0]["samples"], whole.latents), "the latents are others"
    bad = [name for name in differences(outputs[1], whole.state) if name != "steered" or not drawn.wishes]
    assert not bad, f"of the state differ: {', '.join(bad)}"
    assert set(runs.written) >= set(range(before, drawn.length)), "not all of the rest was made"
    bad = [place for place, made in runs.written.items() if not torch.equal(made, whole.pictures[place])]
    assert not bad, f"the pictures {bad} are others"
    paths = [runs.out / name for name in (*report.get("videos", []), *report.get("frame_folders", []))]
    for path, wanted in zip(paths, whole.shown, strict=True):
        shown = list(shown_of(path, drawn))
        assert len(shown) == drawn.length, f"{path.name} shows {len(shown)} frames of {drawn.length}"
        copied = 0 if again else before
        require_as_wanted(path, shown, wanted, drawn.length if drawn.exact(path) or state is None else copied)
        if drawn.sound and path.suffix != ".frames":
            require_sound(path, drawn)


def require_sound(path: Path, drawn: Drawn) -> None:
    """A whole video carries its sound, in step."""
    found, rate = played(path)
    wanted = around(siren(RATE, drawn.length / FPS, drawn.sound).astype(float), rate, 0, found.shape[1])
    assert rate == RATE and 0 <= found.shape[1] / rate - drawn.length / FPS < 1024 / rate + 0.001
    assert lag(found[0], wanted[0]) == 0, "the sound is late"


def require_no_litter(runs: Runs, drawn: Drawn, name: str) -> None:
    """After runs that were ended and one that went on to its end: their files, states and reports, and nothing else
    in any of the host's folders."""
    folder, item = runs.out / name, "b0" if drawn.batch > 1 else ""
    reports = (each.partition(".")[0] + ".report.json" for each in drawn.suffixes)
    beside = (*drawn.suffixes, *reports, *(f"{item}{end}" for end in (".history", STATE_SUFFIX)))
    known = re.compile(rf"take_[0-9]{{5}}_({'|'.join(map(re.escape, beside))})")
    found = [each for each in folder.rglob("*") if not _inside(each, (".history", ".frames"))]
    left = [each.name for each in found if not known.fullmatch(each.name) and each != folder / "stills"]
    assert not left, f"left are {left}"
    hidden = [each.name for each in runs.folders.rglob("*") if each.name.startswith(".") or each.name.endswith(".tmp")]
    assert not hidden, f"left are {hidden}"
    assert not any((runs.folders / "temp").iterdir()) and {each.name for each in runs.out.iterdir()} == {name}
    for each in runs.out.rglob("*.history"):
        assert len(list(each.iterdir())) <= HISTORY, f"{each.name} holds {[one.name for one in each.iterdir()]}"


def _inside(path: Path, suffixes: tuple[str, ...]) -> bool:
    return any(parent.suffix in suffixes for parent in path.parents)
