"""A running server of the host with the pack, talked to over HTTP as any client would."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tools.host_client import Events, Server
from tools.setup_host import Host

pytest_plugins = ["campaign", "ended"]
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows" / "api"


class Client:
    """One server and what tests ask of it."""

    def __init__(self, folder: Path, output: Path | None = None) -> None:
        """`output`: a folder that it shares with another one."""
        if "COMFYUI_PATH" not in os.environ:
            pytest.exit("COMFYUI_PATH is not set: run `python3 run.py test api`", returncode=2)
        self.folder, self.output = folder, output or folder / "output"
        self.host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
        self.start()

    def start(self) -> None:
        self.server = Server(self.host, self.folder / "base", self.output, self.folder / "server.log")
        try:
            self.server.wait_ready()
        except BaseException:  # then there is no test that would stop it
            self.stop()
            raise

    def stop(self) -> None:
        self.server.__exit__()

    def kill(self) -> None:
        """As the system does when memory runs out: no warning, no clean-up."""
        self.server.process.kill()
        self.server.process.wait()

    def queue(self, prompt: dict) -> str:
        answer = self.server.request("/prompt", {"prompt": prompt})
        assert not answer.get("node_errors") and "prompt_id" in answer, answer
        return answer["prompt_id"]

    def refused(self, prompt: dict) -> dict:
        answer = self.server.request("/prompt", {"prompt": prompt})
        assert "error" in answer, answer
        return answer

    def interrupt(self) -> None:
        url = f"http://127.0.0.1:{self.server.port}/interrupt"
        urllib.request.urlopen(urllib.request.Request(url, b"{}")).close()

    def wait(self, prompt_id: str, seconds: float = 300) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.server.check_alive()
            if entry := self.server.request(f"/history/{prompt_id}").get(prompt_id):
                return entry
            time.sleep(0.2)
        raise AssertionError(f"no answer within {seconds} s; log: {self.server.log.read_text()[-2000:]}")

    def folder_of(self, file: dict) -> Path:
        """Where a file that a node shows lies."""
        kinds = {"output": self.output, "temp": self.folder / "base" / "temp"}
        return kinds[file["type"]] / file["subfolder"]

    def image_of(self, file: dict) -> np.ndarray:
        """A picture that a node shows, [H, W, 3] uint8."""
        with Image.open(self.folder_of(file) / file["filename"]) as image:
            return np.asarray(image.convert("RGB"))

    def run(self, prompt: dict) -> dict:
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", error_of(entry).get("exception_message")
        return entry["outputs"]


def error_of(entry: dict) -> dict:
    """The execution error or interrupt of a history entry."""
    for name, message in entry["status"]["messages"]:
        if name in ("execution_error", "execution_interrupted"):
            return message | {"event": name}
    return {}


def workflow(name: str, **changes) -> dict:
    """An API workflow of the pack with some inputs changed: `node__input=value`."""
    prompt = copy.deepcopy(json.loads((WORKFLOWS / f"{name}.json").read_text()))
    for key, value in changes.items():
        node, field = key.removeprefix("n").split("__")
        prompt[node]["inputs"][field] = value
    return prompt


def frames_of(path: Path) -> list[np.ndarray]:
    """The frames of a video file, each [H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def report_of(outputs: dict, node: str = "5") -> dict:
    return json.loads(outputs[node]["adastate_report"][0])


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    running = Client(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture
def watcher(client):
    """A client of its own with an open socket."""
    name = uuid.uuid4().hex
    events = Events(client.server.port, name)
    events.name = name
    yield events
    events.close()
