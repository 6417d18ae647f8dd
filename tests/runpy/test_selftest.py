"""`run.py selftest`: what it queues, what it prints, and how it ends."""

from __future__ import annotations

import pytest

import run

TABLE = "AdaState Self Test: {} of 3 ok, 40 s\npack 0.1.0\n\n| check | result | what was seen |"


@pytest.fixture
def queued(monkeypatch):
    """The prompts that were queued on a server that answers with `entry`."""
    prompts, entry = [], {}

    class Server:
        def __init__(self, *given):
            self.log = given[-1]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            entry["ended"] = True

        def wait_ready(self):
            pass

    monkeypatch.setattr(run, "Server", Server)
    monkeypatch.setattr(run, "ensure_ready", lambda: None)
    monkeypatch.setattr(run, "run_prompt", lambda server, prompt: prompts.append(prompt) or entry)

    def answer(text):
        entry.update(status={"status_str": "success"}, outputs={"1": {"text": [text]}})
        return prompts, entry

    answer.entry = entry
    return answer


@pytest.mark.parametrize(("good", "status"), [(3, 0), (2, 1)])
def test_the_table_is_printed_and_the_status_says_whether_all_is_ok(queued, capsys, good, status):
    prompts, entry = queued(TABLE.format(good))
    assert run.main(["selftest"]) == status
    assert prompts == [{"1": {"class_type": "AdaStateSelfTest", "inputs": {"speed": True}}}]
    assert TABLE.format(good) in capsys.readouterr().out and entry["ended"]


def test_quick_leaves_the_time_of_a_block_out(queued):
    prompts, _ = queued(TABLE.format(3))
    assert run.main(["selftest", "--quick"]) == 0
    assert prompts[0]["1"]["inputs"] == {"speed": False}


def test_a_run_that_failed_is_told(queued, capsys):
    data = {"node_type": "AdaStateSelfTest", "node_id": "1", "exception_message": "no room"}
    queued.entry.update(status={"status_str": "error", "messages": [["execution_error", data]]}, outputs={})
    assert run.main(["selftest"]) == 1
    assert "AdaStateSelfTest (node 1) failed: no room" in capsys.readouterr().out
