"""What tests of compiled functions need: a C++ compiler, which the pack itself does without."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

NAMES = ("g++", "clang++", "c++")


def compiler() -> str | None:
    """The C++ compiler that torch would take, if there is one, and the headers of Python that it reads."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return None
    return next((found for name in (os.environ.get("CXX"), *NAMES) if name and (found := shutil.which(name))), None)


# where ADASTATE_NEEDS_COMPILER is set, as in .ci/run, these tests are never skipped
needs_compiler = pytest.mark.skipif(
    compiler() is None and not os.environ.get("ADASTATE_NEEDS_COMPILER"),
    reason="no C++ compiler, or no Python.h: install both (Debian: apt install g++ python3-dev) to test what is compiled",
)
