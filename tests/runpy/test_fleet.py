"""`run.py fleet`: its own environment, and what it starts with which variables. No network, no Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import run
from tools import setup_fleet, setup_host
from tools.setup_host import Host


@pytest.fixture
def installed(tmp_path, monkeypatch) -> list[str]:
    """The lists that pip is asked to install into an environment whose interpreter is a link to this one."""
    lists: list[str] = []

    def make(folder: Path) -> None:
        python = setup_host.venv_python(folder)
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)

    def install(python: Path, arguments: list[str], log: Path) -> None:
        assert python == setup_host.venv_python(tmp_path / "cache" / "fleet-env")
        lists.append(arguments[-1])

    monkeypatch.setattr(setup_host, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(setup_fleet, "make_venv", make)
    monkeypatch.setattr(setup_fleet, "run_pip", install)
    # the interpreter that the link leads to may have none, as on a bare machine; a real environment has
    monkeypatch.setattr(setup_host, "has_pip", lambda python: python.exists())
    return lists


def test_it_is_made_once_and_again_when_a_list_changes(installed, tmp_path, monkeypatch):
    wanted = setup_fleet.ROOT / "fleet" / "requirements.txt"
    python = setup_fleet.ensure_fleet()
    assert setup_fleet.ensure_fleet() == python and installed == [str(wanted)]
    setup_fleet.ensure_fleet(setup_fleet.TESTED)
    assert installed == [str(wanted), str(setup_fleet.TESTED)]
    monkeypatch.setattr(setup_fleet, "python_version", lambda python: "3.99")
    setup_fleet.ensure_fleet()
    assert installed == [str(wanted), str(setup_fleet.TESTED), str(wanted)]


def test_what_pip_failed_on_is_installed_by_the_next_call(installed, monkeypatch):
    def fail(python: Path, arguments: list[str], log: Path) -> None:
        raise setup_host.SetupError("pip failed", code=1)

    with monkeypatch.context() as broken:
        broken.setattr(setup_fleet, "run_pip", fail)
        with pytest.raises(setup_host.SetupError, match="pip failed"):
            setup_fleet.ensure_fleet()
    setup_fleet.ensure_fleet()
    assert len(installed) == 1


def test_no_list_of_the_fleet_is_the_hosts():
    """Ray never comes into ComfyUI's environment."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert "ray" not in (setup_fleet.ROOT / name).read_text().replace("array", "").split()
    for path in (setup_fleet.REQUIREMENTS, setup_fleet.TESTED, setup_fleet.DASHBOARD):
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert lines and all("==" in line for line in lines), path


@pytest.mark.parametrize(
    ("arguments", "own_host", "dashboard"),
    [
        (["a.jsonl", "--into", "x"], True, False),
        (["a.jsonl", "--into", "x", "--dashboard"], True, True),
        (["a.jsonl", "--into", "x", "--host=http://a"], False, False),
        (["a.jsonl", "--into", "x", "--address", "auto"], False, False),
        (["--help"], False, False),
    ],
)
def test_the_host_is_set_up_only_where_workers_are_started_here(monkeypatch, tmp_path, arguments, own_host, dashboard):
    asked, started = [], []
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(run, "ensure_ready", lambda: asked.append(1) or Host(tmp_path, tmp_path / "python"))
    monkeypatch.setattr(run, "ensure_fleet", lambda *also: asked.append(also) or Path("/fleet/python"))
    monkeypatch.setattr(run.os, "execve", lambda program, command, env: started.append((program, command, env)))
    with pytest.raises(AssertionError):
        run.fleet(arguments)
    ((program, command, env),) = started
    assert program == "/fleet/python" and command == ["/fleet/python", "-m", "fleet", *arguments]
    assert env["PYTHONPATH"] == str(run.ROOT) and asked == [
        *([1] if own_host else []),
        (run.DASHBOARD,) if dashboard else (),
    ]
    if own_host:
        assert env["COMFYUI_PATH"] == str(tmp_path) and env["COMFYUI_PYTHON"] == str(tmp_path / "python")
    else:
        assert "COMFYUI_PATH" not in env
