"""What the loaders list: links followed once each, few looks at the disk, and never an old answer about a file of our own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from adastate_pack.nodes.host import listing
from adastate_pack.nodes.host.output_files import ABSORPTION_SUFFIX, STATE_SUFFIX, check_saved, saved_files, saved_path

LOOKS: list[str] = []


def _look(event: str, given: tuple) -> None:
    """Told by Python itself of every folder that is read, by whatever function. It may not raise: nobody can take it away."""
    if event in ("os.scandir", "os.listdir") and given and isinstance(given[0], str | os.PathLike):
        LOOKS.append(os.fspath(given[0]))


sys.addaudithook(_look)


def looks(root: Path) -> int:
    """How often the folder itself was read since the last call."""
    count = LOOKS.count(str(root))
    LOOKS.clear()
    return count


def touch(path: Path, when: float = 1e9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (when, when))
    return path


@pytest.fixture
def saved(rollout, folders):
    """A state in a folder that is linked into the output folder."""
    (folders / "elsewhere" / "deep").mkdir(parents=True, exist_ok=True)
    (folders / "output" / "linked").symlink_to(folders / "elsewhere")
    return rollout(length=9, steps=1).args[1]


def options(node) -> list[str]:
    return node("AdaStateLoadState").node.define_schema().inputs[0].options


def test_states_under_a_linked_folder_are_listed_and_load(node, folders, saved):
    node("AdaStateSaveState")(state=saved, filename_prefix="take")
    (folders / "elsewhere" / "deep").mkdir(parents=True, exist_ok=True)
    shutil.move(folders / "output" / "take_00001_.state.safetensors", folders / "elsewhere" / "deep")
    listing._listings.clear()
    name = "linked/deep/take_00001_.state.safetensors [output]"
    assert options(node) == [name]
    assert node("AdaStateLoadState").validate(file=name, chunk=-1) is True
    assert node("AdaStateLoadState")(file=name).args[0].emitted == saved.emitted
    shutil.move(folders / "elsewhere", folders / "input" / "here")
    listing._listings.clear()
    assert options(node) == ["here/deep/take_00001_.state.safetensors"]
    assert node("AdaStateLoadState")(file=options(node)[0]).args[0].emitted == saved.emitted


def test_loops_end_and_each_folder_is_listed_once_under_its_own_name(folders):
    out = folders / "output"
    touch(out / "b" / "one.state.safetensors", 3)
    touch(folders / "far" / "two.state.safetensors", 2)
    (out / "a").symlink_to(out / "b")  # comes first in any order, and is not its name
    (out / "b" / "up").symlink_to(out)
    (out / "b" / "self").symlink_to("self")
    (folders / "far" / "back").symlink_to(out)
    (folders / "far" / "round").symlink_to(folders / "far")
    for name in ("far", "far again"):
        (out / name).symlink_to(folders / "far")
    (folders / "input" / "out").symlink_to(out)
    listed = saved_files(STATE_SUFFIX)
    assert listed[:1] == ["out/b/one.state.safetensors"] and "b/one.state.safetensors [output]" in listed
    assert sorted(name.partition("/")[0] for name in listed if "two" in name and "[output]" in name) in (
        ["far"],
        ["far again"],
    )
    assert len(listed) == 4 and all(saved_path(name, "state").is_file() for name in listed)


def test_what_cannot_be_read_is_passed_over(folders, monkeypatch):
    out, scandir = folders / "output", os.scandir
    touch(out / "closed" / "hidden.state.safetensors")
    touch(out / "open" / "here.state.safetensors")
    (out / "gone").symlink_to(folders / "nowhere")
    (out / "gone.state.safetensors").symlink_to(folders / "nowhere")
    (out / "folder.state.safetensors").mkdir()
    os.mkfifo(out / "pipe.state.safetensors")

    def refuse(path="."):
        if not isinstance(path, int) and os.path.basename(path) == "closed":
            raise PermissionError(13, "not yours")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert saved_files(STATE_SUFFIX) == ["open/here.state.safetensors [output]"]
    (folders / "input").rmdir()
    listing._listings.clear()
    assert saved_files(STATE_SUFFIX) == ["open/here.state.safetensors [output]"]


@pytest.mark.parametrize("name", ["../secret", "linked/../../secret", "/etc/secret", "a\0b", ""], ids=ascii)
def test_what_lies_outside_is_refused_whatever_links_there_are(folders, name):
    (folders / "elsewhere").mkdir()
    (folders / "output" / "linked").symlink_to(folders / "elsewhere")
    touch(folders / "secret.state.safetensors")
    for mark in (" [output]", ""):
        said = check_saved(f"{name}{STATE_SUFFIX if name else ''}{mark}", "state")
        assert "does not name a file inside the host's folder" in said


def test_a_validation_looks_at_the_disk_once_and_sees_its_own_files_at_once(node, folders, saved):
    """Both loaders are described and asked, as the host does it for every prompt."""
    kinds = ("AdaStateLoadState", "AdaStateLoadAbsorption")
    first = node("AdaStateSaveState")(state=saved, filename_prefix="take").args[0]
    LOOKS.clear()
    for _ in range(5):
        for kind in kinds:
            node(kind).node.define_schema()
            node(kind).node.INPUT_TYPES()
        assert node(kinds[0]).validate(file=first, chunk=-1) is True
    assert looks(folders / "output") == 1 and options(node) == [first]
    second = node("AdaStateSaveState")(state=saved, filename_prefix="take").args[0]
    LOOKS.clear()
    assert set(options(node)) == {first, second} and looks(folders / "output") == 1


def test_what_a_stream_saves_shows_at_once(node, vae, rollout, folders):
    assert options(node) == [""]
    settings = {"fps": 16.0, "codec": "h264", "quality": 18, "preview": False, "history_chunks": 1}
    stream = node("AdaStateStreamOutput")(vae=vae, filename_prefix="v/take", **settings).args[0]
    rollout(length=21, steps=1, stream=stream)
    assert sorted(options(node)) == [
        "v/take_00001_.history/chunk_000001.state.safetensors [output]",
        "v/take_00001_.history/chunk_000002.state.safetensors [output]",
        "v/take_00001_.state.safetensors [output]",
    ]


def test_a_file_that_was_copied_in_loads_at_once_and_shows_after_some_seconds(node, folders, saved, monkeypatch):
    name = node("AdaStateSaveState")(state=saved, filename_prefix="take").args[0]
    now = [100.0]
    monkeypatch.setattr(listing.time, "monotonic", lambda: now[0])
    assert options(node) == [name]
    shutil.copy(folders / "output" / name.removesuffix(" [output]"), folders / "input" / "copied.state.safetensors")
    assert options(node) == [name] and node("AdaStateLoadState").validate(file="copied.state.safetensors") is True
    assert node("AdaStateLoadState")(file="copied.state.safetensors").args[0].emitted == saved.emitted
    now[0] += 10
    assert set(options(node)) == {name, "copied.state.safetensors"}


def test_every_name_that_is_listed_loads(folders):
    """Names with a space in front, of more than 200 letters, with a mark in the middle, of another suffix's look."""
    out, deep = folders / "output", "/".join(["folder"] * 40)
    for name in (" first/ a", f"{deep}/b", "c [input]", "d [output]", "e\n", "f.absorption.safetensors"):
        touch(out / f"{name}{STATE_SUFFIX}")
        touch(folders / "input" / f"{name}{STATE_SUFFIX}")
    listed = saved_files(STATE_SUFFIX)
    assert len(listed) == 12 and saved_files(ABSORPTION_SUFFIX) == []
    assert all(saved_path(name, "state").is_file() for name in listed)
