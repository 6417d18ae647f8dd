"""The shipped workflows through a running server, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT, WORKFLOWS, error_of, frames_of, report_of, workflow

from tools.workflow_titles import TITLES


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def test_every_api_prompt_has_its_workflow_under_a_title_and_there_are_no_others():
    names = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert names == set(TITLES) and len(set(TITLES.values())) == len(TITLES) >= 3
    files = {path.name for path in (ROOT / "workflows").iterdir() if path.is_file()}
    assert files == {f"{title}.{ending}" for title in TITLES.values() for ending in ("json", "jpg")}
    assert all(re.fullmatch(r"[\w -]+", title, re.A) for title in TITLES.values())
    by_name = sorted(TITLES, key=TITLES.get)
    systems = [name for name in by_name if name.startswith("system_")]
    assert by_name[0] == "start_from_picture" and by_name[-len(systems) :] == systems


@pytest.mark.quick
def test_the_pack_is_loaded_and_described(client):
    info = client.server.request("/object_info/AdaStateRollout")["AdaStateRollout"]
    assert info["output_node"] and info["output"] == ["LATENT", "ADASTATE_STATE", "STRING", "VIDEO"]
    failed = [line for line in client.server.log.read_text().splitlines() if "IMPORT FAILED" in line]
    assert not [line for line in failed if "AdaState" in line]


@pytest.mark.quick
def test_long_video(client):
    outputs = client.run(workflow("long_video", n5__length=97))
    report, shown = report_of(outputs), outputs["5"]["images"][0]
    assert report["frames"] == 97 and report["chunks"] == 9 and report["warnings"] == []
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] > 0
    path = client.output / shown["subfolder"] / shown["filename"]
    assert len(frames_of(path)) == 97
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"])["5"]["class_type"] == "AdaStateRollout"
    assert not list(path.parent.glob("*.tmp*"))


def test_hidden_state(client):
    outputs = client.run(workflow("hidden_state", n5__length=33))
    video, picture = outputs["7"]["images"][0], outputs["9"]["images"][0]
    assert len(frames_of(client.output / video["subfolder"] / video["filename"])) == 33
    assert picture["type"] == "temp"
    assert report_of(outputs)["settings"]["anchor"]["kind"] == "adaptive"
    assert outputs["11"]["images"][0]["type"] == "temp", "the plot of the attention's shares"


def test_absorption(client):
    graph = workflow("absorption", n6__length=161)
    saving = {"state": ["6", 1], "filename_prefix": "adastate/absorption"}
    graph["9"] = {"class_type": "AdaStateSaveAbsorption", "inputs": saving}
    outputs = client.run(graph)
    report = json.loads(outputs["6"]["adastate_report"][0])
    found = report["absorption"]
    assert found["phase"] == "switched" and len(found["layers"]) == 3
    assert found["kv_bytes_after"] < 0.75 * found["kv_bytes_before"] == 0.75 * report["kv_bytes_without_absorption"]
    assert found["kv_bytes_peak"] == report["kv_bytes_used"] == report["kv_bytes_planned"]
    (told,) = report["warnings"]
    assert found["monitor"] and "the adaptive state carries what has to last" in told
    assert outputs["8"]["images"][0]["type"] == "temp"
    saved = outputs["9"]["text"][0].splitlines()[0]
    again = workflow("absorption", n6__length=161)
    again["4"] = {"class_type": "AdaStateLoadAbsorption", "inputs": {"file": saved}}
    report = json.loads(client.run(again)["6"]["adastate_report"][0])
    assert report["absorption"]["layers"] == found["layers"] and report["warnings"] == [told]


def test_anchor_comparison(client):
    lengths = {f"n{node}__length": 33 for node in (9, 11, 13, 15)}
    outputs = client.run(workflow("anchor_comparison", **lengths))
    video = outputs["17"]["images"][0]
    frames = frames_of(client.output / video["subfolder"] / video["filename"])
    assert len(frames) == 33 and frames[0].shape[1] > 4 * 64
    anchors = [
        json.loads(outputs[str(node)]["adastate_report"][0])["settings"]["anchor"]["kind"] for node in (9, 11, 13, 15)
    ]
    assert anchors == ["adaptive", "static", "ema", "none"]


def test_compare_systems(client):
    """One prompt by the rules of four presets; of their lengths, Self-Forcing's is the one that is warned of."""
    prompt = workflow("compare_systems")
    assert [prompt[str(node)]["inputs"]["length"] for node in (9, 11, 13, 15)] == 4 * [481]
    outputs = client.run(workflow("compare_systems", **{f"n{node}__length": 97 for node in (9, 11, 13, 15)}))
    video = outputs["17"]["images"][0]
    frames = frames_of(client.output / video["subfolder"] / video["filename"])
    assert len(frames) == 97 and frames[0].shape[1] > 4 * 64
    reports = [report_of(outputs, str(node)) for node in (9, 11, 13, 15)]
    assert [r["settings"]["preset"] for r in reports] == ["self_forcing", "longlive", "reward_forcing", "adastate"]
    assert [r["settings"]["anchor"]["kind"] for r in reports] == ["none", "static", "ema", "adaptive"]
    assert [len(r["warnings"]) for r in reports] == [1, 0, 0, 0] and "was made for 21 latent frames" in reports[0][
        "warnings"
    ][0]


