"""Interrupts and the pack's stop anywhere in a streamed run: state and frames are whole, the next prompt runs, memory is back.

Prompts go through the host's own executor. See tests/core/campaign.py for what a trial is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from test_links import LATENT, STATE, tensors_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from cut_prompts import Ended, Held, Looks, NewerInterrupt, Prompts, interrupt, newer_interrupt, patched, stop
from cut_rollouts import SETTINGS, models
from faults.injector import Injector
from file_faults import Faults
from test_faults import frames_of

LOSSY = 6.0  # of 255, between two encodes of one picture of noise
HostInterrupt = comfy.model_management.InterruptProcessingException


@dataclass
class Whole:
    """A run that nothing cut short: what it made, and how often what may cut one short came by in it."""

    latents: torch.Tensor
    state: dict[str, torch.Tensor]
    frames: list[torch.Tensor]
    looks: int
    places: list[tuple[str, int]]
    disk: list[tuple[str, int]]  # those of them at which a disk may refuse
    operations: int


def of_a_disk(faults: Faults) -> list[tuple[str, int]]:
    """The places that are operations on files or videos: a decode, a frame for the encoder and a thread ask no disk."""
    return [place for place, name in faults.points if not name.startswith(("decode", "encode", "thread"))]


@dataclass
class Counted:
    """Calls `do` at torch operation `at` of the rollout's thread."""

    at: int
    do: Any

    def injector(self) -> Injector:
        def wanted(number: int, operation: object) -> bool:
            if number == self.at:
                self.do()
            return False

        return Injector(wanted)


