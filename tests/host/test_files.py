"""Files in the host's folders: numbers that two servers do not share, and what is on the disk when a state is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from adastate_pack.adastate_core.files import tensor_file, whole_file
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes import state_nodes
from adastate_pack.nodes.host import output_files as files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_number_that_another_server_takes_meanwhile_is_left_to_it(folders, monkeypatch):
    """Between the look at the folder and the creation of the second of three files."""
    original, calls = files.reserve, []

    def reserve(path):
        calls.append(Path(path))
        if len(calls) == 2:
            Path(path).write_bytes(b"another server's")
        original(path)

    monkeypatch.setattr(files, "reserve", reserve)
    targets = files.new_files("video/take", ["b0.mp4", "b1.mp4", "b2.mp4"])
    assert [target.path.name for target in targets] == [f"take_00002_b{i}.mp4" for i in range(3)]
    assert names(folders / "output") == ["take_00001_b1.mp4", *(target.path.name for target in targets)]
    assert calls[1].read_bytes() == b"another server's"


def test_why_files_could_not_be_made_is_told_though_the_others_cannot_be_removed(folders, monkeypatch):
    original, calls = files.reserve, []

    def reserve(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(path)

    def held(*_, **__):
        raise PermissionError(13, "used by another process")

    monkeypatch.setattr(files, "reserve", reserve)
    monkeypatch.setattr(Path, "unlink", held)
    with pytest.raises(OSError, match=r"^take_00001_b1.mp4 could not be written \(No space left on device\)"):
        files.new_files("video/take", ["b0.mp4", "b1.mp4"])


def test_a_saved_state_takes_the_next_number_if_another_server_was_faster(rollout, node, folders, monkeypatch):
    original, calls = state_nodes.save_state, []

    def save_state(state, path, **more):
        calls.append(Path(path))
        if len(calls) == 1:
            Path(path).write_bytes(b"another server's")
        return original(state, path, **more)

    monkeypatch.setattr(state_nodes, "save_state", save_state)
    state = rollout(length=21).args[1]
    name = node("AdaStateSaveState")(state=state, filename_prefix="a/b").args[0]
    assert name == "a/b_00002_.state.safetensors [output]" and calls[0].read_bytes() == b"another server's"
    assert load_state(folders / "output" / "a" / "b_00002_.state.safetensors").emitted == state.emitted
    assert names(folders / "output") == ["b_00001_.state.safetensors", "b_00002_.state.safetensors"]


def test_a_save_that_fails_leaves_nothing(rollout, node, folders, monkeypatch):
    state = rollout(length=21).args[1]

    def fail(file, tensor):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensor_file, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        node("AdaStateSaveState")(state=state, filename_prefix="a/b")
    assert names(folders / "output") == []


def test_a_growing_video_is_on_the_disk_before_a_state_that_counts_its_frames(rollout, vae, node, folders, monkeypatch):
    """At the first byte of every state, each video file of the run is synced as far as it is written."""
    synced, checked, fsync, write = {}, [], os.fsync, tensor_file._write

    def sync(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def first_write(file, tensor):
        if file.name not in checked:
            checked.append(file.name)
            for path in (folders / "output" / "video").glob("take_00001_b*.mp4"):
                assert synced.get(path.stat().st_ino) == path.stat().st_size > 0
        return write(file, tensor)

    monkeypatch.setattr(whole_file.os, "fsync", sync)
    monkeypatch.setattr(tensor_file, "_write", first_write)
    settings = {"filename_prefix": "video/take", "fps": 16.0, "codec": "h264", "quality": 18, "preview": False}
    stream = node("AdaStateStreamOutput")(vae=vae, **settings, autosave_seconds=1e-6, history_chunks=2).args[0]
    rollout(length=69, steps=1, batch_size=2, stream=stream)
    folder = folders / "output" / "video"
    assert len(checked) >= 3 and (folder / "take_00001_b0.state.safetensors").is_file()
    assert len(list((folder / "take_00001_b0.history").iterdir())) >= 2
    assert not [name for name in names(folder) if "tmp" in name]
