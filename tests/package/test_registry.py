"""What the registry reads and what its scan looks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_project_is_what_the_registry_takes():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower() and project["description"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (ROOT / project["license"]["file"]).is_file() and project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"] and comfy["DisplayName"] and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_requirements_are_the_same_for_both_readers():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    assert listed == set(PROJECT["project"]["dependencies"])
    assert not [line for line in listed if line.startswith("torch")], "it would replace the user's own"


def test_icon_and_banner_are_in_the_repository():
    start = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    sizes = {}
    for name in ("Icon", "Banner"):
        url = PROJECT["tool"]["comfy"][name]
        assert url.startswith(start)
        with Image.open(ROOT / url.removeprefix(start)) as picture:
            assert picture.format == "PNG"
            sizes[name] = picture.size
    assert sizes["Icon"] == (400, 400) and sizes["Banner"][0] * 9 == sizes["Banner"][1] * 21


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("exec('1')", "S102"),
        ("eval('1')", "S307"),
        ("import subprocess", "TID251"),
        ("import os\n\nos.system('ls')", "TID251"),
        ("import urllib.request", "TID251"),
        ("import pickle\n\npickle.load(open('x', 'rb'))", "S301"),
        ("print(1)", "T201"),
    ],
)
@pytest.mark.parametrize("place", ["nodes/x.py", "nodes/host/x.py", "adastate_core/x.py", "__init__.py"])
def test_the_style_check_refuses_in_the_pack_what_the_scan_would(line, rule, place):
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    done = subprocess.run(
        [*ruff, "--stdin-filename", place, "-"], input=line + "\n", capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and f" {rule} " in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="the workflow asks git")
def test_only_another_version_is_published(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    steps = workflow["jobs"]["publish"]["steps"]
    script = next(step["run"] for step in steps if step.get("id") == "version")
    text = (ROOT / "pyproject.toml").read_text()
    here = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*here, "init", "-q"], check=True)
    found, before = [], "0" * 40
    for number, content in enumerate(
        (text, text + "# more\n", re.sub(r'(?m)^version = ".*"', 'version = "99.0.0"', text))
    ):
        (tmp_path / "pyproject.toml").write_text(content)
        subprocess.run([*here, "add", "-A"], check=True)
        subprocess.run([*here, "commit", "-qm", str(number)], check=True)
        answers = tmp_path.with_name(f"answers{number}")
        answers.touch()
        env = os.environ | {"BEFORE": before, "GITHUB_OUTPUT": str(answers)}
        subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=env, check=True, capture_output=True)
        found.append(answers.read_text().strip())
        before = subprocess.run([*here, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert found == ["changed=true", "", "changed=true"]
