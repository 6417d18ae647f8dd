"""The host's routes that cancel jobs, where it has them: what a rollout leaves is what an interrupt leaves."""

from __future__ import annotations

import json
import time
import uuid

import pytest
from conftest import error_of, frames_of, workflow


@pytest.fixture
def cancel(client):
    """POST /api/jobs/ID/cancel, or, with several ids, /api/jobs/cancel; what it says."""
    if "jobs" not in client.server.request("/api/jobs"):
        pytest.skip("this host has no jobs (before 0.26)")

    def call(*jobs: str) -> object:
        if len(jobs) == 1:
            return client.server.request(f"/api/jobs/{jobs[0]}/cancel", {})["cancelled"]
        answer = client.server.request("/api/jobs/cancel", {"job_ids": list(jobs)})
        return answer["error"] if "error" in answer else answer["cancelled"]

    return call


def long(prefix: str) -> dict:
    return workflow("long_video", n5__length=1201, n4__filename_prefix=f"jobs/{prefix}")


def begun(client, name: str, seconds: float = 120) -> None:
    """Return when the video has its first chunks."""
    end, path = time.monotonic() + seconds, client.output / "jobs" / name
    while not (path.is_file() and path.stat().st_size > 9999):
        assert time.monotonic() < end, f"{name} does not grow"
        time.sleep(0.1)


def test_a_rollout_that_is_cancelled_keeps_its_chunks_and_goes_on(client, cancel):
    job = client.queue(long("one"))
    begun(client, "one_00001_.mp4")
    assert cancel(job) is True
    entry = client.wait(job)
    assert error_of(entry)["event"] == "execution_interrupted"
    frames = len(frames_of(client.output / "jobs" / "one_00001_.mp4"))
    assert 9 <= frames < 1201 and (frames - 9) % 12 == 0, "whole chunks"
    assert cancel(job) is False, "it has ended already"
    prompt = long("one")
    prompt["5"]["inputs"] |= {"length": frames + 12, "resume": ["6", 0]}
    prompt["4"]["inputs"]["join"] = True
    prompt["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": "jobs/one_00001_.state.safetensors [output]"}}
    outputs = client.run(prompt)
    assert json.loads(outputs["5"]["adastate_report"][0])["frames_total"] == frames + 12
    assert len(frames_of(client.output / "jobs" / outputs["5"]["images"][0]["filename"])) == frames + 12


def test_those_that_wait_and_run_are_cancelled_together(client, cancel):
    running = client.queue(long("run"))
    begun(client, "run_00001_.mp4")
    waiting = client.queue(long("wait"))
    assert cancel(waiting, running, str(uuid.uuid4())) is True
    assert error_of(client.wait(running))["event"] == "execution_interrupted"
    queue = client.server.request("/queue")
    assert waiting not in json.dumps(queue) and not list((client.output / "jobs").glob("wait*"))
    assert cancel(waiting, running) is False and cancel(str(uuid.uuid4())) is False
    assert "invalid" in str(cancel("no id", running))
    assert client.run(workflow("long_video", n5__length=9, n4__filename_prefix="jobs/next"))["5"]["images"]
