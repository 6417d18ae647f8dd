"""The layer `bounds`: which packages it installs, where, when again, and what runs with them. No network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import run
from tools import lower_bounds, setup_host
from tools.setup_host import Host, SetupError


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    """This interpreter as a host, a cache of its own, and neither of the variables set."""
    monkeypatch.setattr(setup_host, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("ADASTATE_AV_PATHS", raising=False)
    monkeypatch.setattr(lower_bounds, "NEWEST_PYTHON", sys.version_info[:2])
    return Host(tmp_path, Path(sys.executable))


@pytest.fixture
def pip(monkeypatch) -> list[list[str]]:
    """What pip is asked to install; each package becomes a folder with metadata, as pip leaves it."""
    calls = []

    def install(python: Path, arguments: list[str], log: Path) -> None:
        calls.append([each for each in arguments if "==" in each])
        target = Path(arguments[arguments.index("--target") + 1])
        for package in calls[-1]:
            name, _, version = package.partition("==")
            info = target / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.setattr(lower_bounds, "run_pip", install)
    return calls


def test_each_promised_package_has_its_oldest_version():
    found = lower_bounds.lower_bounds("# words\nsafetensors>=0.4.3\nav>=14.2  # why\n\nscikit-x>=1\n")
    assert found == ["safetensors==0.4.3", "av==14.2", "scikit-x==1"]
    promised = (setup_host.ROOT / "requirements.txt").read_text()
    listed = {line.partition(">=")[0] for line in promised.splitlines() if line and line[0] != "#"}
    assert {each.partition("==")[0] for each in lower_bounds.lower_bounds(promised)} == listed


@pytest.mark.parametrize("line", ["kornia", "av<15,>=14.2", "av==14.2", "torch>2"])
def test_a_promise_without_an_oldest_version_is_refused(line):
    with pytest.raises(ValueError, match="each line there is a name, >= and the oldest version"):
        lower_bounds.lower_bounds(f"safetensors>=0.4.3\n{line}\n")


def test_the_files_that_run_are_there():
    for folder, names in lower_bounds.TESTS.items():
        assert all((setup_host.ROOT / "tests" / folder / name).is_file() for name in names)


def test_they_are_installed_once_and_again_when_the_promise_changes(host, pip, tmp_path, monkeypatch):
    promise = tmp_path / "requirements.txt"
    promise.write_text("av>=14.2\n")
    monkeypatch.setattr(lower_bounds, "BOUNDS", promise)
    folder = lower_bounds.ensure_bounds(host)
    assert lower_bounds.ensure_bounds(host) == folder == tmp_path / "cache" / "bounds"
    assert pip == [["av==14.2"]] and lower_bounds.versions(host, folder) == "av 14.2"
    promise.write_text("av>=15.0\nKornia>=0.7.1\n")
    assert lower_bounds.ensure_bounds(host) == folder and len(pip) == 2
    assert lower_bounds.versions(host, folder) == "av 15.0, Kornia 0.7.1"
    assert [path.name for path in folder.parent.iterdir() if path.suffix == ".part"] == []


def test_what_fails_on_the_way_leaves_no_folder(host, monkeypatch):
    def fail(python: Path, arguments: list[str], log: Path) -> None:
        Path(arguments[arguments.index("--target") + 1], "av").mkdir(parents=True)
        raise SetupError("pip failed", code=1)

    monkeypatch.setattr(lower_bounds, "run_pip", fail)
    with pytest.raises(SetupError, match="pip failed"):
        lower_bounds.ensure_bounds(host)
    assert [path.name for path in setup_host.CACHE.iterdir()] == ["setup.lock"]


def test_with_a_host_of_ones_own_nothing_is_installed(host, pip, monkeypatch, capsys):
    monkeypatch.setenv("COMFYUI_PATH", str(host.path))
    assert run.bounds_layers(host) == [] and pip == []
    assert "skipped: COMFYUI_PATH is set" in capsys.readouterr().out


def test_a_newer_python_than_the_packages_skips(host, pip, monkeypatch, capsys):
    monkeypatch.setattr(lower_bounds, "NEWEST_PYTHON", (3, 6))
    assert run.bounds_layers(host) == [] and pip == []
    assert "skipped: the oldest packages were never made for Python 3." in capsys.readouterr().out


def test_named_folders_run_instead_also_with_a_host_of_ones_own(host, pip, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(host.path))
    monkeypatch.setenv("ADASTATE_AV_PATHS", ":".join(map(str, folders)))
    layers = run.bounds_layers(host)
    assert [layer.name for layer in layers] == ["bounds 1 core", "bounds 1 host", "bounds 2 core", "bounds 2 host"]
    assert [layer.front for layer in layers] == [folders[0]] * 2 + [folders[1]] * 2 and pip == []
    monkeypatch.setenv("ADASTATE_AV_PATHS", str(tmp_path / "gone"))
    with pytest.raises(SetupError, match="gone, which is no folder"):
        run.bounds_layers(host)


def test_a_layers_folder_comes_before_the_environments_packages(host, tmp_path, monkeypatch):
    front, tests = tmp_path / "front", tmp_path / "tests" / "some"
    front.mkdir()
    tests.mkdir(parents=True)
    (front / "pytest.py").write_text(
        "import sys\nopen('said', 'w').write(' '.join(sys.argv[2:]))\nraise SystemExit(3)\n"
    )
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "CACHE", tmp_path)
    good, counts, line = run.run_layer(run.Layer("bounds some", "some", ("test_a.py",), front), host, ["-x"])
    assert not good and counts == (0, 0, 0) and line.startswith("bounds some:") and "ended with status 3" in line
    assert (tests / "said").read_text() == "test_a.py -x"


@pytest.mark.quick
def test_which_layers_are_asked_for():
    names, rest = run.chosen_layers([])
    assert names[:2] == ["core", "training"] and names[-1] == "bounds" and rest == []
    assert run.chosen_layers(["bounds", "-k", "x"]) == (["bounds"], ["-k", "x"])
    assert run.chosen_layers(["-k", "x"]) == (names, ["-k", "x"])
    assert "bounds" not in run.chosen_layers(["quick"])[0]
    with pytest.raises(SetupError, match="no folder tests/nonsense .*, bounds, and quick"):
        run.chosen_layers(["nonsense"])
