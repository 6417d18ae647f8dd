"""Changing a rollout while it is under way over HTTP: refused where it cannot be, and told to its owner alone."""

from __future__ import annotations

import json
import uuid

from conftest import frames_of, report_of, workflow
from test_live import is_kind, listed, of_kind, queue, until, video_of
from test_route_bounds import post

from tools.host_client import Events


def timeline(prefix: str, length: int, **changes) -> dict:
    """The demo's timeline."""
    return workflow("prompt_timeline", n5__length=length, n4__filename_prefix=f"steer/{prefix}", **changes)


def ask(client, prompt_id: str, **what) -> dict:
    return client.server.request("/adastate/steer", {"prompt_id": prompt_id, "node_id": "5"} | what)


def done_with(number: int):
    """Whether an event says that the change was done and its first picture is there."""

    def found(message: dict) -> bool:
        done = message["data"]["steering"]["done"] if message["type"] == "adastate.steered" else []
        return any(one["id"] == number and one["seconds_to_picture"] is not None for one in done)

    return found


TEN = [
    {"prompt": "snow"}, {"seed": 2**64 - 1}, {"prompt": "city, fast", "transition": "cut"}, {"strength": 0.5},
    {"prompt": "desert", "transition": "soft", "seed": 3}, {"prompt": "gold balloon", "transition": "flush"},
    {"seed": 12, "strength": 1}, {"prompt": "lantern", "transition": "rope cut"}, {"prompt": "meadow"}, {"strength": 0.25},
]  # fmt: skip


