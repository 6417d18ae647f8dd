"""docs/api.md, run: every command in its order, every answer compared; and what batch.py says of prompts that fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "api.md"
BATCH = ROOT / "docs" / "examples" / "batch.py"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEPT = ("keep_00001_.mp4", "keep_00002_.mp4")
END = "\x1e"


def frames(file: Path) -> int:
    with av.open(str(file)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the checkout to the page's commands, and that they may write to."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("workflows", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="the page uses curl and jq")
def test_the_page_says_what_the_server_does(client, checkout):
    blocks = BLOCK.findall(PAGE.read_text())
    commands = [text for kind, text in blocks if kind == "bash"]
    assert len(commands) > 12 and {kind for kind, _ in blocks} == {"bash", "json"}
    script = "set -eu\n" + "".join(f"{text}\nprintf '\\036'\n" for text in commands)
    (checkout / "page.sh").write_text(script)
    env = os.environ | {"SERVER": f"http://127.0.0.1:{client.server.port}", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "page.sh"], cwd=checkout, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\nafter: {done.stdout[-1500:]}"
    answers = done.stdout.split(END)[:-1]
    assert len(answers) == len(commands)
    said = iter(zip(commands, answers, strict=True))
    command = answer = ""
    for kind, text in blocks:
        if kind == "bash":
            command, answer = next(said)
        else:
            assert answer.strip(), f"nothing came of\n{command}\n{done.stderr}"
            assert json.loads(answer) == json.loads(text), command
    results = checkout / "results"
    for name in ("video_7_00001_.mp4", "video_8_00001_.mp4", "curl_7_00001_.mp4", "curl_8_00001_.mp4"):
        assert frames(results / name) == 33
    for kept, whole in (("video_9_00001_.mp4", "video_9_00002_.mp4"), ("long_kept.mp4", "long_whole.mp4"), KEPT):
        assert 0 < frames(results / kept) < 105 == frames(results / whole)
        assert (frames(results / kept) - 9) % 12 == 0, "whole chunks"
    assert (results / "curl_7_00001_.mp4").read_bytes() != (results / "curl_8_00001_.mp4").read_bytes()


def batch(client, folder: Path, *arguments: str) -> tuple[int, str]:
    """The script's exit status and what it says, run without any package beside Python's own."""
    command = [sys.executable, "-I", "-S", str(BATCH), "--server", f"http://127.0.0.1:{client.server.port}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_batch_goes_on_after_what_was_refused_and_says_why(client, tmp_path):
    one = ("run", str(ROOT / "workflows/api/long_video.json"), "--seeds", "3", "--prefix", "batch/odd")
    status, said = batch(client, tmp_path, *one, "--set", "5.width=100")
    sentence = "node 5 (AdaStateRollout): width is 100; it must be a multiple of 16, at least 16: try 96"
    assert status == 1 and said.splitlines() == ["seed 3 was refused", sentence]
    status, said = batch(client, tmp_path, *one, "--set", '1.unet_name="absent.safetensors"')
    assert status == 1 and "node 1 (UNETLoader): Value not in list: unet_name: 'absent.safetensors' not in" in said
    status, said = batch(client, tmp_path, *one, "--set", "5.length=9", "--set", "4.keep_state=false")
    assert status == 0 and frames(tmp_path / "results" / "odd_3_00001_.mp4") == 9
    status, said = batch(client, tmp_path, "resume", one[1], "--seed", "3", "--prefix", "batch/odd")
    assert status == 1 and "there is no state of batch/odd_3" in said


def test_a_prompt_that_was_taken_out_of_the_queue_is_not_waited_for(client, tmp_path):
    first = client.queue(json.loads((ROOT / "workflows/api/long_video.json").read_text()))
    command = [sys.executable, str(BATCH), "--server", f"http://127.0.0.1:{client.server.port}"]
    run = [*command, "run", str(ROOT / "workflows/api/long_video.json"), "--seeds", "4", "--prefix", "batch/out"]
    with subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as waiting:
        prompt_id = waiting.stdout.readline().split()[-1]
        for each in (prompt_id, first):
            subprocess.run([*command, "stop", each], check=True)
        said = waiting.stdout.read().splitlines()[-1]
    assert waiting.returncode == 1 and said == "seed 4: taken out of the queue: no file"
    assert client.wait(first)["status"]["status_str"] == "error"
