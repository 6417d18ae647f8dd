"""Length 0 over HTTP: queued, watched, stopped; what is refused when it is queued, and what is replayed."""

from __future__ import annotations

import pytest
from conftest import report_of
from test_live import frames_in, is_kind, of_kind, queue, streamed, until, video_of


def test_it_rolls_until_it_is_stopped_and_is_then_replayed(client, watcher):
    prompt = streamed("endless", 0)
    prompt_id = queue(client, prompt, watcher)
    messages = until(watcher, lambda message: message["type"] == "adastate.chunk" and message["data"]["chunk"] >= 3)
    assert client.server.request("/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})["stopping"]
    messages += until(watcher, is_kind("adastate.end"))
    for chunk in of_kind(messages, "adastate.chunk"):
        assert (chunk["frames_total"], chunk["seconds_total"], chunk["seconds_left"]) == (None, None, None)
        assert chunk["seconds"] == chunk["frames"] / 16
    assert of_kind(messages, "adastate.start")[0]["about"]["length"] == 0
    assert of_kind(messages, "adastate.end")[0]["outcome"] == "stopped"
    told = [node["5"] for node in (each["nodes"] for each in of_kind(messages, "progress_state")) if "5" in node]
    assert told and all(each["value"] <= each["max"] < 20 for each in told)
    entry = client.wait(prompt_id)
    report = report_of(entry["outputs"])
    video = video_of(client, entry["outputs"])
    frames = frames_in(video)
    assert report["stopped"] == {"frame": frames, "of": None, "by": "user"} and frames >= 9 + 12 * 3
    assert report["state"] == "live/" + video.name.replace(".mp4", ".state.safetensors [output]")
    assert (client.output / report["state"].removesuffix(" [output]")).is_file()
    client.run(prompt)
    assert [path.name for path in client.output.glob("live/endless_*.mp4")] == [video.name]

    resumed = streamed("resumed0", frames + 12, n5__resume=["7", 0])
    resumed["7"] = {"class_type": "AdaStateLoadState", "inputs": {"file": report["state"]}}
    assert report_of(client.run(resumed))["frames"] == 12


@pytest.mark.parametrize("fault", ["no stream", "LATENT is linked"])
def test_what_it_cannot_do_is_refused_when_it_is_queued(client, fault):
    prompt = streamed("refused0", 0)
    if fault == "no stream":
        del prompt["5"]["inputs"]["stream"]
    else:
        prompt["8"] = {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "live/refused0"}}
    errors = client.refused(prompt)["node_errors"]["5"]["errors"]
    said = "and that needs a stream" if fault == "no stream" else "but LATENT is linked: take that link away"
    assert all("length is 0, which rolls until it is stopped" in error["details"] for error in errors)
    assert all(said in error["details"] for error in errors) and not list(client.output.glob("live/refused0*"))