def test_save_and_resume_is_the_uninterrupted_video(client):
    client.run(workflow("save_and_resume", n5__length=33, n8__length=69))
    folder = client.output / "video"
    joined = frames_of(newest(folder, "AdaState_whole_*.mp4"))
    part = frames_of(newest(folder, "AdaState_part_*.mp4"))
    words = workflow("save_and_resume")["3"]["inputs"]
    straight = workflow("long_video", n5__length=69)
    straight["3"]["inputs"] = words
    straight["4"]["inputs"]["filename_prefix"] = "video/straight"
    client.run(straight)
    whole = frames_of(newest(folder, "straight_*.mp4"))
    assert (len(part), len(joined), len(whole)) == (33, 69, 69)
    assert all(np.array_equal(a, b) for a, b in zip(part, whole[:33], strict=True))
    difference = np.abs(np.stack(joined).astype(int) - np.stack(whole).astype(int))
    assert difference.mean() < 2
    assert (client.output / "adastate").glob("state_*.state.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n5__width": 100}, "width is 100; it must be a multiple of 16"),
        ({"n5__length": -2}, "length is -2"),
        ({"n5__positions": "sideways"}, "positions is 'sideways'"),
        ({"n5__window_frames": -5}, "window_frames is -5"),
        ({"n4__filename_prefix": "../../escape"}, "does not name a file inside"),
        ({"n4__filename_prefix": "\u6c17" * 78}, "makes a name of 259 bytes"),
        ({"n4__filename_prefix": "two\nlines"}, "a control character"),
        ({"n4__filename_prefix": "half \ud83c"}, "half a UTF-16 pair"),
        ({"n4__codec": "gif"}, "codec is 'gif'"),
        ({"n4__fps": 0.5}, "fps is 0.5"),
        ({"n3__terrain": "moon"}, "terrain is 'moon'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_inputs_are_refused_at_the_door(client, changes, words):
    answer = client.refused(workflow("long_video", **changes))
    details = json.dumps(answer["node_errors"])
    assert "custom_validation_failed" in details and words in details


def test_wrong_links_and_missing_inputs_are_refused(client):
    prompt = workflow("long_video", n5__anchor=["2", 0])
    assert "return_type_mismatch" in json.dumps(client.refused(prompt))
    prompt = workflow("long_video")
    del prompt["5"]["inputs"]["seed"]
    assert "required_input_missing" in json.dumps(client.refused(prompt))
    prompt = workflow("long_video")
    del prompt["5"]["inputs"]["keep_latents"], prompt["4"]["inputs"]["join"], prompt["4"]["inputs"]["autosave_seconds"]
    prompt["5"]["inputs"]["length"] = 9
    client.run(prompt)


@pytest.mark.parametrize("name", ["missing.state.safetensors", "../../etc/passwd", "/etc/passwd"])
def test_states_outside_the_folders_are_refused(client, name):
    prompt = workflow("long_video", n5__length=33, n5__resume=["6", 0])
    prompt["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": name}}
    assert "custom_validation_failed" in json.dumps(client.refused(prompt))


