"""Interrupts and stops of a running server at random instants, with a prompt queued behind: it runs, and makes what a fresh server
makes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from conftest import error_of, frames_of, report_of, workflow

LENGTH = 165  # frames of the prompt that is cut short
BEHIND = 45  # of the one behind it
CHUNKS = {0} | set(range(9, LENGTH, 12)) | {LENGTH}


def prompt(prefix: str, length: int) -> dict:
    return workflow("long_video", n5__length=length, n4__filename_prefix=prefix, n4__codec="ffv1", n4__preview=False)


def video_of(client, report: dict) -> Path:
    return client.output / report["videos"][0]


def test_a_cut_prompt_leaves_the_server_as_it_was(client, campaign):
    whole, seconds = [], 0.0
    for trial in campaign("interrupt or stop over HTTP at a random instant, a prompt queued behind", full=20, sample=1):
        with trial:
            if not whole:  # what the server makes before anything was cut short
                whole = frames_of(video_of(client, report_of(client.run(prompt("whole/take", LENGTH)))))
                began = time.monotonic()
                client.run(prompt("timed/take", LENGTH))
                seconds = time.monotonic() - began
            stops, name = trial.number % 2 == 1, f"cut{trial.number}"
            first, behind = (
                client.queue(prompt(f"{name}/take", LENGTH)),
                client.queue(prompt(f"{name}-behind/take", BEHIND)),
            )
            time.sleep(trial.chance.uniform(0.0, seconds))
            if stops:
                client.server.request("/adastate/stop", {"prompt_id": first, "node_id": "5"})
            else:
                client.interrupt()
            entry = client.wait(first)
            after = client.wait(behind)
            ended = error_of(entry).get("event", "success")
            assert ended in ("success", "execution_interrupted"), error_of(entry)
            for report in sorted((client.output / name).glob("*.report.json")):
                told = json.loads(report.read_text())
                for video in told["videos"]:
                    found = frames_of(client.output / video)
                    assert len(found) in CHUNKS, f"{len(found)} frames"
                    assert all(map(np.array_equal, found, whole))
            if error_of(after).get("event") == "execution_interrupted":
                continue  # the first was over when the interrupt came
            assert after["status"]["status_str"] == "success", error_of(after)
            found = frames_of(video_of(client, report_of(after["outputs"])))
            assert len(found) == BEHIND and all(map(np.array_equal, found, whole))
