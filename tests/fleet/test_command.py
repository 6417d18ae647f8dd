"""The command itself, as a user has it: its arguments, Ctrl-C, going on, hosts that run already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from scripted_host import Script, ScriptedHost
from tables import ROOT, lines_of, table

from fleet.__main__ import check, folder_of, main, parser
from fleet.errors import FleetError


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--into", "x", "--host-output", "y"], "--host-output goes with --host"),
        (["--into", "x", "--host", "http://a", "--workers", "2"], "--host is a worker each"),
        (["--into", "x", "--host", "http://a", "--host", "http://a/"], "--host names one host twice"),
        (["--into", "x", "--host", "a:8188"], "--host is a:8188; it must be an address"),
        (["--into", "s3://b/x", "--host", "http://a"], "needs --host-output"),
        (["--into", "x", "--work", "y"], "--work goes with an address"),
        (["--into", "s3://b/x", "--address", "auto"], "needs --work, a folder that all machines of the cluster share"),
        (["--into", "x", "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--into", "x", "--tries", "0"], "--tries is 0; it must be at least 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_told(arguments, told):
    with pytest.raises(FleetError) as found:
        check(parser().parse_args(["batch.jsonl", *arguments]))
    assert told in str(found.value)


def test_where_a_batch_lies(tmp_path):
    folder = lambda *given: folder_of(parser().parse_args(["b.jsonl", *given]))  # noqa: E731
    assert folder("--into", str(tmp_path / "x")) == tmp_path / "x"
    assert folder("--into", "s3://b/x", "--work", str(tmp_path / "w")) == tmp_path / "w"
    assert folder("--into", "s3://b/x") == folder("--into", "s3://b/x") != folder("--into", "s3://b/y")


def test_a_bad_table_ends_it_before_anything_is_started(tmp_path, capsys):
    path = table(tmp_path, [{}, {"5.seed": "x"}])
    assert main([str(path), "--into", str(tmp_path / "into")]) == 2
    assert capsys.readouterr().out.splitlines()[1].startswith("line 2: 5.seed") and not (tmp_path / "into").exists()


def test_check_says_what_is_to_be_made(tmp_path, capsys):
    path = table(tmp_path, [{"5.length": 9}, {"5.length": 33}])
    assert main([str(path), "--into", str(tmp_path / "into"), "--check"]) == 0
    assert "2 rows, 0 of them finished before; 42 frames to make." in capsys.readouterr().out


class Command:
    """`python -m fleet` on hosts that run in this process."""

    def __init__(self, tmp_path, hosts) -> None:
        self.path = table(tmp_path, [{"5.length": 97}, {"5.length": 97}, {"5.length": 97}])
        self.into, self.hosts, self.output = tmp_path / "into", hosts, hosts[0].script.output

    def start(self) -> subprocess.Popen:
        given = [each for host in self.hosts for each in ("--host", host.url)]
        command = [sys.executable, "-m", "fleet", self.path, "--into", self.into, *given, "--host-output", self.output]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)

    def when_begun(self, count: int, process: subprocess.Popen) -> None:
        while len(list(self.output.glob("into/*/*.try"))) < count:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)


def test_ctrl_c_keeps_states_and_kill_9_of_the_driver_loses_nothing(tmp_path):
    """A Ctrl-C, then a driver that is killed, then one that finishes; the hosts run on through all of it."""
    acts = {f"v{number}": ["wait", "wait", "whole"] for number in (1, 2, 3)}
    script = Script(tmp_path / "output", acts)
    command = Command(tmp_path, [ScriptedHost(script, 0), ScriptedHost(script, 1)])
    with command.start() as first:
        command.when_begun(2, first)
        first.send_signal(signal.SIGINT)
        said = first.stdout.read()
    assert first.returncode == 1 and "every worker finishes its chunk and keeps a state" in said
    assert "0 rows are finished, 3 are not; the same command goes on with them" in said.replace("Stopped: ", "")
    states = sorted(path.parent.name for path in command.output.glob("into/*/*.state.safetensors"))
    assert len(states) == 2
    with command.start() as second:
        command.when_begun(4, second)
        second.kill()
    with command.start() as third:
        said = third.stdout.read()
    told = {each["name"]: each for each in lines_of(command.into / "results.jsonl")}
    assert third.returncode == 0, said
    assert {each["outcome"] for each in told.values()} == {"finished"} and len(told) == 3
    for name in states:
        # 4 frames of each try that was stopped: by Ctrl-C, and when the third driver found the second one's prompts
        parts = json.loads(open(told[name]["file"]).read())
        assert parts[0] == [0, 4] and parts[-1][1] == 97 and [b for _, b in parts[:-1]] == [a for a, _ in parts[1:]]
    assert told["v1"]["file"].startswith(str(command.output / "into"))