class Bench:
    """Prompts with one set of models; whole runs by their settings, made when they are first asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, folders: Path) -> None:
        self.prompts, self.out, self.wholes = Prompts(patch, **models(folders)), folders / "output", {}
        self.count = 0

    def whole(self, name: str) -> Whole:
        if name not in self.wholes:
            settings, folder = SETTINGS[name], f"whole{len(self.wholes)}"
            looks, faults, counted = Looks(), Faults(self.out), Counted(-1, None).injector()
            with patched(looks, faults), counted:
                assert self.prompts(settings.graph(f"{folder}/take")).how == "success"
            taken = self.prompts.taken
            self.wholes[name] = Whole(
                taken[LATENT]["samples"].clone(),
                tensors_of(taken[STATE]),
                [frames_of(path) for path in self.videos(folder)],
                looks.came,
                [place for place, _ in faults.points],
                of_a_disk(faults),
                len(counted.operations),
            )
            self.prompts.nothing()
        return self.wholes[name]

    def videos(self, folder: str, number: int = 1) -> list[Path]:
        found = sorted((self.out / folder).glob(f"take_{number:05}_*"))
        return [path for path in found if path.suffix in (".mp4", ".mkv") and ".tmp" not in path.name]

    def cut(self, name: str, *installed: Any, mode: Any = None, twice: bool = False, fails: bool = False) -> list[str]:
        """Run settings while what is installed cuts the run short; what is not as it should be, in sentences. `twice`: the end
        of the run was interrupted too, so that a state may be missing. `fails`: it may end with an error, which is one sentence."""
        whole, folder = self.whole(name), f"cut{self.count}"
        self.count += 1
        self.prompts.nothing()
        before = Held.now()
        graph = SETTINGS[name].graph(f"{folder}/take")
        with patched(*installed), mode or patched():
            ended = self.prompts(graph)
        if mode is not None:
            mode.held = None  # what the operation that failed was to write to
        latents = self.prompts.taken.get(LATENT)
        bad = [] if ended.how != "error" or fails else [f"it ended with {ended.kind}: {ended.message}"]
        bad += untold(ended.message) if ended.how == "error" else []
        bad += self.left_of(name, folder, ended, latents, twice)
        latents = None
        self.prompts.nothing()
        bad += Held.now().more_than(before)
        bad += self.next_runs(graph, folder, whole)
        return bad

    def left_of(self, name: str, folder: str, ended: Ended, latents: Any, twice: bool) -> list[str]:
        """What is wrong with the files and outputs of a run that was cut short."""
        whole, bad = self.whole(name), []
        if ended.how == "success":
            found = latents["samples"]
            if not torch.equal(found, whole.latents[:, :, : found.shape[2]]):
                bad.append("the latents that were returned are others")
        videos, emitted = self.videos(folder), 0
        state = next(iter(sorted((self.out / folder).glob("take_00001_*.state.safetensors"))), None)
        if state is not None:
            emitted = load_state(state).emitted
            bad += self.goes_on(name, folder, state)
        for path, expected in zip(videos, whole.frames, strict=False):
            found = frames_of(path)
            if not torch.equal(found, expected[: len(found)]):
                bad.append(f"{path.name} has other frames")
            least = (emitted * 4 - 3) * len(expected) // SETTINGS[name].length if emitted else 0
            if len(found) < least:
                bad.append(f"{path.name} has {len(found)} frames, and its state counts {least}")
            if len(found) and len(found) < len(expected) and state is None and not twice:
                bad.append(f"{path.name} has {len(found)} frames, and there is no state to go on from")
        if ended.how == "success" and len(videos) != len(whole.frames):
            bad.append(f"it returned, and there are {len(videos)} videos")
        bad += [f"{path.name} was left" for path in (self.out / folder).rglob("*.tmp*")]
        return bad + self.reported(name, folder, ended)

    def reported(self, name: str, folder: str, ended: Ended) -> list[str]:
        """What is wrong with what the report says of the end. An interrupt that came while a whole video was being finished ends
        the prompt with the next node, or after the last: the run was whole."""
        for path in sorted((self.out / folder).glob("take_00001_*.report.json"))[:1]:
            told = json.loads(path.read_text())["ended"]
            right = {"interrupted": ("interrupted", "whole"), "success": ("whole", "stopped")}.get(
                ended.how, ("failed",)
            )
            if told not in right:
                return [f"the report says {told}, and it ended as {ended.how}"]
            made = [len(frames_of(video)) for video in self.videos(folder)]
            if told == "whole" and made != [len(frames) for frames in self.whole(name).frames]:
                return [f"the report says whole, and its videos have {made} frames"]
        return []

    def goes_on(self, name: str, folder: str, state: Path) -> list[str]:
        """Go on from a state that was left, as a user does, and compare with the whole."""
        whole, rest = self.whole(name), f"{folder}-rest"
        if load_state(state).emitted * 4 - 3 >= SETTINGS[name].length:
            return []
        ended = self.prompts(SETTINGS[name].graph(f"{rest}/take", f"{folder}/{state.name} [output]", join=True))
        if ended.how != "success":
            return [f"the state cannot be gone on from: {ended.kind} {ended.message}"]
        bad = []
        if not torch.equal(self.prompts.taken[LATENT]["samples"], whole.latents):
            bad.append("the latents of the run that went on are others")
        found = [frames_of(path) for path in self.videos(rest)]
        same = torch.equal if SETTINGS[name].exact else near
        if len(found) != len(whole.frames) or not all(map(same, found, whole.frames)):
            bad.append("the video of the run that went on is another")
        return bad

    def next_runs(self, graph: dict[str, dict], folder: str, whole: Whole) -> list[str]:
        """The same graph queued again."""
        ended = self.prompts(graph)
        if ended.how != "success":
            return [f"the next prompt ended as {ended.how}: {ended.message}"]
        bad = []
        if not torch.equal(self.prompts.taken[LATENT]["samples"], whole.latents):
            bad.append("the next prompt's latents are others")
        again = tensors_of(self.prompts.taken[STATE])
        if any(not torch.equal(again[key], value) for key, value in whole.state.items()):
            bad.append("the next prompt's state is another")
        newest = max(int(path.name.split("_")[1]) for path in (self.out / folder).glob("take_*.*"))
        found = [frames_of(path) for path in self.videos(folder, newest)]
        if len(found) != len(whole.frames) or not all(map(torch.equal, found, whole.frames)):
            bad.append("the next prompt's video is another")
        return bad


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether frames of a lossy file are those of another, whose encoder was not begun anew on the way."""
    return found.shape == expected.shape and float((found.double() - expected.double()).abs().mean()) < LOSSY


