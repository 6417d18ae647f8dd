"""What of a row's folder is gone on from, and what is not."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from tables import LONG, ROOT

from fleet.going_on import begun, frames_in, is_whole, report_of
from fleet.graph import course_of, with_names


def long_video() -> dict:
    return json.loads(LONG.read_text())


def state(path: Path, frames: object, at: int, emitted: int = 5) -> Path:
    """A file with the header of a saved state, `at` seconds old by its date."""
    told = json.dumps({"emitted": emitted, "stream": {"file_frames": frames} if frames is not None else {}})
    header = json.dumps({"__metadata__": {"state": told}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.utime(path, (at, at))
    return path


def report(path: Path, at: int = 1, **told: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))
    os.utime(path, (at, at))


def test_the_newest_state_is_gone_on_from_joined(tmp_path):
    graph = with_names(long_video(), "v1", "v1")
    state(tmp_path / "v1" / "v1_00001_.state.safetensors", [33], 1)
    state(tmp_path / "v1" / "v1_00002_.state.safetensors", [57], 3)
    state(tmp_path / "v2" / "v2_00001_.state.safetensors", [99], 9)
    found = begun(graph, course_of(graph), tmp_path, "v1")
    assert found.frame == 57 and found.report is None
    expected = with_names(long_video(), "v1", "v1")
    expected["fleet_state"] = {"class_type": "AdaStateLoadState"} | {
        "inputs": {"file": "v1/v1_00002_.state.safetensors [output]"}
    }
    expected["5"]["inputs"]["resume"], expected["4"]["inputs"]["join"] = ["fleet_state", 0], True
    assert found.graph == expected and graph["4"]["inputs"]["filename_prefix"] == "v1/v1"
    before = begun(graph, course_of(graph), tmp_path, "v1", frozenset({"v1/v1_00002_.state.safetensors"}))
    assert before.frame == 33


def test_a_state_that_goes_on_by_itself_takes_the_start_picture_off(tmp_path):
    graph = json.loads((ROOT / "workflows" / "api" / "start_from_picture.json").read_text())
    course = course_of(graph)
    state(tmp_path / "v1" / "a.state.safetensors", [21], 1)
    assert "start_latent" in graph[course.rollout]["inputs"]
    assert "start_latent" not in begun(graph, course, tmp_path, "v1").graph[course.rollout]["inputs"]


def test_frames_and_video_of_one_rollout_are_both_joined(tmp_path):
    graph = long_video()
    graph["6"] = {"class_type": "AdaStateStreamFrames", "inputs": {"filename_prefix": "x", "stream": ["4", 0]}}
    graph["5"]["inputs"]["stream"] = ["6", 0]
    course = course_of(graph)
    assert course.streams == ("4", "6") and not course.why_anew
    named = with_names(graph, "v1", "v1")
    assert [named[node]["inputs"]["filename_prefix"] for node in "46"] == ["v1/v1", "v1/v1_6"]
    state(tmp_path / "v1" / "a.state.safetensors", [21], 1)
    gone_on = begun(graph, course, tmp_path, "v1").graph
    assert gone_on["4"]["inputs"]["join"] is gone_on["6"]["inputs"]["join"] is True


def several() -> dict:
    return json.loads((ROOT / "workflows" / "api" / "anchor_comparison.json").read_text())


def frames_alone() -> dict:
    graph = long_video()
    graph["4"] = {"class_type": "AdaStateStreamFrames", "inputs": {"filename_prefix": "x", "vae": ["2", 0]}}
    return graph


def pictures_alone() -> dict:
    graph = long_video()
    del graph["5"]["inputs"]["stream"], graph["4"]
    return graph


@pytest.mark.parametrize(
    ("make", "told"),
    [(several, "4 rollouts"), (frames_alone, "no Stream To Video"), (pictures_alone, "no Stream To Video")],
)
def test_what_cannot_go_on_is_made_from_its_start_and_says_so(tmp_path, make, told):
    graph = make()
    course = course_of(graph)
    state(tmp_path / "v1" / "a.state.safetensors", [21], 1)
    found = begun(graph, course, tmp_path, "v1")
    assert told in course.why_anew and "made from its start" in found.note
    assert found.graph == graph and not found.frame


def test_a_video_that_is_whole_is_not_made_again(tmp_path):
    graph = long_video()
    report(tmp_path / "v1" / "v1_00001_.report.json", ended="interrupted", videos=["v1/v1_00001_.mp4"])
    assert begun(graph, course_of(graph), tmp_path, "v1").report is None
    report(tmp_path / "v1" / "v1_00002_.report.json", ended="whole", videos=["v1/v1_00002_.mp4"])
    found = begun(graph, course_of(graph), tmp_path, "v1")
    assert found.report["videos"] == ["v1/v1_00002_.mp4"] and found.report_file == "v1/v1_00002_.report.json"
    graph["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["5", 2]}}  # more was to come behind the rollout
    assert begun(graph, course_of(graph), tmp_path, "v1").report is None


def test_which_reports_are_those_of_whole_videos():
    assert is_whole({"ended": "whole"}) and is_whole({"ended": "stopped", "stopped": {"by": "max_seconds"}})
    for told in ({"ended": "stopped", "stopped": {"by": "user"}}, {"ended": "stopped"}, {"ended": "failed"}, {}):
        assert not is_whole(told)


def test_a_prompts_own_report_is_found_among_others(tmp_path):
    report(tmp_path / "a_00001_.report.json", ended="failed", prompt_id="x")
    report(tmp_path / "a_00002_.report.json", ended="whole", prompt_id="y")
    (tmp_path / "a_00003_.report.json").write_text("[")
    report(
        tmp_path / "b_00001_.report.json", at=9, ended="whole", prompt_id="x"
    )  # of another rollout of the same prompt
    assert report_of(tmp_path, "x")[0] == "a_00001_.report.json" and report_of(tmp_path, "z") is None


def test_nothing_is_gone_on_from_where_the_output_cannot_be_seen(tmp_path):
    graph = long_video()
    assert begun(graph, course_of(graph), None, "v1").graph is graph
    assert begun(graph, course_of(graph), tmp_path, "v1").graph is graph


def test_a_header_without_the_files_frames_counts_latents(tmp_path):
    assert frames_in(state(tmp_path / "a", None, 1, emitted=5)) == 17
    assert frames_in(state(tmp_path / "b", [9, 8], 1)) == 8


def test_a_file_that_is_no_state_is_passed_over(tmp_path):
    whole = state(tmp_path / "a", [33], 1).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:cut])
        assert frames_in(tmp_path / "b") == 0
    for text in (
        b"",
        b"\xff" * 40,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
    ):
        (tmp_path / "b").write_bytes(text)
        assert frames_in(tmp_path / "b") == 0
    assert frames_in(tmp_path / "absent") == 0
