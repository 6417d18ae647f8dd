"""Old and new packages together, on this host and on a newer one: the tests that use them, with every two versions of two packages.

The newer host is named by ADASTATE_NEWER_HOST, its folder, and ADASTATE_NEWER_PYTHON, the interpreter that runs it; without them
its rows are left out, and that is said. All of `bounds` runs with the oldest packages, and the rest of the suite with the newest.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.pairs import pairwise

from tools import lower_bounds
from tools.version_rows import HOSTS, LATER, NEWER_AV, ensure_version, levels, rows

TESTS = Path(__file__).resolve().parents[1]
ROWS = rows(pairwise)
# files, videos and plots in about a minute: of lower_bounds.TESTS those that use most of what a version may change
CHECKED = {
    "core": ["test_video_join.py", "test_codecs.py", "test_frame_files.py", "test_metrics.py", "test_checkpoints.py"],
    "host": ["test_frames.py", "test_analysis.py", "test_codecs_in_rollouts.py"],
}
# imports each as the pack does, and says which one it got
FOUND = """
import importlib, importlib.metadata as m, json, sys
for name in ("safetensors.torch", "av", "matplotlib.figure", "kornia.metrics", "PIL.Image", "imageio.v3"):
    importlib.import_module(name)
print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Runner:
    """A host and the interpreter that runs it."""

    python: Path
    host: Path

    def run(self, command: list[str], row: dict[str, str], number: int, folder: Path) -> subprocess.CompletedProcess:
        """Python with a row's packages in front of the environment's."""
        named = [ensure_version(self.python, name, version) for name, version in row.items() if name != "host"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("ADASTATE_")}
        env |= {
            "PYTHONPATH": os.pathsep.join(map(str, named)),
            "COMFYUI_PATH": str(self.host),
            "ADASTATE_CASES": str(number),
        }
        return subprocess.run([str(self.python), *command], cwd=folder, env=env, capture_output=True, text=True)


def runner(host: str) -> Runner | None:
    """The named one of HOSTS, or None without the variables that say where it is."""
    names = ("COMFYUI_PYTHON", "COMFYUI_PATH") if host == "this" else ("ADASTATE_NEWER_PYTHON", "ADASTATE_NEWER_HOST")
    given = {"COMFYUI_PYTHON": sys.executable} | dict(os.environ)
    return Runner(*(Path(given[name]) for name in names)) if all(given.get(name) for name in names) else None


def same(version: str, other: str) -> bool:
    """Whether these are one version: 10.1 is 10.1.0."""
    numbers = [list(map(int, each.split("."))) for each in (version, other)]
    return len({tuple(each + [0] * (4 - len(each))) for each in numbers}) == 1


def check_row(row: dict[str, str], number: int, machine: Runner, trial) -> None:
    """That the interpreter gets the row's versions, and that the tests pass with them."""
    done = machine.run(["-c", FOUND, *levels_of(row)], row, number, TESTS)
    assert done.returncode == 0, f"{row}: {done.stderr[-1500:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(same(found[name], version) for name, version in levels_of(row).items()), (row, found)
    for layer, files in CHECKED.items():
        done = machine.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], row, number, TESTS / layer)
        assert done.returncode == 0, f"{row}, {layer}: {done.stdout[-1500:]}"
        # lines of dots, since two -q say no more
        trial.saw(
            **{
                f"{layer}_tests": sum(
                    line.partition(" ")[0].count(".") for line in done.stdout.splitlines() if line[:1] == "."
                )
            }
        )


def levels_of(row: dict[str, str]) -> dict[str, str]:
    return {name: version for name, version in row.items() if name != "host"}


@pytest.mark.parametrize("host", HOSTS)
def test_versions(campaign, host):
    mine = [row for row in ROWS if row["host"] == host]
    machine = runner(host)
    for trial in campaign(f"versions of six packages together, {host} host", full=len(mine), sample=0):
        if machine is None:
            pytest.skip(
                f"{len(mine)} rows of the {host} host: name it with ADASTATE_NEWER_HOST and ADASTATE_NEWER_PYTHON"
            )
        with trial:
            check_row(mine[trial.number], trial.number, machine, trial)


def test_any_two_versions_of_two_packages_and_each_with_each_host_are_in_a_row():
    promised = levels(lower_bounds.BOUNDS.read_text(encoding="utf-8"))
    assert set(LATER) == set(promised) and len(ROWS) < 16
    wanted = promised | {"host": list(HOSTS)}
    for (name, versions), (other, others) in itertools.combinations(wanted.items(), 2):
        there = {(row[name], row[other]) for row in ROWS}
        able = {
            (one, two)
            for one, two in itertools.product(versions, others)
            if (name, two) != ("av", "newer") or one == NEWER_AV
        }
        assert there == able, f"{name} and {other}"


def test_the_versions_of_a_package_rise_and_each_is_its_own():
    for name, versions in levels(lower_bounds.BOUNDS.read_text(encoding="utf-8")).items():
        numbers = [tuple(map(int, version.split("."))) for version in versions]
        assert numbers == sorted(set(numbers)), name
    assert same("10.1", "10.1.0") and not same("10.1", "10.1.1") and not same("14.2", "15.2")


def test_what_is_checked_is_there_and_a_part_of_what_bounds_checks():
    for layer, files in CHECKED.items():
        assert set(files) <= set(lower_bounds.TESTS[layer]) and all((TESTS / layer / name).is_file() for name in files)