def test_ten_changes_by_two_clients_make_the_video_of_the_timeline_that_is_told(client, watcher):
    """The owner hears of all and another client of nothing; every first picture is waited for, and has its seconds."""
    stranger = Events(client.server.port, uuid.uuid4().hex)
    prompt_id = queue(client, timeline("ten", 4001), watcher)
    [start] = of_kind(until(watcher, is_kind("adastate.start")), "adastate.start")
    assert start["steering"]["can"]["prompt"] is None and start["steering"]["done"] == []
    until(watcher, is_kind("adastate.chunk"))
    for number, what in enumerate(TEN, 1):
        answer = ask(client, prompt_id, **what)  # whoever knows the run may ask; a client's name is not asked for
        assert answer["steer"] == {"id": number} and answer["prompt_id"] == prompt_id, answer
        until(watcher, done_with(number))
    told = client.server.request(f"/adastate/runs/{prompt_id}/5")["steering"]
    assert [one["id"] for one in told["done"]] == list(range(1, 11)) and told["strength"] == 0.25 and told["seed"] == 12
    client.server.request("/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})
    [end] = of_kind(until(watcher, is_kind("adastate.end")), "adastate.end")
    assert end["outcome"] == "stopped" and end["steering"]["timeline"] == told["timeline"]
    assert not any(m["type"].startswith("adastate") for m in stranger.read(timeout=0.5))
    stranger.close()
    outputs = client.wait(prompt_id)["outputs"]
    report = report_of(outputs)
    assert report["steering"]["done"] == told["done"]

    again = timeline("again", report["stopped"]["frame"], n3__text=told["timeline"])
    other = client.run(again)
    assert "steering" not in report_of(other)
    steered, whole = (frames_of(video_of(client, each)) for each in (outputs, other))
    assert len(steered) == len(whole) and all((a == b).all() for a, b in zip(steered, whole, strict=True))


def test_a_pause_and_a_change_in_the_last_chunk(client, watcher):
    """One chunk of many steps: nothing follows it. Of two chunks the second one is for another day."""
    prompt_id = queue(client, timeline("last", 9, n5__steps=60), watcher)
    until(watcher, is_kind("adastate.start"))
    answer = ask(client, prompt_id, prompt="snow")
    assert answer["steering"]["waiting"] == [1] == [answer["steer"]["id"]]
    [end] = of_kind(until(watcher, is_kind("adastate.end")), "adastate.end")
    [done] = end["steering"]["done"]
    assert end["outcome"] == "done" and done["error"] == "there was no chunk left to make when it was asked"
    assert (done["at"], done["seconds_to_picture"], done["prompt"]) == (None, None, "snow")

    prompt_id = queue(client, timeline("paused", 4001), watcher)
    until(watcher, is_kind("adastate.chunk"))
    assert "steer" in ask(client, prompt_id, pause=True)
    [end] = of_kind(until(watcher, is_kind("adastate.end")), "adastate.end")
    report = report_of(client.wait(prompt_id)["outputs"])
    assert end["outcome"] == "paused" and report["stopped"]["by"] == "pause"
    assert client.server.request("/adastate/runs")["runs"][-1]["outcome"] == "paused"
    assert end["saved"]["state"] == report["state"] and report["state"] is not None


BAD = [
    ({}, 400, "nothing is asked"),
    ({"transition": "cut"}, 400, "nothing is asked"),
    ({"seed": 1, "transition": "cut"}, 400, "give a prompt with it"),
    ({"mood": 1}, 400, "'mood' is no key of this route"),
    ({"prompt": " \n "}, 400, "write what the video is to show"),
    ({"prompt": 3}, 400, "prompt is 3"),
    ({"prompt": "a" * 20_001}, 400, "it may have 20000"),
    ({"prompt": "a" * 300_000}, 413, "at most 262144 are read"),
    ({"prompt": "snow", "transition": "zoom"}, 400, "transition is 'zoom'"),
    ({"prompt": "snow\n5s moon"}, 400, "cannot be an entry of a timeline"),
    ({"prompt": "moon"}, 400, "found 'moon'; the demo model knows"),
    ({"seed": -1}, 400, "seed is -1; give a whole number between 0 and 18446744073709551615"),
    ({"seed": 2**64}, 400, "seed is 18446744073709551616"),
    ({"seed": 1.5}, 400, "seed is 1.5"),
    ({"seed": True}, 400, "seed is True"),
    ({"strength": 0}, 400, "strength is 0; give a number above 0 and at most 1"),
    ({"strength": float("nan")}, 400, "strength is nan"),
    ({"pause": False}, 400, "pause is False; it can only be true"),
    ({"pause": True, "seed": 1}, 400, "ask it alone"),
    ({"take_back": 0}, 400, "take_back is 0"),
    ({"take_back": "1"}, 400, "give a number of seconds above 0"),
    ({"take_back": 1.0}, 409, "keeps no history to go back to"),
    ({"strength": 0.5}, 409, "strength is the adaptive anchor's, and this run has the static anchor"),
]


def test_what_cannot_be_asked_is_refused_and_changes_nothing(client):
    prompt = timeline("refused", 4001, n5__anchor=["9", 0])
    prompt["9"] = {"class_type": "AdaStateAnchorStatic", "inputs": {"sink_frames": 3}}
    prompt_id = client.queue(prompt)
    while listed(client, prompt_id)["steering"] is None:
        pass
    for what, status, words in BAD:
        body = json.dumps({"prompt_id": prompt_id, "node_id": "5"} | what).encode()
        answered, answer = post(client, "steer", body)
        assert (answered, words in answer["error"]["message"]) == (status, True), (what, answer)
    for place in ({"prompt_id": "x", "node_id": "5"}, {"prompt_id": prompt_id, "node_id": "6"}):
        assert post(client, "steer", json.dumps(place | {"seed": 1}).encode())[0] == 404
    for body in (b"{", b"[]", b'{"seed": 1}', json.dumps({"prompt_id": [1], "node_id": "5", "seed": 1}).encode()):
        status, answer = post(client, "steer", body)
        assert status == 400 and "the body must be JSON" in answer["error"]["message"]
    assert listed(client, prompt_id)["steering"]["done"] == []
    client.server.request("/adastate/stop", {"prompt_id": prompt_id, "node_id": "5"})
    assert "steering" not in report_of(client.wait(prompt_id)["outputs"])
    assert ask(client, prompt_id, seed=1)["error"]["message"].startswith("no rollout of node 5 runs")
