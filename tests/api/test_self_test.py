"""AdaState Self Test on a running server: it lets an interrupt through, and the server goes on."""

from __future__ import annotations

import time

PROMPT = {"1": {"class_type": "AdaStateSelfTest", "inputs": {"speed": False}}}


def test_an_interrupt_ends_it_and_the_server_goes_on(client):
    asked = client.queue(PROMPT)
    time.sleep(3)
    client.interrupt()
    entry = client.wait(asked)
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds and "1" not in entry["outputs"]
    words = {"1": {"class_type": "AdaStateDemoPrompt", "inputs": {"terrain": "meadow", "pace": "slow", "balloon": "gold",
             "lantern": "lantern"}}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}  # fmt: skip
    assert client.wait(client.queue(words))["status"]["status_str"] == "success"
