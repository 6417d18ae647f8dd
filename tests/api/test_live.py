"""Watching a rollout over HTTP and its socket, stopping it, and what is replayed afterwards."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import uuid
from pathlib import Path

import av
import pytest
from conftest import ROOT, report_of, workflow
from PIL import Image
from safetensors import safe_open
from watched_server import ALWAYS, OF_NOBODY, Listener

from tools.host_client import Events

LENGTH, CHUNKS = 97, 9  # enough to be stopped on the way, short enough to be finished


def streamed(prefix: str, length: int = LENGTH, **changes) -> dict:
    """The long video with its state saved at the end."""
    prompt = workflow("long_video", n5__length=length, n4__filename_prefix=f"live/{prefix}", **changes)
    prompt["6"] = {
        "class_type": "AdaStateSaveState",
        "inputs": {"state": ["5", 1], "filename_prefix": f"live/{prefix}"},
    }
    return prompt


def queue(client, prompt: dict, events: Events | None = None) -> str:
    body = {"prompt": prompt} | ({"client_id": events.name} if events else {})
    return client.server.request("/prompt", body)["prompt_id"]


def until(events: Events, found, seconds: float = 120) -> list[dict]:
    """All messages until one for which `found` holds."""
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        for message in events.read(timeout=0.5):
            seen.append(message)
            if found(message):
                return seen
    raise AssertionError(f"not told within {seconds} s; the last messages: {seen[-5:]}")


def of_kind(messages: list[dict], kind: str) -> list[dict]:
    return [message["data"] for message in messages if message["type"] == kind]


def is_kind(kind: str):
    return lambda message: message["type"] == kind


def video_of(client, outputs: dict) -> Path:
    file = outputs["5"]["images"][0]
    return client.output / file["subfolder"] / file["filename"]


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def saved_tensors(client, outputs: dict) -> dict:
    name = outputs["6"]["text"][0].splitlines()[0].removesuffix(" [output]")
    with safe_open(str(client.output / name), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def test_a_watched_run_tells_its_client_what_it_makes(client, watcher):
    stranger = Events(client.server.port, uuid.uuid4().hex)
    prompt_id = queue(client, streamed("watched"), watcher)
    messages = until(watcher, is_kind("adastate.end"))
    chunks, pictures = of_kind(messages, "adastate.chunk"), of_kind(messages, "adastate.pictures")
    assert sorted(chunk["chunk"] for chunk in chunks) == list(range(CHUNKS))
    assert {(chunk["prompt_id"], chunk["node_id"]) for chunk in chunks + pictures} == {(prompt_id, "5")}
    last = max(chunks, key=lambda chunk: chunk["chunk"])
    assert (last["frames"], last["frames_total"], last["seconds"]) == (LENGTH, LENGTH, LENGTH / 16)
    assert last["seconds_left"] == 0 and last["speed"] > 0
    outputs = client.wait(prompt_id)["outputs"]
    assert last["kv_bytes"] == report_of(outputs)["kv_bytes_used"]
    measured = [chunk["meters"] for chunk in sorted(chunks, key=lambda chunk: chunk["chunk"]) if chunk["meters"]]
    assert len(measured) > 1 and all(set(m) == {"colour", "contrast", "sharpness", "motion"} for m in measured)
    assert measured[0]["colour"] == 0 and measured[-1]["colour"] > 0 and measured[-1]["motion"] > 0
    for shown in pictures:
        assert 1 <= len(shown["pictures"]) <= 12
        for picture in shown["pictures"]:
            kind, _, data = picture["url"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (kind, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", (64, 64))
            assert 0 <= picture["frame"] < LENGTH
    assert of_kind(messages, "adastate.end")[0]["outcome"] == "done"
    kinds = {message["type"] for message in stranger.read(timeout=0.5)}
    stranger.close()
    assert not any(kind.startswith("adastate") for kind in kinds)


def test_of_a_prompt_without_a_client_nobody_gets_a_picture(client):
    """The host tells every socket how far it is; what it tells stands in docs/api.md."""
    stranger = Listener(client.server.port, uuid.uuid4().hex)
    prompt = streamed("nobodys", 9, n5__seed=31)
    client.run(prompt)
    client.server.request("/system_stats")
    heard = {kind for kind, _ in stranger.take()}
    stranger.close()
    assert {"status", "progress"} <= heard <= ALWAYS | OF_NOBODY
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.partition("## Who sees what")[2].partition("\n## ")[0]
    told = section.partition("every open socket by itself")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", told)) - {"client_id"} == ALWAYS | OF_NOBODY


def test_pictures_are_small_and_few(client, watcher):
    prompt = streamed("wide", 33, n5__width=640, n5__height=32)
    start = time.monotonic()
    queue(client, prompt, watcher)
    messages = until(watcher, is_kind("adastate.end"))
    seconds = time.monotonic() - start
    shown = [picture for each in of_kind(messages, "adastate.pictures") for picture in each["pictures"]]
    assert 1 <= len(shown) <= 4 + 4 * seconds
    for picture in shown:
        image = Image.open(io.BytesIO(base64.b64decode(picture["url"].partition(",")[2])))
        assert image.size == (320, 16)


def test_a_page_that_comes_late_gets_what_there_is(client, watcher):
    prompt_id = queue(client, streamed("late"), watcher)
    until(watcher, is_kind("adastate.pictures"))
    run = client.server.request(f"/adastate/runs/{prompt_id}/5")
    assert run["chunks"] and run["chunks"][0]["chunk"] == 0 and run["pictures"]
    until(watcher, is_kind("adastate.end"))
    run = client.server.request(f"/adastate/runs/{prompt_id}/5")
    assert (run["running"], run["outcome"], run["newest"]["frames"]) == (False, "done", LENGTH)
    assert any(chunk.get("thumbnail", "").startswith("data:image/jpeg") for chunk in run["chunks"])
    listed = client.server.request(f"/adastate/runs?client_id={watcher.name}")["runs"]
    assert [each["prompt_id"] for each in listed] == [prompt_id]
    assert client.server.request("/adastate/runs?client_id=nobody")["runs"] == []


def test_without_a_client_nothing_is_made_but_it_can_be_stopped(client):
    prompt_id = queue(client, streamed("headless", 4001))
    run = listed(client, prompt_id)
    assert run["running"] and run["newest"] is None
    assert client.server.request("/api/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})["stopping"]
    entry = client.wait(prompt_id)
    assert entry["status"]["status_str"] == "success" and report_of(entry["outputs"])["stopped"]["of"] == 4001
    answer = client.server.request(f"/adastate/runs/{prompt_id}/5")
    assert "there is no rollout" in answer["error"]["message"]


def listed(client, prompt_id: str) -> dict:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for run in client.server.request("/adastate/runs")["runs"]:
            if run["prompt_id"] == prompt_id:
                return run
        time.sleep(0.05)
    raise AssertionError("the rollout is not listed")


def test_stop_and_keep_then_run_again(client, watcher):
    prompt = streamed("stopped", n5__keep_latents=True)
    prompt_id = queue(client, prompt, watcher)
    until(watcher, is_kind("adastate.chunk"))
    answer = client.server.request("/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})
    assert answer["stopping"], answer
    assert of_kind(until(watcher, is_kind("adastate.end")), "adastate.end")[0]["outcome"] == "stopped"
    entry = client.wait(prompt_id)
    assert entry["status"]["status_str"] == "success"
    report = report_of(entry["outputs"])
    frame = report["stopped"]["frame"]
    assert report["stopped"] == {"frame": frame, "of": LENGTH, "by": "user"}
    assert 9 <= frame < LENGTH and (frame - 9) % 12 == 0
    assert f"stopped at frame {frame} of {LENGTH}" in json.dumps(report["warnings"])
    assert report["frames_total"] == frame == frames_in(video_of(client, entry["outputs"]))
    state = entry["outputs"]["6"]["text"][0].splitlines()[0]

    whole = client.run(prompt)  # the same graph: the short result is not replayed
    assert "stopped" not in report_of(whole) and frames_in(video_of(client, whole)) == LENGTH
    assert video_of(client, whole) != video_of(client, entry["outputs"])
    written = sorted(client.output.glob("live/stopped_*.mp4"))
    client.run(prompt)  # that one is
    assert sorted(client.output.glob("live/stopped_*.mp4")) == written and len(written) == 2

    resumed = streamed("resumed", n5__keep_latents=True, n5__resume=["7", 0])
    resumed["7"] = {"class_type": "AdaStateLoadState", "inputs": {"file": state}}
    went_on = saved_tensors(client, client.run(resumed))
    straight = saved_tensors(client, whole)
    assert went_on.keys() == straight.keys()
    assert all(went_on[key].equal(straight[key]) for key in straight)


def steady(outputs: dict) -> dict:
    """The same without what a plan says of the memory that is free at the moment."""
    return json.loads(re.sub(r"fits: [\d.]+ GiB", "fits", json.dumps(outputs)))


@pytest.mark.parametrize(
    ("name", "lengths", "outputs", "others"),
    [
        ("sampler", {"n9__length": 21}, {"12"}, {"11"}),  # a saved video, and one in the temp folder
        (
            "inspect_and_plan",
            {"n9__length": 21},
            {"4", "5", "6", "7", "9", "10"},
            set(),
        ),  # texts, a rollout's video and report
    ],
)
def test_what_nodes_showed_is_shown_again_to_a_page_that_was_reloaded(client, watcher, name, lengths, outputs, others):
    """Without any of it being run again; of nodes that are no outputs by hosts that know the mark for it."""
    prompt = workflow(name, **lengths)
    shown = client.run(prompt)
    assert set(shown) == outputs | others
    again = queue(client, prompt, watcher)
    messages = until(watcher, is_kind("execution_success"))
    # a newer host also tells of nodes that might have shown something and have not (a loader without a note)
    told = {each["node"]: each["output"] for each in of_kind(messages, "executed") if each["output"] is not None}
    info = client.server.request("/object_info/AdaStateRenderVideo")["AdaStateRenderVideo"]
    kept = outputs | (others if "has_intermediate_output" in info else set())
    assert steady(told) == steady({node: shown[node] for node in kept})
    assert client.wait(again)["outputs"] == told


def test_a_run_of_one_output_lists_no_other_rollouts_files(client):
    """Where a prompt has several rollouts and one is asked for."""
    prompt = workflow("anchor_comparison")
    rollouts = [key for key, node in prompt.items() if node["class_type"] == "AdaStateRollout"][:2]
    for key in rollouts:
        prompt[key]["inputs"]["length"] = 21
    for key in rollouts:
        body = {"prompt": prompt, "partial_execution_targets": [key]}
        entry = client.wait(client.server.request("/prompt", body)["prompt_id"])
        assert entry["status"]["status_str"] == "success" and list(entry["outputs"]) == [key]


def test_a_deleted_file_is_made_again(client):
    prompt = streamed("deleted", 33, n5__seed=8)
    first = video_of(client, client.run(prompt))
    client.run(prompt)
    assert list(client.output.glob("live/deleted_*.mp4")) == [first]
    first.unlink()
    second = video_of(client, client.run(prompt))
    assert frames_in(second) == 33
    client.run(prompt)
    assert list(client.output.glob("live/deleted_*.mp4")) == [second]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt_id": "none", "node_id": "5"}, 404, "no rollout of node 5 runs in prompt none"),
        ({"prompt_id": "none"}, 400, "node_id"),
        ({}, 400, "prompt_id"),
        ([1], 400, "prompt_id"),
    ],
)
def test_stopping_what_does_not_run_is_refused(client, body, status, words):
    answer = client.server.request("/adastate/stop", body)
    assert words in answer["error"]["message"]
    raw = client.server.request("/adastate/runs/none/5")
    assert "there is no rollout of node 5 in prompt none" in raw["error"]["message"]