def untold(message: str) -> list[str]:
    """What is wrong with what the host shows of an error: no sentence of the pack's but several lines, a few words, a traceback or
    the system's own "[Errno 28] ...". The host adds its own words to one that is for want of memory."""
    said = message.partition("This error means you ran out of memory")[0].strip()
    good = "\n" not in said and len(said.split()) > 4 and "Traceback" not in said and not said.startswith("[Errno")
    return [] if good else [f"it said {said!r}"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    import folder_paths

    folders = tmp_path_factory.mktemp("interrupts")
    kept = {}
    for kind in ("output", "temp", "input"):
        (folders / kind).mkdir()
        kept[kind] = getattr(folder_paths, f"get_{kind}_directory")()
    with pytest.MonkeyPatch.context() as patch:
        yield Bench(patch, folders)


@pytest.fixture(autouse=True)
def in_its_folders(bench, folders):
    """The host's folders are the bench's for all tests here."""
    import folder_paths

    for kind in ("output", "temp", "input"):
        getattr(folder_paths, f"set_{kind}_directory")(str(bench.out.parent / kind))


def settings_of(trial: Any) -> str:
    return list(SETTINGS)[trial.number % len(SETTINGS)]


def require(bad: list[str], name: str, where: str) -> None:
    assert not bad, f"{name}, {where}: " + "; ".join(bad)


def test_the_hosts_interrupt_at_each_look_of_its_own(bench, campaign):
    """In every layer of every pass, in the decoder, in every step of progress."""
    for trial in campaign("the host's interrupt, at a look of its own (layers, passes, decode)", full=84, sample=1):
        with trial:
            name = settings_of(trial)
            at = trial.chance.randrange(bench.whole(name).looks)
            require(bench.cut(name, Looks(at, interrupt)), name, f"look {at}")


def test_a_newer_hosts_interrupt(bench, campaign):
    for trial in campaign("an interrupt that is no Exception, as newer hosts' is", full=48, sample=1):
        with trial:
            name = settings_of(trial)
            at = trial.chance.randrange(bench.whole(name).looks)
            require(bench.cut(name, Looks(at, newer_interrupt)), name, f"look {at}")


def test_an_interrupt_that_comes_during_any_torch_operation(bench, campaign):
    for trial in campaign("the host's interrupt while a torch operation runs", full=48, sample=1):
        with trial:
            name = settings_of(trial)
            at = trial.chance.randrange(bench.whole(name).operations)
            require(bench.cut(name, mode=Counted(at, interrupt).injector()), name, f"operation {at}")


# flag set, raised there, raised there as a newer host does
AT_FILES = (
    lambda why: interrupt(),
    lambda why: HostInterrupt(),
    lambda why: NewerInterrupt(why),
)


@pytest.mark.parametrize("how", range(len(AT_FILES)), ids=["asked for", "raised", "raised, newer"])
def test_interrupts_at_files_encoder_decoder_and_threads(bench, campaign, how):
    words = ("asked for", "raised", "raised as no Exception")[how]
    kind = f"an interrupt {words} at a file operation, packet, decode or thread"
    for trial in campaign(kind, full=36, sample=1):
        with trial:
            name = settings_of(trial)
            place = trial.chance.choice(bench.whole(name).places)
            faults = Faults(bench.out, place, kinds=(AT_FILES[how],))
            require(bench.cut(name, faults), name, f"{place}, {faults.failed}")


def test_the_packs_stop_at_any_moment(bench, campaign):
    for trial in campaign("the pack's stop, at a look, a torch operation or a file operation", full=48, sample=1):
        with trial:
            name = settings_of(trial)
            whole, how = bench.whole(name), trial.chance.choice(("look", "operation", "file"))
            if how == "operation":
                bad = bench.cut(name, mode=Counted(trial.chance.randrange(whole.operations), stop).injector())
            elif how == "look":
                bad = bench.cut(name, Looks(trial.chance.randrange(whole.looks), stop))
            else:
                bad = bench.cut(name, Faults(bench.out, trial.chance.choice(whole.places), kinds=(lambda why: stop(),)))
            require(bad, name, how)


def test_a_stop_and_then_an_interrupt(bench, campaign):
    for trial in campaign("the pack's stop and then the host's interrupt", full=24, sample=1):
        with trial:
            name = settings_of(trial)
            first = trial.chance.randrange(bench.whole(name).looks)
            then = trial.chance.randrange(first, bench.whole(name).looks)
            require(bench.cut(name, Looks(first, stop), Looks(then, interrupt)), name, f"looks {first}, {then}")


def test_an_interrupt_of_the_end_of_an_interrupted_run(bench, campaign):
    for trial in campaign("an interrupt while an interrupted run ends", full=24, sample=1):
        with trial:
            name = settings_of(trial)
            whole = bench.whole(name)
            at, place = trial.chance.randrange(whole.looks // 2, whole.looks), trial.chance.choice(whole.places)
            faults = Faults(bench.out, place, kinds=(lambda why: HostInterrupt(),))
            require(bench.cut(name, Looks(at, interrupt), faults, twice=True), name, f"look {at}, {place}")
