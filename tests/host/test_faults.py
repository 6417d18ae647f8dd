"""A streamed run in which one thing that it asks of the system fails: what it returned or saved goes on to the bits of the
whole, a good autosave stays, finished frames stay.

`python3 run.py faults` sets ADASTATE_FAULTS=all, and all of them fail in turn; else one of each kind does.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from pathlib import Path

import av
import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import frame_writer
from adastate_pack.nodes import stream as stream_nodes
from file_faults import Faults

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from sounds import lag, played, siren

SEED = 0
LENGTH, CHUNKS = 33, (9, 21, 33)  # frames of the video, and after each of its chunks


class Run:
    """A run of the rollout node into a folder of its own, with what its sinks were given."""

    def __init__(self, rollout, stream, folders, patch) -> None:
        self.rollout, self.stream, self.out, self.patch = rollout, stream, folders / "output", patch
        self.settings: dict = {}
        self.written: list[torch.Tensor] = []
        write = stream_nodes.VideoSink.write

        def keep(sink, pictures):
            write(sink, pictures)
            self.written.append(pictures.clone())

        patch.setattr(stream_nodes.VideoSink, "write", keep)

    def __call__(self, name: str, **more):
        self.written.clear()
        stream = self.stream(filename_prefix=f"{name}/take", **self.settings)
        return self.rollout(length=LENGTH, anchor=AnchorAdaptive(1), stream=stream, keep_latents=True, **more)

    def pictures(self) -> torch.Tensor:
        return torch.cat(self.written) if self.written else torch.zeros(0, 32, 32, 3, dtype=torch.uint8)

    def faulty(self, name: str, place: tuple[str, int] | None):
        """(outputs or None, what was raised or None, the faults, the autosave's frames as something failed)."""
        state, seen = self.out / name / "take_00001_.state.safetensors", []
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(self.out, place, SEED)
            faults.install(patch)
            faults.when = lambda: (patch.undo(), seen.append(load_state(state).emitted if state.is_file() else 0))
            try:
                return self(name), None, faults, 0
            except BaseException as error:  # noqa: BLE001
                return None, error, faults, seen[0] if seen else 0


def frames_of(path: Path) -> torch.Tensor:
    """The frames of a file that decode; none of one that is no video."""
    try:
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    except (av.error.FFmpegError, OSError, IndexError):
        frames = []
    return torch.stack(frames) if frames else torch.zeros(0, 32, 32, 3, dtype=torch.uint8)


# whose model, decoder and latents a run has
FAMILIES = ("Wan 2.1", "Wan 2.2 5B")


@pytest.fixture
def run_of(rollout, vae, node, folders, monkeypatch):
    """Makes the runs of a family."""

    def make(family: str) -> Run:
        small = family == "Wan 2.2 5B"
        decoder = tiny_5b.loaded_vae() if small else vae

        def stream(**inputs):
            defaults = {
                "vae": decoder, "fps": 16.0, "codec": "h264", "quality": 18, "preview": True, "autosave_seconds": 1e-6,
                "join": False, "history_chunks": 1, "history_states": 2,
            }  # fmt: skip
            return node("AdaStateStreamOutput")(**(defaults | inputs)).args[0]

        if not small:
            return Run(rollout, stream, folders, monkeypatch)
        model = tiny_5b.loaded_model()
        return Run(lambda **inputs: rollout(**({"model": model} | inputs)), stream, folders, monkeypatch)

    return make


def check(run: Run, n: int, whole: dict) -> list[str]:
    """What one failure broke, in sentences; nothing if it is as it should be."""
    name = f"{whole['how']}{n}"
    outputs, error, faults, saved_before = run.faulty(name, whole["places"][n])
    if faults.failed is None:
        return [f"only {len(faults.points)} operations came, and the run ended with {error!r}"]
    bad, made = [], run.pictures()
    folder = run.out / name
    video, save = folder / "take_00001_.mp4", folder / "take_00001_.state.safetensors"
    found = frames_of(video)
    if not torch.equal(found[: len(made)], whole["frames"][: len(made)]):
        bad.append(f"{len(made)} frames were written, and the video has {len(found)}, or others")
    bad += out_of_step(video, len(found)) if "audio" in run.settings else []
    state = None
    if outputs is not None:
        if not torch.equal(outputs.args[0]["samples"], whole["latents"]):
            bad.append("the latents that were returned are others")
        if len(found) != LENGTH:
            bad.append(f"the run returned, and its video has {len(found)} frames")
    if save.is_file():
        try:
            state = load_state(save)
        except ValueError as reason:
            bad.append(f"the autosave cannot be read: {reason}")
    if state is not None and state.emitted < saved_before:
        bad.append(f"an autosave of {saved_before} latents was replaced by one of {state.emitted}")
    if outputs is None and len(made) == LENGTH and isinstance(error, Exception):
        bad.append("all frames were written, and the run returned nothing")
    finished = len(found) == LENGTH and b"moof" not in video.read_bytes()  # a whole video leaves no state unasked
    if outputs is None and state is None and len(made) and not finished:
        bad.append(f"{len(made)} frames were written, and there is no state to go on from")
    bad += reported(folder / "take_00001_.report.json", outputs, error, state)
    if state is not None:
        bad += resumed(run, name, state, whole)
    bad += [f"{path.name} was left" for path in left(folder) if not faults.failed.startswith(("unlink", "remove"))]
    told = type(error).__name__ if error else "returned"
    return [f"{n} ({faults.failed}), {told}: {one}" for one in [*bad, *running()]]


def running() -> list[str]:
    """Threads that were left."""
    return [f"the thread {each.name} was left" for each in threading.enumerate() if each.name == frame_writer.NAME]


def reported(path: Path, outputs, error, state) -> list[str]:
    """What the report beside the video says that is not so; it may be missing only where a whole run was warned of that."""
    if not path.is_file():
        warned = outputs is not None and "report.json could not be written" in outputs.args[2]
        return [] if warned else ["there is no report"]
    told = json.loads(path.read_text())
    ended = "whole" if outputs else "failed" if isinstance(error, Exception) else "interrupted"
    if told["ended"] != ended:
        return [f"the report says {told['ended']}, and it was {ended}"]
    if (told["error"] is not None) != (ended == "failed"):
        return [f"the report's error is {told['error']}"]
    named = told["state"] and told["state"].removesuffix(" [output]").rpartition("/")[2]
    found = None if state is None else path.name.replace(".report.json", ".state.safetensors")
    return [] if named == found else [f"the report names the state {named}, and there is {found}"]


def resumed(run: Run, name: str, state, whole: dict) -> list[str]:
    """Go on from an autosave; what is not as in the whole."""
    frames = state.stream["frames_written"]
    if frames not in CHUNKS or not torch.equal(
        frames_of(run.out / name / "take_00001_.mp4")[:frames], whole["frames"][:frames]
    ):
        return [f"the autosave counts {frames} frames, which the video does not have"]
    if state.emitted * 4 - 3 >= LENGTH:
        ended = state.latents if state.latents is not None else torch.zeros(0)
        return [] if torch.equal(ended, whole["state"]) else ["the latents in the last autosave are others"]
    try:
        outputs = run(f"{name}-rest", resume=state)
    except Exception as error:  # noqa: BLE001
        return [f"the autosave cannot be gone on from: {error}"]
    bad = []
    if not torch.equal(outputs.args[0]["samples"], whole["latents"]):
        bad.append("the latents of the resumed run are others")
    if not torch.equal(run.pictures(), whole["pictures"][frames:]):
        bad.append("the pictures of the resumed run are others")
    return bad


def left(folder: Path) -> list[Path]:
    """Files that are neither the video nor a state nor a report."""
    known = (".mp4", ".state.safetensors", ".report.json")
    return [p for p in folder.rglob("*") if p.is_file() and (not p.name.endswith(known) or ".tmp" in p.name)]


def out_of_step(video: Path, frames: int) -> list[str]:
    """What of a file's sound is not as far as its frames, or elsewhere."""
    if frames < 2:
        return []
    heard, rate = played(video)
    seconds = heard.shape[1] / rate
    if seconds < (frames - 1) / 16 - 1024 / rate:
        return [f"the video has {frames} frames, and sound for {seconds:.3f} s"]
    behind = lag(heard[0], SOUND[0])
    return [f"the sound is {behind} samples late"] if behind else []


SOUND = siren(16_000, 3.0)
# states on the way have the rollout wait for what is written; without them it goes on beside, here with sound
WAYS = {
    "saved": {},
    "beside": {
        "autosave_seconds": 0.0,
        "history_chunks": 0,
        "audio": {"waveform": torch.from_numpy(SOUND)[None], "sample_rate": 16_000},
    },
}


def whole_run(run: Run, how: str) -> dict:
    """A run in which nothing fails: what it made, and all that might fail, by place and by name."""
    run.settings = WAYS[how]
    outputs, error, faults, _ = run.faulty(f"whole-{how}", None)
    assert error is None
    whole = {
        "how": how,
        "latents": outputs.args[0]["samples"],
        "state": outputs.args[1].latents,
        "pictures": run.pictures(),
        "frames": frames_of(run.out / f"whole-{how}" / "take_00001_.mp4"),
        "places": [place for place, _ in faults.points],
        "names": [f"{name}{', beside' if place[0] == frame_writer.NAME else ''}" for place, name in faults.points],
    }
    assert len(whole["frames"]) == len(whole["pictures"]) == LENGTH
    return whole


def picked_of(names: list[str]) -> tuple[dict[str, list[int]], list[int]]:
    """Which operations are of one name, and those of all that fail."""
    kinds: dict[str, list[int]] = {}
    for n, name in enumerate(names):
        kinds.setdefault(name, []).append(n)
    luck = random.Random(SEED)
    if os.environ.get("ADASTATE_FAULTS") == "all":
        return kinds, list(range(len(names)))
    return kinds, sorted(luck.choice(numbers) for numbers in kinds.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.sampled(3)  # the first and the last: each family and each way once
def test_what_fails_loses_nothing(run_of, how, family):
    run, only = run_of(family), os.environ.get("ADASTATE_FAULT", "")
    whole = whole_run(run, how)
    kinds, picked = picked_of(whole["names"])
    needed = {"decode", "encode, beside", "write video, beside", "open video w", "close video", "thread start"}
    assert needed <= set(kinds)
    if only:
        picked = [int(only.removeprefix(how))] if only.startswith(how) else []
    found = {f"{how}{n}": check(run, n, whole) for n in picked}
    bad = [f"{how}{sentence}" for sentences in found.values() for sentence in sentences]
    lines = [f"{name}: {len(numbers)}" for name, numbers in kinds.items()]
    print(f"{family}, {how}: {len(picked)} of {len(whole['names'])} failed ({'; '.join(lines)})")  # noqa: T201
    if row := os.environ.get("ADASTATE_FAULTS_ROW"):
        add_to_row(Path(row), len(whole["names"]), found, [f"{family}, {sentence}" for sentence in bad])
    assert not bad, f"{len(bad)} with seed {SEED}; one alone: ADASTATE_FAULT=saved7\n" + "\n".join(bad)


def add_to_row(row: Path, operations: int, found: dict[str, list[str]], bad: list[str]) -> None:
    """What failed, for the table of `run.py faults`, with what the cases before counted."""
    text = {
        "name": "files, video, decode, encode and threads of a streamed run",
        "operations": 0,
        "bad": [],
        "said": [],
    }
    text = json.loads(row.read_text(encoding="utf-8")) if row.is_file() else text | {"counts": {"once": {}}}
    once = text["counts"]["once"]
    for verdict, count in {
        "wrong": sum(map(bool, found.values())),
        "good": sum(not one for one in found.values()),
    }.items():
        once[verdict] = once.get(verdict, 0) + count
    text |= {"operations": text["operations"] + operations, "said": text["said"] + bad}
    row.write_text(json.dumps(text), encoding="utf-8")
