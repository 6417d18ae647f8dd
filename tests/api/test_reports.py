"""The report beside a video, for every end of a rollout on a real server, and the page's table of its keys."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of, frames_of, report_of, workflow
from safetensors.torch import load_file, save_file

LONG = 4001


def streamed(prefix: str, **changes) -> dict:
    return workflow("long_video", n4__filename_prefix=f"reports/{prefix}", **changes)


def report_at(client, prefix: str, number: int = 1) -> dict:
    """The file, as any client would get it."""
    query = f"filename={prefix}_{number:05}_.report.json&subfolder=reports&type=output"
    with urllib.request.urlopen(f"http://127.0.0.1:{client.server.port}/view?{query}") as answer:
        assert answer.headers["Content-Type"].startswith("application/json")
        return json.loads(answer.read())


def until_frames(client, prefix: str) -> Path:
    """The growing video once it holds some chunks."""
    path, end = client.output / "reports" / f"{prefix}_00001_.mp4", time.monotonic() + 120
    while time.monotonic() < end:
        if path.is_file() and path.stat().st_size > 20_000:
            assert not path.with_suffix(".report.json").exists(), "a run under way has none"
            return path
        time.sleep(0.1)
    raise AssertionError("no frames")


def keeps(client, prompt_id: str, told: dict, ended: str) -> None:
    """What a report of a video that is not whole has to be right about."""
    assert (told["ended"], told["prompt_id"], told["node_id"]) == (ended, prompt_id, "5")
    [video], state = told["videos"], told["state"]
    assert len(frames_of(client.output / video)) == told["frames_total"] > 0 and told["length"] == LONG
    info = client.server.request("/object_info/AdaStateLoadState")["AdaStateLoadState"]
    assert state in json.dumps(info["input"]["required"]["file"])


@pytest.fixture(scope="module")
def reports(client) -> dict[str, dict]:
    """One of each end, by `ended`, from the disk."""
    return {}


def test_whole(client, reports):
    prompt = streamed("whole", n5__length=33, n4__history_chunks=1)
    entry = client.wait(prompt_id := client.queue(prompt))
    outputs = entry["outputs"]["5"]
    [file] = outputs["adastate_report_files"]
    told = reports["whole"] = json.loads((client.folder_of(file) / file["filename"]).read_text())
    assert told == report_at(client, "whole") == report_of(entry["outputs"])
    assert (told["ended"], told["error"], told["prompt_id"]) == ("whole", None, prompt_id)
    assert told["videos"] == ["reports/whole_00001_.mp4"] and told["history"] == [1, 2, 3]
    assert told["state"] == "reports/whole_00001_.state.safetensors [output]"


def test_stopped_by_the_packs_own_stop(client, reports):
    prompt_id = client.queue(streamed("stopped", n5__length=LONG))
    until_frames(client, "stopped")
    assert client.server.request("/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})["stopping"]
    entry = client.wait(prompt_id)
    told = reports["stopped"] = report_at(client, "stopped")
    assert told == report_of(entry["outputs"])
    keeps(client, prompt_id, told, "stopped")
    assert told["stopped"] == {"frame": told["frames_total"], "of": LONG, "by": "user"}


def test_stopped_by_its_time_and_run_again_when_queued_again(client):
    prompt = streamed("limit", n5__length=57, n5__max_seconds=0.001)
    first, second = (client.run(prompt) for _ in range(2))
    for number, outputs in ((1, first), (2, second)):
        told = report_at(client, "limit", number)
        assert told == report_of(outputs) and told["ended"] == "stopped"
        assert told["stopped"] == {"frame": 9, "of": 57, "by": "max_seconds"}
    going_on = streamed("limit", n5__length=57, n5__resume=["6", 0], n4__join=True)
    going_on["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": told["state"]}}
    told = report_of(client.run(going_on))
    assert (told["ended"], told["frames"], told["frames_total"]) == ("whole", 48, 57)
    assert len(frames_of(client.output / told["videos"][0])) == 57


def test_interrupted(client, reports):
    prompt_id = client.queue(streamed("cut", n5__length=LONG))
    until_frames(client, "cut")
    client.interrupt()
    entry = client.wait(prompt_id)
    assert error_of(entry)["event"] == "execution_interrupted" and not entry["outputs"]
    told = reports["interrupted"] = report_at(client, "cut")
    keeps(client, prompt_id, told, "interrupted")
    assert told["error"] is None


def test_failed_by_weights_that_are_no_numbers(client, reports):
    weights = load_file(ROOT / "models" / "diffusion_models" / "adastate_demo.safetensors")
    name = next(name for name in weights if name.endswith("head.head.weight"))
    weights[name] = torch.full_like(weights[name], float("nan"))
    folder = client.folder / "base" / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "broken.safetensors")
    prompt_id = client.queue(streamed("nan", n5__length=33, n1__unet_name="broken.safetensors"))
    error = error_of(client.wait(prompt_id))
    told = reports["failed"] = report_at(client, "nan")
    assert (told["ended"], told["prompt_id"]) == ("failed", prompt_id)
    assert told["error"]["type"] == "non_finite" and told["error"]["message"] == error["exception_message"].strip()
    assert (told["videos"], told["state"], told["frames"]) == ([], None, 0)
    assert [path.name for path in (client.output / "reports").glob("nan_*")] == ["nan_00001_.report.json"]


def test_failed_by_a_join_that_does_not_fit(client):
    state = report_of(client.run(streamed("first", n5__length=21, n4__history_chunks=1)))["state"]
    prompt = streamed("second", n5__length=33, n5__resume=["6", 0], n4__join=True, n4__fps=24.0)
    prompt["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": state}}
    error = error_of(client.wait(client.queue(prompt)))
    told = report_at(client, "second")
    assert told["error"] == {"type": "refused_input", "message": error["exception_message"].strip()}
    assert (told["ended"], told["videos"], told["frames"], told["frames_total"]) == ("failed", [], 0, 21)


def test_a_killed_server_leaves_no_report_and_the_next_one_its_own(client):
    client.queue(streamed("killed", n5__length=LONG, n4__autosave_seconds=0.2))
    path = until_frames(client, "killed")
    client.kill()
    client.start()
    assert not path.with_suffix(".report.json").exists()
    client.run(streamed("killed", n5__length=9))
    assert report_at(client, "killed", 2)["ended"] == "whole"


def test_the_table_of_keys_is_what_the_reports_hold(client, reports):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`.+?`) \| (.+?) \| .+ \|$", page[page.index("| key | when |") :].split("\n\n")[0], re.MULTILINE
    )
    table = {key: when for keys, when in rows for key in re.findall(r"`(\w+)`", keys)}
    always = {key for key, when in table.items() if when == "always"}
    others = [
        report_of(client.run(workflow("absorption", n6__length=33)), "6"),
        report_of(client.run(workflow("system_krea_14b", n6__length=21)), "6"),
        report_of(client.run(workflow("stream_to_frames", n5__length=9))),
    ]
    for told in (*reports.values(), *others):
        assert always <= told.keys() <= table.keys(), told["ended"]
    elsewhere = {"enlarged", "steering"}  # tests/host/test_enlarging.py, test_steer.py
    assert set().union(*reports.values(), *others) == table.keys() - elsewhere
    ends = re.findall(r"^\| `(\w+)` \|", page[page.index("| `ended` |") :].split("\n\n")[0], re.MULTILINE)
    assert set(ends[1:]) == reports.keys()
