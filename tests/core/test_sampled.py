"""Samples of a test's cases: each case is in one of them, and what is chosen by name runs."""

import os
import subprocess
import sys
from pathlib import Path

from sampled import kept

HERE = str(Path(__file__).resolve().parent)

SUITE = """
import pytest
@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", range(7))
def test_many(case): pass
@pytest.mark.sampled(3, offset=1)
@pytest.mark.parametrize("case", range(7))
def test_as_many(case): pass
def test_one(): pass
"""


def test_each_case_is_in_one_sample():
    for n in (2, 3, 5):
        for offset in (0, 1):
            found = [[i for i in range(20) if kept(i, n, offset, str(wish))] for wish in range(n)]
            assert sorted(sum(found, [])) == list(range(20)) and all(len(each) >= 20 // n for each in found)
    assert all(kept(i, 3, 0, "all") for i in range(5))


def test_pytest_runs_the_sample_or_what_is_named(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)

    def ran(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "sampled", "-p", "no:cacheprovider", *arguments]
        env = os.environ | {"PYTHONPATH": HERE, "ADASTATE_CASES": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return [line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if " PASSED" in line]

    assert ran() == [*(f"test_many[{i}]" for i in (0, 3, 6)), *(f"test_as_many[{i}]" for i in (1, 4)), "test_one"]
    assert ran("-k", "4") == ["test_many[4]", "test_as_many[4]"]
