"""docs/examples/api_v2.py against a real server behind the official proxy, both packages from PyPI (optional)."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT, frames_of

from tools.host_client import free_port

MISSING = [name for name in ("comfy_sdk", "comfy_api_proxy") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)}: pip install comfy-sdk==0.5.0 comfy-api-proxy==0.1.6"
)
EXAMPLE, WORKFLOWS = ROOT / "docs" / "examples" / "api_v2.py", ROOT / "workflows" / "api"
CUT = ["5.length=2049", '4.filename_prefix="v2/cut"']


@pytest.fixture(scope="module")
def proxy(client, tmp_path_factory):
    """The environment of a client of the API v2: the proxy's address, and no HTTP proxy before this machine's own."""
    port, log = free_port(), tmp_path_factory.mktemp("proxy") / "log"
    server = f"http://127.0.0.1:{client.server.port}"
    command = [sys.executable, "-m", "comfy_api_proxy.cli", "--comfyui", server, "--port", str(port)]
    env = os.environ | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env) as process:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                direct.open(f"http://127.0.0.1:{port}/api/v2/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield env | {"COMFY_BASE_URL": f"http://127.0.0.1:{port}"}
        process.terminate()


def command_of(client, workflow: str, changes: list[str]) -> list[str]:
    """The example's command line, with ComfyUI's own address."""
    given = [part for change in changes for part in ("--set", change)]
    here = f"http://127.0.0.1:{client.server.port}"
    return [sys.executable, str(EXAMPLE), str(WORKFLOWS / f"{workflow}.json"), *given, "--comfyui", here]


@pytest.fixture
def example(client, proxy, tmp_path):
    """Run the example in a folder of its own: its exit status and its lines."""

    def call(workflow: str, *changes: str) -> tuple[int, list[str]]:
        command = command_of(client, workflow, list(changes))
        done = subprocess.run(
            command, cwd=tmp_path, env=proxy, capture_output=True, text=True, timeout=200, check=False
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.splitlines()

    return call


def test_the_video_its_progress_and_its_previews_come_through(client, example, tmp_path):
    status, said = example("long_video", "5.length=57", "5.seed=4711", '4.filename_prefix="v2/whole"')
    assert status == 0 and re.fullmatch(r"job [0-9a-f-]{36}", said[0])
    assert "Written: results/whole_00001_.mp4" in said
    made, there = tmp_path / "results" / "whole_00001_.mp4", client.output / "v2" / "whole_00001_.mp4"
    assert made.read_bytes() == there.read_bytes() and len(frames_of(made)) == 57
    steps = [re.fullmatch(r"node 5: pass (\d+) of 25", line) for line in said]
    assert [step for step in steps if step] and sum(line.endswith(" previews came") for line in said) == 1
    if (report := there.with_name("whole_00001_.report.json")).is_file():
        assert "57 frames in 5 chunks" in "\n".join(said)
        assert (tmp_path / "results" / report.name).is_file()


def test_what_is_refused_says_why_once(example):
    status, said = example("long_video", "5.width=100")
    sentence = "node 5 (AdaStateRollout): width is 100; it must be a multiple of 16, at least 16: try 96"
    assert status == 1 and said == ["refused", sentence]


def test_what_fails_on_the_way_says_why(example):
    status, said = example("hidden_state", '5.positions="absolute"')
    assert status == 1 and said[-1].startswith("failed: positions is 'absolute' with the adaptive anchor")


def test_ctrl_c_stops_the_run_and_leaves_what_was_finished(client, proxy, tmp_path):
    command = command_of(client, "long_video", CUT)
    # what runs in a shell's background inherits that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(command, cwd=tmp_path, env=proxy, stdout=subprocess.PIPE, text=True, **heard) as running:
        for line in running.stdout:
            if (found := re.fullmatch(r"node 5: pass (\d+) of \d+\n", line)) and int(found[1]) > 12:
                break
        running.send_signal(signal.SIGINT)
        said = running.stdout.read()
    assert running.returncode == 130 and said.splitlines()[-1].startswith("canceled; the finished chunks")
    left = {path.name for path in (client.output / "v2").iterdir() if path.name.startswith("cut_")}
    assert {"cut_00001_.mp4", "cut_00001_.state.safetensors"} <= left
    assert 0 < len(frames_of(client.output / "v2" / "cut_00001_.mp4")) < 2049


def test_the_page_names_the_versions_and_the_example():
    page, pins = (ROOT / "docs" / "api.md").read_text(), (ROOT / "requirements-dev.txt").read_text()
    assert "examples/api_v2.py" in page
    for pin in ("comfy-sdk==0.5.0", "comfy-api-proxy==0.1.6"):
        assert pin in page and pin in pins.split() and pin in EXAMPLE.read_text()
