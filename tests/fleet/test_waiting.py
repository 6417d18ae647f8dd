"""A worker waits for a prompt: the host says that it has ended before its history has it."""

from __future__ import annotations

import pytest

from fleet import worker
from fleet.worker import Worker

END = {"type": "execution_success", "data": {"prompt_id": "p"}}
ENTRY = {"status": {"status_str": "success"}, "outputs": {}}


class Late:
    """A host that says the end once, and whose history has the prompt when it is asked for the third time."""

    url = "http://host"

    def __init__(self, says: bool) -> None:
        self.told, self.asked, self.waited = [[END] if says else []], 0, []

    def events(self, seconds: float) -> list[dict]:
        self.waited.append(seconds)
        assert len(self.waited) < 20, "it waits for ever"
        return self.told.pop() if self.told else []

    def entry(self, prompt_id: str) -> dict | None:
        self.asked += 1
        return ENTRY if self.asked > 2 else None

    def queued(self) -> list[str]:
        return ["p"]


def waited(monkeypatch, says: bool) -> Late:
    monkeypatch.setattr(worker, "SLOW_LOOK", float("inf"))
    host = Late(says)
    assert Worker(0, None, None)._wait(host, "p", None) is ENTRY
    return host


def test_a_prompt_that_has_ended_is_asked_for_until_the_history_has_it(monkeypatch):
    host = waited(monkeypatch, says=True)
    assert host.asked == 3 and host.waited == [1.0, worker.QUICK_LOOK, worker.QUICK_LOOK]


def test_a_prompt_of_which_nothing_is_said_is_looked_at_seldom(monkeypatch):
    with pytest.raises(AssertionError, match="for ever"):
        waited(monkeypatch, says=False)
