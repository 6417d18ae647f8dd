"""Ends: the first failure is the one that is told, a write that fails is named, and what another program holds costs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.absorption import saved
from adastate_pack.adastate_core.files import whole_file
from adastate_pack.adastate_core.rollout import Rollout, RolloutState
from adastate_pack.adastate_core.states import kept_states as state_history
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes import absorption_nodes
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host import safely

HERE = Path(__file__).resolve().parent
Interrupted = comfy.model_management.InterruptProcessingException
HELD = PermissionError(13, "used by another process")
LENGTH = 57  # five chunks


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1, "length": LENGTH} | inputs))


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"autosave_seconds": 1e-9, "history_chunks": 1, "history_states": 2} | inputs))


def frames_of(path: Path | str) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def warnings_of(result, than) -> list[str]:
    known = json.loads(than.args[2])["warnings"]
    return [sentence for sentence in json.loads(result.args[2])["warnings"] if sentence not in known]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def refuse(monkeypatch, folder: Path, site: str) -> list[str]:
    """From now on the system refuses this for every file under `folder`, as Windows does; the names that it was asked for."""
    asked = []
    monkeypatch.setattr(whole_file.time, "sleep", lambda seconds: None)

    def refusing(original, chosen=lambda *_: True):
        def call(path, *rest, **more):
            if not isinstance(path, int) and str(path).startswith(str(folder)) and chosen(path, *rest):
                asked.append(os.path.basename(path))
                raise HELD
            return original(path, *rest, **more)

        return call

    if site == "replace":
        monkeypatch.setattr(os, "replace", refusing(os.replace))
    elif site == "link":
        monkeypatch.setattr(os, "link", refusing(os.link))
    elif site == "unlink":
        for name in ("unlink", "remove"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name)))
        monkeypatch.setattr(Path, "unlink", refusing(Path.unlink))
    elif site == "unlink states":
        monkeypatch.setattr(Path, "unlink", refusing(Path.unlink, lambda path, *_: "chunk_" in str(path)))
    elif site == "mkdir":
        monkeypatch.setattr(os, "mkdir", refusing(os.mkdir, lambda path, *_: str(path).endswith(".history")))
    elif site == "open to sync":
        monkeypatch.setattr(whole_file, "open", refusing(open, lambda path, mode="r": mode == "r+b"), raising=False)
    elif site == "open states":
        first = []

        def late(path, mode="r"):
            first.append(1)
            return mode == "x+b" and len(first) > 1

        monkeypatch.setattr(whole_file, "open", refusing(open, late), raising=False)
    elif site == "scandir":
        monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    return asked


# what another program holds: what the report says then
SITES = {
    "replace": [
        "take_00001_.state.safetensors (used by another process)",
        "could not be rewritten with its index in front",
    ],
    "link": [],
    "unlink": ["could not be removed: another program may hold it"],
    "unlink states": ["take_00001_.history/chunk_000001.state.safetensors could not be removed"],
    "mkdir": ["could not be saved into its history (used by another process)"],
    "open to sync": [],
    "open states": ["into its history (used by", "take_00001_.state.safetensors (used by", "could not be rewritten"],
    "scandir": [],
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.sampled(2)
def test_what_another_program_holds_costs_no_frame_and_goes_later(rollout, stream, folders, monkeypatch, site):
    whole = rollout(stream=stream(filename_prefix="whole"))
    out = folders / "output"
    with monkeypatch.context() as patch:
        asked = refuse(patch, out, site)
        result = rollout(stream=stream())
    assert asked
    assert torch.equal(result.args[0]["samples"], whole.args[0]["samples"])
    assert torch.equal(frames_of(result.args[3].get_stream_source()), frames_of(out / "whole_00001_.mp4"))
    said = warnings_of(result, whole)
    assert all(any(words in sentence for sentence in said) for words in SITES[site]), said
    said = [sentence for sentence in said if "report.json" not in sentence]  # it is written where the states are
    assert len(said) == len(SITES[site]) or site == "replace"
    assert not [path for path in out.rglob("*") if path.is_file() and not path.stat().st_size and path.suffix != ".tmp"]
    for path in out.rglob("*.state.safetensors"):
        load_state(path)
    again = rollout(stream=stream())  # which cleans up what was left
    assert torch.equal(again.args[0]["samples"], whole.args[0]["samples"]) and hidden(out) == []
    assert json.loads(again.args[2])["files"] == ["take_00002_.mp4"]


@pytest.mark.parametrize("site", ["replace", "link", "unlink"])
def test_saving_where_files_are_held_leaves_what_was_there(rollout, node, folders, monkeypatch, site):
    state = rollout(length=21).args[1]
    first = node("AdaStateSaveState")(state=state, filename_prefix="a/b").args[0]
    with monkeypatch.context() as patch:
        refuse(patch, folders / "output", site)
        second = node("AdaStateSaveState")(state=state, filename_prefix="a/b").args[0]
    third = node("AdaStateSaveState")(state=state, filename_prefix="a/b").args[0]
    names = [f"a/b_0000{i}_.state.safetensors [output]" for i in (1, 2, 3)]
    assert [first, second, third] == names or site == "link" and (first, third) == (names[0], names[2])
    assert all(node("AdaStateLoadState")(file=name).args[0].emitted == state.emitted for name in names)
    assert hidden(folders / "output") == []


def test_a_name_that_cannot_be_held_or_moved_is_told(rollout, node, folders, monkeypatch):
    state = rollout(length=21).args[1]
    for site in ("link", "replace"):
        refuse(monkeypatch, folders / "output", site)
    with pytest.raises(
        PermissionError, match=r"^b_00001_.state.safetensors could not be written \(used by another process\)"
    ):
        node("AdaStateSaveState")(state=state, filename_prefix="a/b")
    assert list((folders / "output" / "a").iterdir()) == []


SECOND = [Interrupted(), KeyboardInterrupt()]


@pytest.mark.parametrize("second", SECOND, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "first", [torch.OutOfMemoryError("CUDA out of memory"), Interrupted()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("place", [(video_sink, "remux"), (video_sink.VideoSink, "stop"), (Rollout, "snapshot"),
                                   (safely, "soft_empty_cache"), (whole_file.os, "fsync")], ids=lambda p: p[1])  # fmt: skip
@pytest.mark.sampled(2)
def test_no_failure_at_the_end_hides_the_first(rollout, stream, monkeypatch, first, second, place):
    original, calls = adapter.HostModel.velocity, []

    def velocity(self, *given):
        calls.append(1)
        if len(calls) == 5:
            for owner, name in (place,):
                monkeypatch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(second))
            raise first
        return original(self, *given)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    with pytest.raises(BaseException) as told:  # noqa: B017  a KeyboardInterrupt would end pytest
        rollout(stream=stream(autosave_seconds=0.0, history_chunks=0))
    assert told.value is first


def test_an_interrupt_at_the_end_of_a_run_that_went_well_is_one(rollout, stream, folders, monkeypatch):
    monkeypatch.setattr(video_sink, "remux", lambda *given, **how: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        rollout(stream=stream())
    assert len(frames_of(folders / "output" / "take_00001_.mp4")) == LENGTH


@pytest.mark.parametrize("end", [Interrupted(), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_join_that_fails_tells_why_though_its_file_cannot_be_ended(rollout, stream, folders, monkeypatch, end):
    state = rollout(length=21, stream=stream(filename_prefix="one")).args[1]
    other = video_sink.VideoSink(folders / "other.mp4", 64, 64, 24.0)
    other.write(torch.zeros(9, 64, 64, 3, dtype=torch.uint8))
    other.close()
    monkeypatch.setattr("adastate_pack.nodes.stream_parts.VideoPart._joined", lambda self: [(folders / "other.mp4", 9)])
    opened = av.open

    class Full:
        def __init__(self, container):
            self.container = container

        def close(self):
            self.container.close()
            raise av.error.OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __setattr__(self, name, value):
            object.__setattr__(self, name, value)

    monkeypatch.setattr(
        av,
        "open",
        lambda path, mode="r", **more: Full(opened(path, mode, **more)) if mode == "w" else opened(path, mode, **more),
    )
    with pytest.raises(ValueError, match="other.mp4"):
        rollout(length=45, resume=state, stream=stream(filename_prefix="two", join=True))
    assert [path.name for path in (folders / "output").glob("two*")] == ["two_00001_.report.json"]
    assert hidden(folders / "output") == []


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system itself ends every file of this process there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_in_the_middle_names_what_was_written(rollout, stream, node, vae, folders, monkeypatch):
    """On every writer: the stream's video, Render Video, Compare Videos, Save State, Save Absorption."""
    result = rollout(stream=stream(filename_prefix="whole"))
    latent, state, _, video = result.args
    picture = {"fps": 16.0, "codec": "h264", "quality": 0}
    with files_of_at_most(3000):
        for name, call in {
            r"frame \d+ of (the video|take_00001_.mp4)": lambda: rollout(stream=stream(quality=0, history_chunks=0)),
            r"frame \d+ of AdaState_00001_.mp4": lambda: node("AdaStateRenderVideo")(
                latent=latent, vae=vae, filename_prefix="AdaState", **picture
            ),
            r"frame \d+ of AdaState_comparison_00001_.mp4": lambda: node("AdaStateCompare")(
                video_a=video, video_b=video, labels="A, B"
            ),
            "kept_00001_.state.safetensors": lambda: node("AdaStateSaveState")(state=state, filename_prefix="kept"),
        }.items():
            with pytest.raises(OSError, match=rf"^{name} could not be written \(File too large\)"):
                call()
    left = [path.name for path in (folders / "output").iterdir() if not path.name.startswith("whole")]
    assert {name for name in left if not name.endswith(".report.json")} <= {"take_00001_.mp4"}