def test_errors_while_running_are_one_sentence(client):
    prompt = workflow("hidden_state", n5__length=33, n5__positions="absolute")
    entry = client.wait(client.queue(prompt))
    error = error_of(entry)
    assert entry["status"]["status_str"] == "error"
    assert "positions is 'absolute' with the adaptive anchor" in error["exception_message"]
    assert error["node_type"] == "AdaStateRollout"


def wait_for_frames(client, pattern: str, frames: int, known: set[Path]) -> Path:
    """The growing file once it holds that many frames; it is read while it is written."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in set(client.output.rglob(pattern)) - known:
            try:
                if path.stat().st_size and len(frames_of(path)) >= frames:
                    return path
            except av.error.FFmpegError:
                pass
        time.sleep(0.2)
    raise AssertionError("no frames")


def test_interrupt_then_run_again(client):
    known = set(client.output.rglob("*.mp4"))
    prompt_id = client.queue(workflow("long_video", n5__length=4001))
    path = wait_for_frames(client, "AdaState_*.mp4", 21, known)
    client.interrupt()
    entry = client.wait(prompt_id)
    assert error_of(entry)["event"] == "execution_interrupted"
    written = len(frames_of(path))
    assert written >= 21 and (written - 9) % 12 == 0
    state = path.with_suffix(".state.safetensors")
    assert state.is_file()
    outputs = client.run(workflow("long_video", n5__length=21))
    assert report_of(outputs)["frames"] == 21
    resumed = workflow("long_video", n5__length=written + 24, n5__resume=["6", 0], n4__join=True)
    name = f"video/{state.name} [output]"
    resumed["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": name}}
    outputs = client.run(resumed)
    joined = client.output / "video" / outputs["5"]["images"][0]["filename"]
    assert len(frames_of(joined)) == written + 24


def test_kill_9_leaves_a_file_that_plays_and_a_state_that_goes_on(client):
    known = set(client.output.rglob("*.mp4"))
    prompt = workflow("long_video", n5__length=4001, n4__autosave_seconds=0.2, n4__filename_prefix="video/killed")
    client.queue(prompt)
    path = wait_for_frames(client, "killed_*.mp4", 57, known)
    client.kill()
    frames = frames_of(path)
    assert len(frames) >= 57
    client.start()
    state = path.with_suffix(".state.safetensors")
    assert state.is_file()
    info = client.server.request("/object_info/AdaStateLoadState")["AdaStateLoadState"]
    options = json.dumps(info["input"]["required"]["file"])
    assert f"video/{state.name} [output]" in options
    length = len(frames) + 25
    resumed = workflow("long_video", n5__length=length, n5__resume=["6", 0], n4__join=True)
    resumed["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": f"video/{state.name} [output]"}}
    outputs = client.run(resumed)
    assert not list(path.parent.glob(".*")), "what the killed server left is swept"
    joined = frames_of(client.output / "video" / outputs["5"]["images"][0]["filename"])
    straight = workflow("long_video", n5__length=length, n4__filename_prefix="video/unkilled")
    outputs = client.run(straight)
    whole = frames_of(client.output / "video" / outputs["5"]["images"][0]["filename"])
    latents = (length - 1) // 4 + 1
    assert len(joined) == len(whole) == 4 * (latents - 1) + 1
    difference = np.abs(np.stack(joined).astype(int) - np.stack(whole).astype(int)).mean((1, 2, 3))
    assert difference.max() < 4
