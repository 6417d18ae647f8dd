"""Prefixes: what cannot be made or served is refused when it is queued, and what can be made is not. The kernel is the judge."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import folder_paths
import pytest
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host import names
from adastate_pack.nodes.host import output_files as files

VIDEO = {"fps": 16.0, "codec": "h264", "quality": 18}
# node, its other inputs, the longest ending of the names that it makes
WRITERS = [
    ("AdaStateStreamOutput", VIDEO, "_00001_.state.safetensors"),
    ("AdaStateRenderVideo", VIDEO, "_00001_.mp4"),
    ("AdaStateSaveState", {}, "_00001_.state.safetensors"),
    ("AdaStateSaveAbsorption", {}, "_00001_.absorption.safetensors"),
]
LETTERS = ["a", "\u00e4", "\u6c17", "\U0001f388"]


def can_be_made(path: Path) -> bool:
    """Whether the system makes a file of this name."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        assert error.errno == errno.ENAMETOOLONG
        return False
    os.unlink(path)
    return True


@pytest.mark.parametrize("letter", LETTERS, ids=["1 byte", "2 bytes", "3 bytes", "4 bytes"])
@pytest.mark.parametrize(
    ("node_id", "more", "ending"), WRITERS, ids=[row[0].removeprefix("AdaState") for row in WRITERS]
)
def test_a_prefix_is_taken_if_the_longest_name_of_it_can_be_made(node, folders, node_id, more, ending, letter):
    said, least = [], 200 // len(letter.encode())
    for count in range(least, 256 // len(letter.encode()) + 1):
        prefix = letter * count
        answer = node(node_id).validate(filename_prefix=prefix, **more)
        assert (answer is True) == can_be_made(folders / (prefix + ending)), count
        said.append(answer)
    assert said[0] is True and "a name may have 255; shorten it by" in said[-1] and len(said[-1]) < 400


@pytest.mark.parametrize("part", ["\u6c17" * 86 + "/take", "a/" + "b" * 256 + "/take"])
def test_every_folder_of_a_prefix_counts(node, part):
    assert "a name may have 255" in node("AdaStateStreamOutput").validate(filename_prefix=part, **VIDEO)
    assert (
        node("AdaStateStreamOutput").validate(filename_prefix="/".join(["\u6c17" * 80] * 4) + "/take", **VIDEO) is True
    )


def test_a_file_system_with_shorter_names_counts(node, monkeypatch):
    """As eCryptfs has: 143 bytes."""
    monkeypatch.setattr(os, "pathconf", lambda path, name: 143)
    assert node("AdaStateSaveState").validate(filename_prefix="a" * 118) is True
    assert "a name may have 143; shorten it by 1 bytes" in node("AdaStateSaveState").validate(filename_prefix="a" * 119)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("two\nlines", r"'two\nlines' holds '\n', a control character"),
        ("video/a\tb", "a control character"),
        ("a\x7f", r"holds '\x7f'"),
        ("a\x85b", r"holds '\x85'"),
        ("\x00", "does not name a file inside"),
        ("half \ud83c of it", "half a UTF-16 pair as its character 6"),
        ("\udc80/take", "half a UTF-16 pair as its character 1"),
        ("..", "does not name a file inside"),
        ("a/../..", "does not name a file inside"),
        ("/", "does not name a file inside"),
        ("taken/take", "needs a folder 'taken', and that is a file"),
        ("dangling/take", "needs a folder 'dangling', and that is a file"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", ["queued", "linked"])
def test_what_cannot_be_made_or_served_is_refused_in_a_sentence(node, folders, vae, prefix, words, kind):
    for each in ("output", "temp"):
        (folders / each / "taken").touch()
        (folders / each / "dangling").symlink_to(folders / "nowhere")
    for node_id, more, _ in WRITERS:
        if kind == "queued":
            said = node(node_id).validate(filename_prefix=prefix, **more)
        else:
            sockets = {
                "AdaStateStreamOutput": {"vae": vae, "preview": False},
                "AdaStateRenderVideo": {"latent": {}, "vae": vae},
            }
            with pytest.raises(ValueError) as error:
                node(node_id)(filename_prefix=prefix, **more, **sockets.get(node_id, {"state": None}))
            said = str(error.value)
        assert words in said and "\n" not in said
        said.encode()


@pytest.mark.parametrize(
    "prefix",
    ["a/../b", "./c", " d ", "e.", "CON", 'f:"g"?', "h|*<>", "-i", ".j", "k%l", "m\\n", "o//p", "q/", "\u202er", "\U0001f388",
     "%year%/t", "u" * 228, "v/" * 60 + "w"],
    ids=ascii,
)  # fmt: skip
def test_what_works_on_this_system_is_not_refused(node, rollout, folders, prefix, monkeypatch):
    (folders / "elsewhere").mkdir()
    (folders / "output" / "linked").symlink_to(folders / "elsewhere")
    assert node("AdaStateSaveState").validate(filename_prefix=prefix) is True
    name = node("AdaStateSaveState")(state=rollout(length=9, steps=1).args[1], filename_prefix=prefix).args[0]
    assert node("AdaStateLoadState")(file=name).args[0].next_chunk == 1
    assert name in files.saved_files(files.STATE_SUFFIX)


def test_a_name_behind_a_link_is_made_where_the_host_makes_one_and_else_refused(node, rollout, folders):
    """Newer hosts write nothing behind a link that leads out of their folder; it is said before anything is made."""
    (folders / "elsewhere").mkdir()
    (folders / "output" / "linked").symlink_to(folders / "elsewhere")
    try:
        folder_paths.get_save_image_path("linked/s", str(folders / "output"))
    except Exception:
        for kind in ("AdaStateSaveState", "AdaStateStreamOutput"):
            said = node(kind).validate(filename_prefix="linked/s")
            assert "leads out of the host's folder through a link" in said and "\n" not in said
        with pytest.raises(ValueError, match="leads out of the host's folder"):
            node("AdaStateSaveState")(state=rollout(length=9, steps=1).args[1], filename_prefix="linked/s")
        assert list((folders / "elsewhere").iterdir()) == []
        return
    assert node("AdaStateSaveState").validate(filename_prefix="linked/s") is True
    name = node("AdaStateSaveState")(state=rollout(length=9, steps=1).args[1], filename_prefix="linked/s").args[0]
    assert node("AdaStateLoadState")(file=name).args[0].next_chunk == 1


@pytest.mark.parametrize(
    "prefix", ["CON", "a/nul", "com1.take", "e.", "e ", "a:b", 'f"g', "h?", "i*", "<j>", "k|l", "a/b. /c"]
)
def test_names_that_windows_refuses_are_refused_there(node, monkeypatch, prefix):
    assert node("AdaStateSaveState").validate(filename_prefix=prefix) is True
    monkeypatch.setattr(names, "_WINDOWS", True)
    assert "which Windows takes for no name" in node("AdaStateSaveState").validate(filename_prefix=prefix)
    assert node("AdaStateSaveState").validate(filename_prefix="a/./con_tact/comet/lpt10/.take") is True


@pytest.mark.parametrize(
    ("prefix", "batch", "refused"),
    [
        ("a" * 230, 1, False),
        ("a" * 230, 2, True),  # the item's b1 in each name
        ("a" * 228 + "%width%", 1, False),
        ("a" * 228 + "%width%%height%", 1, True),  # 0 and 0 when it is queued, 32 and 32 then
        ("a" * 200 + "%width%%height%" * 3, 1, False),  # 245 letters before they are filled in
    ],
)
def test_what_is_only_known_with_the_run_is_refused_before_anything_is_loaded(
    node, vae, rollout, folders, monkeypatch, prefix, batch, refused
):
    loaded, original = [], adapter.HostModel.load
    monkeypatch.setattr(adapter.HostModel, "load", lambda *all, **more: (loaded.append(1), original(*all, **more))[1])
    assert node("AdaStateStreamOutput").validate(filename_prefix=prefix, **VIDEO) is True
    stream = node("AdaStateStreamOutput")(
        vae=vae, filename_prefix=prefix, **VIDEO, preview=False, autosave_seconds=1e-6, history_chunks=1
    ).args[0]
    inputs = {"length": 33, "steps": 1, "batch_size": batch, "stream": stream}
    if refused:
        with pytest.raises(ValueError, match="^filename_prefix .* a name may have 255"):
            rollout(**inputs)
        assert not loaded and list((folders / "output").iterdir()) == []
        return
    rollout(**inputs)
    made = sorted(path.name[-20:] for path in (folders / "output").iterdir())
    assert (
        len(made) == 4
        and any("report" in name for name in made)
        and any("history" in name for name in made)
        and any("state" in name for name in made)
    )