def test_an_absorption_that_cannot_be_written_is_named(node, folders, monkeypatch):
    monkeypatch.setattr(absorption_nodes, "solution_from", lambda *_: SimpleNamespace(chosen=(0,)))
    monkeypatch.setattr(absorption_nodes, "settings_from", lambda *_: SimpleNamespace(switch="fixed"))
    monkeypatch.setattr(saved, "solution_state", lambda *_: {"x": torch.zeros(4000), "chosen": [0]})
    monkeypatch.setattr(absorption_nodes, "BELONGS", ())
    absorption = {"phase": "switched"}
    spec = {"absorption": {}, "geometry": {"heads": 1, "head_dim": 8, "layers": 1}, "batch": 1}
    monkeypatch.setattr(
        absorption_nodes, "save_solution",
        lambda solution, settings, belongs, path, new: saved.write_tensors(path, {"x": torch.zeros(4000)}, {}, new),
    )  # fmt: skip
    state = RolloutState(spec, 0, 0, 0, (), torch.zeros(1), absorption=absorption)
    with (
        files_of_at_most(3000),
        pytest.raises(OSError, match=r"^a_00001_.absorption.safetensors could not be written \(File"),
    ):
        node("AdaStateSaveAbsorption")(state=state, filename_prefix="a")
    assert list((folders / "output").iterdir()) == []


