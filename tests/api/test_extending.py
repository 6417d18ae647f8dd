"""The pack of docs/extending.md and its preset on a real server: planned, rolled out, saved, and named where they are missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Client, error_of, report_of, workflow

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
HOLDS = {"policy.py": "class AnchorBookmarks", "__init__.py": "def adastate_register", "node.py": "class BookmarksNode"}


def block(words: str) -> str:
    (found,) = [one for one in re.findall(r"```\w+\n(.*?)```", PAGE, re.S) if words in one]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A server's folder with the page's pack and the page's preset."""
    folder = tmp_path_factory.mktemp("extended")
    pack = folder / "base" / "custom_nodes" / "bookmarks"
    pack.mkdir(parents=True)
    for name, words in HOLDS.items():
        (pack / name).write_text(block(words))
    presets = folder / "base" / "user" / "adastate" / "presets"
    presets.mkdir(parents=True)
    (presets / "my_system.toml").write_text(block("my.?system"))
    (presets / "broken.toml").write_text("chunk_frames = 0")
    return folder


def bookmarked(length: int = 61) -> dict:
    prompt = workflow("long_video", n5__length=length, n4__filename_prefix="bookmarks")
    prompt["90"] = {"class_type": "BookmarksAnchor", "inputs": {"slots": 2, "every": 3}}
    prompt["5"]["inputs"] |= {"anchor": ["90", 0], "positions": "packed"}
    prompt["91"] = {
        "class_type": "AdaStatePlan",
        "inputs": {
            "model": prompt["5"]["inputs"]["model"],
            "width": 64,
            "height": 64,
            "length": 61,
            "anchor": ["90", 0],
        },
    }
    prompt["92"] = {"class_type": "PreviewAny", "inputs": {"source": ["91", 1]}}
    prompt["93"] = {"class_type": "AdaStateSaveState", "inputs": {"state": ["5", 1], "filename_prefix": "bookmarks"}}
    return prompt


def test_another_packs_policy_from_plan_to_state(folder):
    client = Client(folder)
    try:
        outputs = client.run(bookmarked())
        report, plan = report_of(outputs), json.loads(outputs["92"]["text"][0])
        asked = {"kind": "bookmarks", "slots": 2, "every": 3}
        assert report["settings"]["anchor"] == plan["anchor"] == asked
        assert report["kv_bytes_planned"] == report["kv_bytes_used"]
        state = next(iter(Path(client.output).glob("bookmarks*.state.safetensors"))).name
        resumed = bookmarked(73)
        resumed["94"] = {"class_type": "AdaStateLoadState", "inputs": {"file": f"{state} [output]"}}
        resumed["5"]["inputs"]["resume"] = ["94", 0]
        assert report_of(client.run(resumed))["frames_total"] == 73

        known = client.server.request("/object_info/AdaStateModelPreset")["AdaStateModelPreset"]["input"]["required"]
        assert "my_system" in known["preset"][1].get("options", known["preset"][0]) and "broken" not in str(known)
        assert "broken.toml" in client.server.log.read_text()
    finally:
        client.stop()

    shutil.rmtree(folder / "base" / "custom_nodes" / "bookmarks")
    client = Client(folder)
    try:
        prompt = {
            "1": {"class_type": "AdaStateLoadState", "inputs": {"file": f"{state} [output]"}},
            "2": {"class_type": "AdaStateSaveState", "inputs": {"state": ["1", 0], "filename_prefix": "again"}},
        }
        answer = client.server.request("/prompt", {"prompt": prompt})
        text = (
            json.dumps(answer) if "error" in answer else error_of(client.wait(answer["prompt_id"]))["exception_message"]
        )
        assert "bookmarks" in text and "install the pack that it comes from" in text
    finally:
        client.stop()
