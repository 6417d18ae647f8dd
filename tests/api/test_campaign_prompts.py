"""Prompts, bodies and sockets that nobody means, on one server: it goes on, tells in sentences what is wrong, writes nothing
outside its folders, and shows a run to nobody else. Part `prompts` of the campaign (tests/core/campaign.py)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from conftest import workflow
from graph_fuzz import a_prompt, has_circle
from route_fuzz import a_call, ask, check_answer
from socket_fuzz import a_meeting
from watched_server import MACHINE, SOONEST, HostEndedError, Watched, check_refusal, failure


@pytest.fixture(scope="module")
def world(client):
    watched = Watched(client)
    yield watched
    watched.close()
    if folder := os.environ.get("ADASTATE_CAMPAIGN"):  # for whoever wants to read what users are told
        lines = [f"{count} {text}" for text, count in watched.messages.most_common()]
        Path(folder, "prompts-sentences.txt").write_text("\n".join(lines), encoding="utf-8", errors="replace")


def try_prompt(world: Watched, trial, of_shipped: bool) -> None:
    with world.watching(trial) as name:
        what, body = a_prompt(world.info, trial.chance, trial.number, "owner", of_shipped)
        what, graph = f"{name}: {what}", body["prompt"]
        status, answer = world.queue(body)
        assert status < 500 or world.hosts_own(), (what, status, answer)
        check_refusal(answer, what, has_circle(graph))
        trial.saw(run=int("prompt_id" in answer))
        if "prompt_id" in answer:
            try:
                failed = failure(world.entry(answer["prompt_id"]))
            except HostEndedError:  # nothing that the host was given is run any more, by no fault of the pack's
                trial.saw(times_that_the_host_ended_by_itself=1)
                world.restart()
                return
            if failed is not None:
                world.messages[": ".join(failed)] += 1
                assert not MACHINE.search(failed[1].partition(": ")[2]), (what, failed)


def test_graphs(campaign, world):
    for trial in campaign("graphs of the pack's and the host's nodes, linked right and wrong", full=2500, sample=8):
        with trial:
            try_prompt(world, trial, of_shipped=False)


def test_workflows(campaign, world):
    for trial in campaign("shipped workflows with something damaged", full=2500, sample=8):
        with trial:
            try_prompt(world, trial, of_shipped=True)
    world.check_files("the workflows")


def try_call(world: Watched, trial, live: tuple[str, str], name: str) -> None:
    what, sent, whole = a_call(trial.chance, live)
    status, body = ask(world.port, sent, whole)
    assert status or not whole, (name, what)
    if status < 500 or not world.hosts_own():
        check_answer(f"{name}: {what}", status, body)


def test_bodies_under_way(campaign, world):
    for trial in campaign("calls of the pack's routes while a run is under way", full=1000, sample=10):
        with trial, world.watching(trial) as name:
            try_call(world, trial, under_way(world), name)
    world.end_all()
    world.check_files("the calls")


def test_bodies(campaign, world):
    live = None
    for trial in campaign("calls of the pack's routes when the run that they name is over", full=2000, sample=20):
        with trial, world.watching(trial) as name:
            if live is None:
                live = under_way(world)
                world.end_all()
            try_call(world, trial, live, name)
    world.check_files("the calls")


def under_way(world: Watched) -> tuple[str, str]:
    """(prompt_id, node_id) of a run without an end, the one that goes on or a new one."""
    queued, end = "", time.monotonic() + SOONEST
    while time.monotonic() < end:
        for run in json.loads(world.ask("GET", "/adastate/runs?client_id=owner")[1])["runs"]:
            if run["running"] and not run["stopping"]:
                return run["prompt_id"], run["node_id"]
        if not queued:
            changes = {"n5__length": 0, "n5__width": 32, "n5__height": 32, "n5__steps": 1, "n5__seed": time.time_ns()}
            prompt = workflow("prompt_timeline", **changes, n4__history_chunks=1, n4__filename_prefix="bodies/run")
            status, answer = world.queue({"prompt": prompt, "client_id": "owner"})
            assert status == 200, answer
            queued = answer["prompt_id"]
        ended = json.loads(world.ask("GET", "/history?max_items=1")[1])
        assert queued not in ended, f"a run without an end ended: {ended}"
        time.sleep(0.05)
    raise AssertionError(f"no run was under way within {SOONEST} s")


def test_sockets(campaign, world):
    world.end_all()
    for trial in campaign(
        "websockets: ids, flags and frames that mean nothing, and clients that go", full=2000, sample=20
    ):
        with trial, world.watching(trial) as name:
            try:
                a_meeting(world, trial.chance)
            except AssertionError as error:
                error.add_note(name)
                raise
    world.check_files("the sockets")