def test_the_only_state_of_a_history_stays_until_the_next_is_written(tmp_path, monkeypatch):
    def save(state, path, **more):
        if state.next_chunk == 2:
            raise OSError(28, "no room")
        path.write_bytes(b"state")
        return path

    monkeypatch.setattr(state_history, "save_state", save)
    history = state_history.StateHistory(tmp_path / "a.history", 1, 1)
    history.keep(SimpleNamespace(next_chunk=1))
    with pytest.raises(OSError):
        history.keep(SimpleNamespace(next_chunk=2))
    assert list(state_history.kept_states(tmp_path / "a.history")) == history.kept == [1]
    history.keep(SimpleNamespace(next_chunk=4))
    assert list(state_history.kept_states(tmp_path / "a.history")) == history.kept == [4]


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import conftest, torch, folder_paths, comfy.sd
from pathlib import Path
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes.host import model as adapter
for kind in ("output", "temp", "input"):
    getattr(folder_paths, f"set_{kind}_directory")(str(Path(sys.argv[2]) / kind))
def die(*given, owner, name, count, calls=[]):
    calls.append(1)
    if len(calls) == count:
        print("there", flush=True); time.sleep(600)
    return original(*given)
owner, name, count = {"a step of chunk 1": (adapter.HostModel, "velocity", 1), "the first frame": (video_sink.VideoSink, "_mux", 1),
    "a later frame": (video_sink.VideoSink, "_mux", 5), "chunk 2": (adapter.HostModel, "velocity", 4)}[sys.argv[3]]
