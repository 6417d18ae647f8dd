"""What the registry would get: the archive, unpacked into a bare host, is the whole pack and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tools.build_archive import build, kept
from tools.host_client import PACK_NAME, Server
from tools.setup_host import Host

ROOT = Path(__file__).resolve().parents[2]
MOST_PICTURES = 1_500_000  # bytes of the help pages' pictures: everybody who installs the pack loads them
MOST_BYTES = 50_000_000  # no limit of the registry is known; this is what an installation should not take longer than


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("archive") / "node.zip"
    build(target)
    return target


@pytest.fixture(scope="module")
def pack(archive) -> Path:
    """The archive in the custom_nodes of a base folder that has nothing else."""
    folder = archive.parent / "base" / "custom_nodes" / PACK_NAME
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def server(pack):
    if "COMFYUI_PATH" not in os.environ:
        pytest.exit("COMFYUI_PATH is not set: run `python3 run.py test package`", returncode=2)
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    folder = pack.parents[2]
    with Server(host, pack.parents[1], folder / "output", folder / "server.log", linked=False) as running:
        running.wait_ready()
        yield running


def fetched(server: Server, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:
        return answer.read()


def stems(folder: Path, pattern: str) -> set[str]:
    return {path.stem for path in folder.glob(pattern)}


def test_the_archive_holds_the_pack_and_nothing_else(archive, pack):
    tops = {path.name for path in pack.iterdir()}
    code = {"__init__.py", "nodes", "adastate_core"}
    data = {"models", "workflows", "web", "locales"}
    about = {
        "pyproject.toml",
        "requirements.txt",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    }
    documents = {"docs", "benchmarks", "training"}
    assert tops == code | data | about | documents
    for folder in documents:
        assert {path.suffix for path in (pack / folder).rglob("*") if path.is_file()} == {".md"}, folder
    assert stems(pack / "web" / "docs", "*.md") == stems(ROOT / "web" / "docs", "*.md") != set()
    assert stems(pack / "workflows", "*.json") == stems(ROOT / "workflows", "*.json") != set()
    for folder in ("nodes", "adastate_core"):
        assert stems(pack / folder, "**/*.py") == stems(ROOT / folder, "**/*.py")
    assert archive.stat().st_size < MOST_BYTES


def test_every_document_that_readme_points_to_is_in_the_archive(pack):
    text = (pack / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", text)
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"(?m)^#+ (.+)$", text)
    }
    assert {link[1:] for link in found if link.startswith("#")} <= headings
    links = {link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")}
    assert {"docs/systems.md", "docs/memory.md", "docs/design-notes.md", "training/README.md", "SECURITY.md"} <= links
    assert [link for link in links if not (pack / link).is_file()] == []


def test_the_help_pages_pictures_are_in_the_archive(pack):
    docs, shown = pack / "web" / "docs", set()
    for page in docs.glob("*.md"):
        found = re.findall(r"!\[.+?\]\((images/[^)]+)\)", page.read_text(encoding="utf-8"))
        assert found, f"{page.name} has no picture"
        shown.update(docs / name for name in found)
    assert shown == set((docs / "images").iterdir()), "each picture is there, and none that no page shows"
    for path in shown:
        with Image.open(path) as picture:
            assert picture.width <= 640
            picture.load()
    assert sum(path.stat().st_size for path in shown) < MOST_PICTURES


def test_the_same_files_give_the_same_bytes(tmp_path):
    made = []
    for name in ("a", "b"):
        root = tmp_path / name
        for file in ("z.py", "b/a.py", "docs/x", ".comfyignore", "__pycache__/z.pyc"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(file if file != ".comfyignore" else "/docs/\n")
        os.utime(root / "z.py", (name == "a", 10**9))
        assert build(tmp_path / f"{name}.zip", root) == [".comfyignore", "b/a.py", "z.py"]
        made.append((tmp_path / f"{name}.zip").read_bytes())
    assert made[0] == made[1]


@pytest.mark.skipif(shutil.which("git") is None, reason="git says what is right here")
@pytest.mark.parametrize(
    "lines",
    [
        (ROOT / ".comfyignore").read_text().splitlines(),
        ["docs/", "*.txt", "!keep.txt"],
        ["/docs/", "a?.py", "# *", "", "x[0-9].md"],
        ["**/deep/*.txt", "web/**", "!/README.md", "b[!1]"],
        ["deep", "/web/docs/*.md", "\\#odd", "*/one/"],
    ],
)
def test_ignore_lines_mean_what_git_takes_them_for(tmp_path, lines):
    names = [
        "README.md", "run.py", "keep.txt", "docs/a.md", "web/docs/a.md", "web/docs/b.txt", "web/keep.txt", "a1.py",
        "web/a2.py", "x1.md", "x12.md", "n/deep/c.txt", "n/deep/m/c.txt", "deep/c.txt", "b1", "b2", "#odd", "n/one/z",
        "tests/t.py", "n/tests/t.py", "tools/t.py", ".ci/run", "nodes/docs", "docs2/x",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rules = tmp_path / "rules"
    rules.write_text("\n".join(lines))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "--", *names], check=True)
    command = ["git", "-C", tmp_path, "ls-files", "-z", "-ci", f"--exclude-from={rules}"]
    ignored = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    assert set(kept(names, lines)) == set(names) - set(ignored)


def test_every_node_loads_from_the_archive(server):
    written = set(re.findall(r'node_id="(\w+)"', "".join(p.read_text() for p in (ROOT / "nodes").glob("*.py"))))
    info = json.loads(fetched(server, "/object_info"))
    mine = {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert mine == written and len(mine) > 20
    assert not [line for line in server.log.read_text().splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
    for name in ("AdaStateRollout", "AdaStateVideoMetrics"):
        assert fetched(server, f"/extensions/{PACK_NAME}/docs/{name}.md").startswith(b"# ")


def test_the_workflows_are_templates(server):
    listed = json.loads(fetched(server, "/workflow_templates"))[PACK_NAME]
    assert set(listed) == stems(ROOT / "workflows", "*.json")
    for name in listed:
        path = f"/api/workflow_templates/{PACK_NAME}/{urllib.parse.quote(name)}"
        assert json.loads(fetched(server, f"{path}.json")) == json.loads((ROOT / f"workflows/{name}.json").read_text())
        assert fetched(server, f"{path}.jpg")[:2] == b"\xff\xd8"


def test_the_demo_runs_from_the_archive(server, pack):
    prompt = json.loads((pack / "workflows" / "api" / "long_video.json").read_text())
    prompt["5"]["inputs"]["length"] = 21
    answer = server.request("/prompt", {"prompt": prompt})
    assert not answer.get("node_errors") and "prompt_id" in answer, answer
    end = time.monotonic() + 120
    while not (entry := server.request(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])):
        server.check_alive()
        assert time.monotonic() < end, "no answer"
        time.sleep(0.2)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    shown = entry["outputs"]["5"]["images"][0]
    query = f"filename={shown['filename']}&subfolder={shown['subfolder']}&type={shown['type']}"
    assert fetched(server, f"/view?{query}")[4:8] == b"ftyp"
