"""The fleet stands apart: the pack knows nothing of it, nor it of the pack, and Ray is in no other room."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from tables import ROOT


def imports(file: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_nothing_of_the_pack_imports_it_nor_ray_and_it_nothing_of_the_pack():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py"], capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split()]
    assert len(files) > 400
    for file in files:
        room = file.relative_to(ROOT).parts[0]
        found = imports(file)
        if room not in ("fleet", "tests", "benchmarks"):
            assert not found & {"fleet", "ray"}, file
        if room == "fleet":
            assert not found & {"torch", "comfy", "nodes", "adastate_core", "folder_paths"}, file


def test_it_is_no_part_of_the_registrys_archive():
    assert "/fleet/" in (ROOT / ".comfyignore").read_text().splitlines()
