"""The command itself, as a user has it: its arguments, Ctrl-C, going on, hosts that run already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from scripted_host import Script, ScriptedHost
from tables import ROOT, table

from fleet.__main__ import check, folder_of, main, parser
from fleet.cluster import two_signals
from fleet.errors import FleetError
from fleet.going_on import frames_in


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


def test_two_signals_are_two_steps_and_a_third_is_an_end():
    called = []
    before = signal.getsignal(signal.SIGINT)  # ignored, where the suite runs in the background
    with two_signals(lambda: called.append("stop"), lambda: called.append("end")):
        for expected in (["stop"], ["stop", "end"]):
            os.kill(os.getpid(), signal.SIGINT)
            assert called == expected
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


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


def test_a_driver_that_is_killed_and_then_a_ctrl_c_lose_nothing(tmp_path):
    """kill -9 of a driver; the next one ends the prompts that run on, goes on from what they left, and is stopped."""
    script = Script(tmp_path / "output", {"v1": ["wait"], "v2": ["wait"]})
    command = Command(tmp_path, [ScriptedHost(script, 0), ScriptedHost(script, 1)])
    with command.start() as first:
        command.when_begun(2, first)
        first.kill()
    with command.start() as second:
        command.when_begun(4, second)
        second.send_signal(signal.SIGINT)
        said = second.stdout.read()
    assert second.returncode == 1 and "every worker finishes its chunk and keeps a state" in said
    assert "Stopped: 0 rows are finished, 3 are not; the same command goes on with them." in said
    for name in ("v1", "v2"):
        newest = command.output / "into" / name / f"{name}_00002_.state.safetensors"
        assert frames_in(newest) == 8  # 4 of each try
    assert not (command.into / "driver.json").exists() and not (command.output / "into" / "v3").exists()
