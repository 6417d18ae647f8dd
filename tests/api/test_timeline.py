"""Prompt timelines read and written over HTTP, and what a run tells of itself for going on with it."""

from __future__ import annotations

import pytest
from conftest import workflow
from test_live import is_kind, of_kind, queue, streamed, until

LINES = "0:00 a meadow\n5s {rope cut} a desert\n0:07.5 snow"
MARKS = "a meadow [5s {rope cut}: a desert] [7.5s: snow]"
BARS = "a meadow [5s] | a desert [2.5s {rope cut}] | snow"
ENTRIES = [(0, "a meadow", None), (5, "a desert", "rope cut"), (7.5, "snow", None)]


def ask(client, **body) -> dict:
    return client.server.request("/adastate/timeline", body)


def plain(told: dict) -> list[tuple]:
    return [(entry["seconds"], entry["text"], entry["transition"]) for entry in told["entries"]]


@pytest.mark.parametrize(("grammar", "text"), [("lines", LINES), ("marks", MARKS), ("bars", BARS)])
def test_a_timeline_is_read_and_written_in_its_own_grammar(client, grammar, text):
    told = ask(client, text=text, fps=16)
    assert told["grammar"] == grammar and plain(told) == ENTRIES
    written = ask(client, entries=told["entries"], grammar=grammar, fps=16)
    assert plain(written) == ENTRIES and written["grammar"] == grammar
    moved = [entry | {"seconds": 6.0} if entry["text"] == "a desert" else entry for entry in told["entries"]]
    again = ask(client, text=ask(client, entries=moved, grammar=grammar)["text"])
    assert plain(again) == [ENTRIES[0], (6, "a desert", "rope cut"), ENTRIES[2]]


def test_a_prompt_without_marks_stays_one(client):
    told = ask(client, text="a red balloon")
    assert told["grammar"] is None and plain(told) == [(0, "a red balloon", None)]
    assert ask(client, entries=told["entries"], grammar=None)["text"] == "a red balloon"


def test_a_prompt_that_a_grammar_cannot_hold_is_written_in_another(client):
    entries = [{"seconds": 0, "text": "a | b"}, {"seconds": 2, "text": "c", "transition": "cut"}]
    entries.append({"seconds": 4, "text": "", "transition": "shot"})
    told = ask(client, entries=entries, grammar="bars")
    assert plain(told) == [(0, "a | b", None), (2, "c", "cut"), (4, "", "shot")] and told["grammar"] != "bars"


@pytest.mark.parametrize(
    ("body", "place", "words"),
    [
        ({"text": "0s a\n3s {nothing} b"}, (2, 4), "there is no transition"),
        ({"text": "0s meadow\n3s a cow", "words": True}, (2, 4), "the demo model knows"),
        ({"text": "0s a\n0.1s b", "fps": 16}, (2, 6), "less than a latent frame"),
        ({"text": "0s a\n30s b", "duration": 10}, (2, 1), "the video ends at 10s"),
        ({"entries": [{"seconds": 0, "text": " "}]}, (None, None), "prompt 1 is empty"),
        (
            {"entries": [{"seconds": 0, "text": "a"}, {"seconds": 2, "text": "", "transition": "cut"}]},
            (None, None),
            "prompt 2 is",
        ),
        ({"entries": [{"seconds": 1, "text": "a"}]}, (None, None), "the first must be at 0"),
        ({"entries": [{"seconds": "x", "text": "a"}]}, (None, None), "give a number of seconds"),
        ({"text": "a", "fps": -1}, (None, None), "fps is -1"),
        ({"txt": "a"}, (None, None), "the body must be JSON"),
        ([], (None, None), "the body must be JSON"),
    ],
)
def test_what_is_no_timeline_is_told_with_its_place(client, body, place, words):
    error = client.server.request("/adastate/timeline", body)["error"]
    assert words in error["message"] and (error["line"], error["column"]) == place


def test_a_run_tells_how_to_go_on_with_it(client, watcher):
    prompt = streamed("told", 69, n4__history_chunks=2)
    prompt_id = queue(client, prompt, watcher)
    messages = until(watcher, is_kind("adastate.end"))
    about, saved = of_kind(messages, "adastate.start")[0]["about"], of_kind(messages, "adastate.end")[0]["saved"]
    assert (about["seed"], about["length"], about["fps"], about["history_chunks"]) == (7, 69, 16, 2)
    assert saved["kept"] == [2, 4, 6] and (client.output / saved["state"].removesuffix(" [output]")).is_file()
    chunks = sorted(of_kind(messages, "adastate.chunk"), key=lambda chunk: chunk["chunk"])
    assert [chunk["generated"] for chunk in chunks] == [1, 2, 3, 4, 5, 6] and not chunks[-1]["absorbed"]
    assert any(
        shown["hidden"] for shown in of_kind(messages, "adastate.pictures")
    )  # the demo model's anchor is adaptive
    client.wait(prompt_id)
    run = client.server.request(f"/adastate/runs/{prompt_id}/5")
    assert run["about"] == about and run["saved"] == saved

    longer = streamed("told_on", 81, n4__join=True, n5__resume=["9", 0])
    longer["9"] = {"class_type": "AdaStateLoadState", "inputs": {"file": saved["state"], "chunk": 4}}
    client.wait(queue(client, longer, watcher))
    messages = until(watcher, is_kind("adastate.end"))
    went_on = of_kind(messages, "adastate.start")[0]["about"]
    assert went_on["continues"] == about["stream"] != went_on["stream"] and went_on["first_frame"] == 45


def test_the_prompts_of_a_run_are_told(client, watcher):
    client.wait(queue(client, workflow("prompt_timeline", n5__length=33, n4__filename_prefix="live/prompts"), watcher))
    told = of_kind(until(watcher, is_kind("adastate.end")), "adastate.start")[0]["about"]["prompts"]
    assert [(entry["seconds"], entry["transition"]) for entry in told][1:] == [(4, "soft"), (8, "cut")]
    assert told[2]["text"].startswith("meadow terrain") and "gold balloon" in told[2]["text"]


def test_the_switch_of_absorption_is_told(client, watcher):
    client.wait(queue(client, workflow("absorption", n6__length=129, n5__filename_prefix="live/absorbed"), watcher))
    chunks = of_kind(until(watcher, is_kind("adastate.end")), "adastate.chunk")
    absorbed = [chunk["absorbed"] for chunk in sorted(chunks, key=lambda chunk: chunk["chunk"])]
    assert absorbed == sorted(absorbed) and not absorbed[0] and absorbed[-1]
