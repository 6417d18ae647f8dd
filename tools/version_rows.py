"""Which versions of the pack's packages are tried together, and with which host: few rows such that any two versions of any two
packages, and each with each host, are together in one of them.

The oldest of each is what requirements.txt promises; one from the middle and the newest that Python 3.11 could install are written
here. Standard library only, but for `pairwise`, which is the tests' own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools import setup_host
from tools.lower_bounds import BOUNDS, lower_bounds
from tools.setup_host import python_version, run_pip, say

# Between imageio's oldest and its newest there is none.
LATER = {
    "safetensors": ("0.5.3", "0.8.0"),
    "av": ("16.0.1", "18.1.0"),
    "matplotlib": ("3.10.3", "3.11.2"),
    "kornia": ("0.8.1", "0.9.0"),
    "Pillow": ("11.3.0", "13.0.0"),
    "imageio": ("2.38.1",),
}
SEED = 9  # of sixty, one that gives the fewest rows
HOSTS = ("this", "newer")
# ComfyUI 0.33 says av>=16.0.0 and takes names from PyAV that 16.0.1 has not, so it does not start with any but the newest here
NEWER_AV = LATER["av"][-1]

Pairwise = Callable[[Mapping[str, Sequence[str]], Callable[..., bool], int], list[dict[str, str]]]


def levels(requirements: str) -> dict[str, list[str]]:
    """The versions of each package that requirements.txt promises, oldest first. KeyError for one that has no entry in LATER."""
    oldest = dict(bound.split("==") for bound in lower_bounds(requirements))
    return {name: [version, *LATER[name]] for name, version in oldest.items()}


def rows(pairwise: Pairwise) -> list[dict[str, str]]:
    """{package: version, "host": which} of each row, always the same: those of any two versions, of which this host takes over what
    the newer one cannot start with, and behind them some of the newer one with every version of the others."""
    versions = levels(BOUNDS.read_text(encoding="utf-8"))
    made = pairwise({**versions, "host": HOSTS}, lambda a, b: False, SEED)
    starts = [row["host"] == "this" or row["av"] == NEWER_AV for row in made]
    kept = [row for row, good in zip(made, starts, strict=True) if good]
    moved = [row | {"host": "this"} for row, good in zip(made, starts, strict=True) if not good]
    most = max(map(len, versions.values()))
    more = [{name: each[min(i, len(each) - 1)] for name, each in versions.items()} for i in range(most)]
    return kept + moved + [row | {"av": NEWER_AV, "host": "newer"} for row in more]


def ensure_version(python: Path, name: str, version: str) -> Path:
    """A folder with this one version, for an interpreter like `python`; installed once. SetupError if pip finds no wheel."""
    tag = "".join((python_version(python) or "").split(".")[:2])
    target = setup_host.CACHE / "campaign" / "versions" / f"{name}-{version}-{tag}"
    if target.is_dir():
        return target
    say(f"Installing {name} {version} into {target}, once.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with setup_host.setup_lock(), setup_host.temporary_folder("versions-") as folder:
        new, log = folder / "new", setup_host.CACHE / "setup-versions.log"
        options = ["install", "--no-deps", "--only-binary", ":all:", "--target", str(new)]
        run_pip(python, [*options, f"{name}=={version}"], log)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
    return target
