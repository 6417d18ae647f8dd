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

from tools import addresses

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


def test_classifiers_say_what_was_run():
    """A system or a card is named once somebody has seen the pack run there: README says that no GPU has."""
    found = PROJECT["project"]["classifiers"]
    assert [name for name in found if name.startswith("Operating System")] == ["Operating System :: POSIX :: Linux"]
    if "Nothing was run on a GPU" in (ROOT / "README.md").read_text(encoding="utf-8"):
        assert not [name for name in found if name.startswith("Environment ::")]
    ci = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert ("Nobody has seen this job green yet" in ci) == (len(found) == 2)


def version_fault(changelog: str, version: str) -> str:
    """What is wrong between the changelog's sections and the project's version, or "". Only Unreleased may be newer."""
    sections = re.findall(r"(?m)^## \[([^]]+)\]", changelog)
    released = [tuple(map(int, name.split("."))) for name in sections if name != "Unreleased"]
    here, head = tuple(map(int, version.split("."))), changelog.partition("\n## ")[0]
    if sections.count("Unreleased") > 1 or "Unreleased" in sections[1:]:
        return "Unreleased is the first section, and there is one"
    if released != sorted(set(released), reverse=True):
        return "newest first"
    if here in released:
        return "" if here == released[0] else "a newer version has a section"
    if released and here < released[0]:
        return "a newer version has a section"
    next_one = re.search(r"Unreleased will be (\d+\.\d+\.\d+)", " ".join(head.split()))
    return (
        "" if next_one and next_one[1] == version and sections else "the version has no section, and is not what comes"
    )


def test_changelog_and_version_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version_fault(changelog, PROJECT["project"]["version"]) == ""
    comes = "Unreleased will be 0.2.0."
    for version, text, fault in (
        ("0.1.0", "## [Unreleased]\n## [0.1.0] - 2026-12-01\n", ""),
        ("0.1.0", "## [0.1.0]\n", ""),
        ("0.2.0", f"{comes}\n## [Unreleased]\n## [0.1.0]\n", ""),
        ("0.2.0", "## [Unreleased]\n## [0.1.0]\n", "the version has no section, and is not what comes"),
        ("0.3.0", f"{comes}\n## [Unreleased]\n", "the version has no section, and is not what comes"),
        ("0.1.0", "## [Unreleased]\n## [0.2.0]\n## [0.1.0]\n", "a newer version has a section"),
        ("0.1.0", "## [0.1.0]\n## [Unreleased]\n", "Unreleased is the first section, and there is one"),
        ("0.10.0", "## [0.9.0]\n## [0.10.0]\n", "newest first"),
    ):
        assert version_fault(text, version) == fault, text


def test_the_first_screen_says_that_no_gpu_has_run_it_until_one_has():
    """`run.py bench gpu` leaves its table behind on the machine that has one."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:12]
    measured = (ROOT / "benchmarks" / "results" / "gpu.md").exists()
    assert any("No GPU has run this pack yet" in line for line in first) != measured


def test_a_speed_is_measured_here_or_has_its_source():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.partition("## Which model, how much memory, how fast")[2].partition("\n## ")[0]
    memory, speed = (re.findall(r"(?m)^\| (\w+) \|(.*)\|$", half) for half in part.split("| preset | speed "))
    assert {name for name, _ in memory} - {"preset"} == {name for name, _ in speed} and len(speed) == 6
    for name, row in speed:
        here, elsewhere = (cell.strip() for cell in row.split("|"))
        found = re.findall(r"\(([\w./-]+\.md)\)", here)
        assert all((ROOT / file).is_file() for file in found) and (found or here == "not measured"), name
        assert "frames a second" not in elsewhere or re.search(
            r"on (one \w+|\d+ \w+|a card that is not named) \((.*arXiv \d{4}\.\d{5}|\[.+\]\(https://)", elsewhere
        )


def test_every_table_and_picture_is_in_a_document():
    """A result that nobody is led to, or a picture that nothing shows, is to be linked or to go."""
    documents = [
        *ROOT.glob("*.md"),
        *(one for name in ("docs", "web/docs", "models") for one in (ROOT / name).glob("*.md")),
    ]
    documents += [ROOT / "training" / "README.md", ROOT / "pyproject.toml"]
    texts = {one: one.read_text(encoding="utf-8") for one in documents}
    shown = {(one.parent / link).resolve() for one, text in texts.items() for link in re.findall(r"\]\(([^)#]+)", text)}
    found = [*(ROOT / "docs" / "images").iterdir(), *(ROOT / "web" / "docs" / "images").iterdir()]
    found += [*(ROOT / "benchmarks" / "results").glob("*.md")]
    found += [one for kind in ("md", "png") for one in (ROOT / "training" / "results").rglob(f"*.{kind}")]
    names = {one: one.relative_to(ROOT).as_posix() for one in found}
    assert len(found) > 60
    assert [
        name for one, name in names.items() if one not in shown and not any(name in text for text in texts.values())
    ] == []


def test_addresses_are_those_of_the_one_setting():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert addresses.written(text) == text, "run `python -m tools.addresses`"
    assert PROJECT["project"]["urls"]["Repository"] == addresses.REPOSITORY
    assert PROJECT["tool"]["comfy"]["PublisherId"] == addresses.PUBLISHER
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("To be made")[2].partition("\n## ")[0]
    for what, address in addresses.TO_BE_MADE.items():
        assert re.search(rf"(?m)^- {what}\b.*: {re.escape(address)}$", listed), f"CONTRIBUTING lists {what}: {address}"
    moved = addresses.written(text.replace(addresses.ORGANISATION, "somebody-else"))
    assert moved == text
    with pytest.raises(ValueError, match="Icon 0 times"):
        addresses.written(text.replace("\nIcon =", "\nIcons ="))


def test_no_other_file_knows_the_organisation():
    """Where it stood a second time it would be forgotten. The tests and CONTRIBUTING are held to the setting above."""
    done = subprocess.run(["git", "-C", ROOT, "grep", "-lI", addresses.ORGANISATION], capture_output=True, text=True)
    assert set(done.stdout.split()) <= {"pyproject.toml", "CONTRIBUTING.md", "tools/addresses.py"}


def test_ci_tries_windows_and_macos_and_says_that_nobody_has_seen_it():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    elsewhere = jobs["elsewhere"]
    assert elsewhere["strategy"]["matrix"]["system"] == ["windows-latest", "macos-latest"]
    assert "not seen green yet" in elsewhere["name"] and elsewhere["continue-on-error"] is True
    commands = [step["run"].split() for step in elsewhere["steps"] if "run" in step]
    assert all(command[:2] == ["python", "run.py"] for command in commands)
    layers = {command[3]: command[4:] for command in commands if command[2] == "test"}
    assert set(layers) == {"core", "runpy", "host"} and layers["core"] == layers["runpy"] == []
    for layer, files in layers.items():
        assert (ROOT / "tests" / layer / "pytest.ini").is_file()
        assert all((ROOT / "tests" / layer / file).is_file() for file in files)
    assert jobs["test"]["steps"][-1]["run"] == "python3 run.py test" and "continue-on-error" not in jobs["test"]


def test_the_bug_form_asks_for_the_self_test():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    asked = fields["selftest"]
    assert asked["validations"]["required"] is True
    assert "AdaState Self Test" in asked["attributes"]["description"]
    assert "run.py selftest" in asked["attributes"]["description"]
    assert form["name"] and form["description"] and all(field["attributes"]["label"] for field in fields.values())


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