original = getattr(owner, name)
setattr(owner, name, lambda *given: die(*given, owner=owner, name=name, count=count))
model = comfy.sd.load_diffusion_model_state_dict(conftest.random_wan())
vae = comfy.sd.VAE(sd=conftest.random_vae())
settings = {"fps": 16.0, "codec": "h264", "quality": 18, "preview": False}
stream = conftest.HostNode("AdaStateStreamOutput")(vae=vae, filename_prefix="take", **settings).args[0]
positive = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1)), {}]]
conftest.HostNode("AdaStateRollout")(model=model, positive=positive, width=32, height=32, length=33, batch_size=2, seed=5, steps=2,
    shift=5.0, chunk_frames=3, window_frames=3, positions="packed", stream=stream)
"""


@pytest.mark.parametrize("when", ["a step of chunk 1", "the first frame", "a later frame", "chunk 2"])
@pytest.mark.sampled(2)
def test_a_kill_leaves_a_video_with_frames_or_none(rollout, stream, folders, when):
    command = [sys.executable, "-c", KILLED, str(HERE), str(folders), when]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    while "there" not in (line := process.stdout.readline()):
        assert line, "it ended by itself"
    out = folders / "output"
    process.kill()
    process.wait()
    videos = sorted(path.name for path in out.glob("*.mp4"))
    assert videos == (["take_00001_b0.mp4", "take_00001_b1.mp4"] if when == "chunk 2" else [])
    assert all(len(frames_of(out / name)) >= 8 for name in videos)
    assert len(hidden(out)) == (0 if when == "chunk 2" else 2)
    rollout(batch_size=2, length=21, stream=stream(history_chunks=0))
    number = 2 if when == "chunk 2" else 1
    assert hidden(out) == [] and len(frames_of(out / f"take_0000{number}_b1.mp4")) == 21


def test_two_servers_that_begin_at_once_take_two_numbers(rollout, stream, folders, monkeypatch):
    """The second begins and ends while the first is in its first chunk."""
    original, calls, out = adapter.HostModel.velocity, [], folders / "output"

    def velocity(self, *given):
        calls.append(1)
        if len(calls) == 2:
            rollout(seed=9, batch_size=2, length=21, stream=stream(history_chunks=0))
            shutil.copy(out / "take_00001_b1.mp4", out / "take_00002_b1.mp4")  # the host's own saver takes one as well
        return original(self, *given)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    result = rollout(batch_size=2, stream=stream(history_chunks=1))
    assert json.loads(result.args[2])["files"] == ["take_00003_b0.mp4", "take_00003_b1.mp4"]
    assert [len(frames_of(out / f"take_0000{n}_b1.mp4")) for n in (1, 2, 3)] == [21, 21, LENGTH]
    assert (out / "take_00003_b0.history").is_dir() and not (out / "take_00002_b0.mp4").exists()
    assert load_state(out / "take_00003_b0.state.safetensors").stream["files"] == json.loads(result.args[2])["files"]
    assert hidden(out) == []


def test_a_file_system_without_links_writes_as_before(rollout, stream, folders, monkeypatch):
    whole = rollout(stream=stream(filename_prefix="whole"))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    result = rollout(batch_size=1, stream=stream())
    assert torch.equal(frames_of(result.args[3].get_stream_source()), frames_of(whole.args[3].get_stream_source()))
    assert hidden(folders / "output") == []


@pytest.mark.parametrize("kind", [".state.safetensors", ".history", ".report.json"])
def test_a_new_video_gets_nothing_of_one_that_is_gone(rollout, stream, folders, kind):
    """What is left of a deleted video keeps its number, for prefixes too where the host begins at 1."""
    left = folders / "output" / f"take_00001_{kind}"
    if kind == ".history":
        left.mkdir()
    else:
        left.write_bytes(b"another's")
    result = rollout(length=21, stream=stream(filename_prefix="take/"))
    assert json.loads(result.args[2])["files"] == ["take_00002_.mp4"]
