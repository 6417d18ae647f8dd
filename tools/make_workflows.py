"""Make workflows/<title>.json, what users drag in, from workflows/api/<name>.json with the host's own front end.

The API file is written again with every input that it leaves out at its default, so that both say the same. Those of the
systems are not written by hand: system_workflows.py describes them. Which title a name has stands in workflow_titles.py.

    python -m tools.make_workflows              # all of them, from the checkout's root
    python -m tools.make_workflows long_video

Needs what the browser tests need: playwright, and a Chromium on PATH or named by CHROMIUM. The same API file and the
same host give the same bytes. How a graph is laid out and explained stands in workflow_layouts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.host_client import PACK_NAME, Server
from tools.setup_host import ROOT, SetupError, ensure_ready, say
from tools.system_workflows import PREFIX, SYSTEMS, graph, layout
from tools.workflow_layouts import FEATURES, Layout
from tools.workflow_titles import API, TITLES, shown, twin

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No screen, no sandbox (it is not to be had as root), and no calls to the browser maker's hosts.
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}


# Sets the sizes and places of the loaded graph and adds the note; litegraph's title bar lies above a node's pos.
_ARRANGE = """(layout) => {
  const TITLE = 30, GAP_X = 60, GAP_Y = 40, PAD = 20, FOOT = 40, HEAD = 60, WIDTH = 320;
  const NOTE = layout.noteHeight;
  const graph = app.graph;
  for (const node of graph.nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name === "control_after_generate") widget.value = "fixed";
  const note = LiteGraph.createNode("MarkdownNote");
  graph.add(note);
  note.title = "About this workflow";
  note.widgets[0].value = layout.note;
  const widthOf = (column) => Math.max(...column.map((id) => layout.widths[id] ?? WIDTH));
  note.setSize([layout.groups[0][1].reduce((sum, column) => sum + widthOf(column) + GAP_X, -GAP_X), NOTE]);
  note.pos = [PAD, TITLE];
  let x = PAD, top = TITLE + NOTE + GAP_Y, lowest = 0;
  for (const [title, columns] of layout.groups) {
    const left = x - PAD;
    let bottom = 0;
    for (const column of columns) {
      let y = top + HEAD + TITLE;
      for (const id of column) {
        const node = graph.getNodeById(id);
        const room = layout.room[id] ?? 0;
        const fitting = 10 * Math.ceil(node.computeSize()[1] / 10);
        const grows = !["PreviewImage", "PreviewAny"].includes(node.type);  // these do not always do so by themselves
        const height = grows ? fitting : fitting + room;
        node.setSize([layout.widths[id] ?? WIDTH, height]);
        node.pos = [x, y];
        if (layout.models[id]) node.properties.models = layout.models[id];
        const end = y + fitting + room;
        bottom = Math.max(bottom, end);
        y = end + GAP_Y + TITLE;
      }
      x += widthOf(column) + GAP_X;
    }
    const group = new LiteGraph.LGraphGroup(title);
    group.pos = [left, top];
    group.size = [x - GAP_X + PAD - left, bottom + FOOT - top];
    graph.add(group);
    lowest = Math.max(lowest, bottom + FOOT);
    x += PAD;
    top = 0;  // only the first group has the note above it
  }
  // A view of all of it in a window of 1600 x 900, also with the Vue renderer, which draws a graph 1.2 times as large; not
  // below 0.6, where texts are left out. It has to be in the file: without one, front end 1.32.9 pulls the nodes out of
  // their groups in that renderer.
  const fitting = Math.min(1, 1350 / (1.2 * (x - GAP_X)), 720 / (1.2 * lowest));
  const scale = Math.max(0.6, Math.floor(100 * fitting) / 100);
  const saved = graph.serialize();
  saved.extra.ds = { scale, offset: [Math.round(110 / scale), Math.round(150 / scale)] };
  return JSON.stringify(saved);
}"""


def find_browser() -> str | None:
    """The Chromium to drive: CHROMIUM, or the first of the usual names on PATH."""
    names = (os.environ["CHROMIUM"],) if os.environ.get("CHROMIUM") else BROWSERS
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """A headless Chromium under playwright. SetupError names what is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SetupError(
            "playwright is not installed: pip install playwright (no browser download is needed)"
        ) from None
    executable = find_browser()
    if executable is None:
        raise SetupError(f"no Chromium was found: install one of {', '.join(BROWSERS)} or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def running_host(folder: Path) -> Iterator[Server]:
    """A host with the pack that asks nothing of a new user; its files are in `folder`, what it makes in `output`."""
    settings = folder / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    with Server(ensure_ready(), folder, folder / "output", folder / "host.log") as server:
        server.wait_ready()
        yield server


def open_page(page: Page, port: int) -> None:
    """Ask for the front end and wait until its graph and its nodes are there."""
    page.goto(f"http://127.0.0.1:{port}/", timeout=120_000)  # a machine that does other work takes long to load a page
    page.wait_for_function(
        "() => window.app?.graph && window.app.extensionManager?.setting && LiteGraph.registered_node_types?.AdaStateRollout",
        timeout=120_000,
    )


def with_packs(graph: dict[str, Any], owners: dict[str, str], versions: dict[str, str]) -> dict[str, Any]:
    """Name the pack and version that each node comes from, so that a host without it can say what to install."""
    for node in graph["nodes"]:
        if owner := owners.get(node["type"]):
            node["properties"] |= {"cnr_id": owner, "ver": versions[owner]}
    return graph


def owners_of(object_info: dict[str, Any]) -> dict[str, str]:
    """Node type to registry id, for our nodes and the host's own."""
    ours = f"custom_nodes.{PACK_NAME}"
    return {
        name: "adastate" if info["python_module"] == ours else "comfy-core"
        for name, info in object_info.items()
        if info["python_module"] == ours or not info["python_module"].startswith("custom_nodes.")
    }


def layout_of(name: str) -> Layout:
    """How a workflow is laid out; SetupError if nothing says so."""
    if name in FEATURES:
        return FEATURES[name]
    if name.removeprefix(PREFIX) in SYSTEMS:
        return layout(name.removeprefix(PREFIX))
    raise SetupError(f"{name} has no entry in tools/workflow_layouts.py; write its note and groups there")


def known_names() -> list[str]:
    """The workflows whose API file is written by hand, and those of the systems."""
    return sorted({path.stem for path in API.glob("*.json")} | {PREFIX + name for name in SYSTEMS})


def make(page: Page, name: str, object_info: dict[str, Any], versions: dict[str, str]) -> tuple[str, str]:
    """The texts of workflows/<title>.json and of workflows/api/<name>.json."""
    wanted = layout_of(name)
    system = name.removeprefix(PREFIX)
    api = graph(system) if system in SYSTEMS else json.loads(twin(name).read_text(encoding="utf-8"))
    page.evaluate("([api, name]) => app.loadApiJson(api, name)", [api, name])
    page.wait_for_function("(n) => app.graph.nodes.length === n", arg=len(api))
    arranged = {
        "note": wanted.note,
        "noteHeight": wanted.note_height,
        "groups": list(wanted.groups.items()),
        "room": {str(node): pixels for node, pixels in wanted.room.items()},
        "models": {str(node): files for node, files in wanted.models.items()},
        "widths": {str(node): pixels for node, pixels in wanted.widths.items()},
    }
    saved = json.loads(page.evaluate(_ARRANGE, arranged))
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.workflows.adastate"))
    whole = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    check_kept(name, api, whole)
    texts = (with_packs(saved, owners_of(object_info), versions), completed(api, whole, object_info))
    return tuple(json.dumps(text, indent=2) + "\n" for text in texts)


def completed(api: dict[str, Any], whole: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt with what it leaves out taken from the front end's (`whole`), inputs in the order of the nodes."""
    found = {}
    for number in sorted(whole, key=int):
        node = whole[number]
        kinds = {
            key: kind[0] for group in object_info[node["class_type"]]["input"].values() for key, kind in group.items()
        }
        inputs = node["inputs"] | api[number]["inputs"]
        known = [key for key in kinds if key in inputs]  # widgets that the front end adds by itself come last
        ordered = {key: inputs[key] for key in known} | inputs
        for key, value in ordered.items():  # JavaScript has one kind of number
            if kinds.get(key) == "FLOAT" and type(value) is int:
                ordered[key] = float(value)
        found[number] = {"class_type": node["class_type"], "inputs": ordered, "_meta": node["_meta"]}
    return found


def check_kept(name: str, api: dict[str, Any], whole: dict[str, Any]) -> None:
    """SetupError if the front end lost or changed an input of the API prompt, as it does with a name it does not know."""
    for node, described in api.items():
        for key, value in described["inputs"].items():
            if whole.get(node, {}).get("inputs", {}).get(key) != value:
                raise SetupError(f"{name}: the front end does not keep input {key} of node {node}")


def main(arguments: list[str]) -> int:
    """Make the workflows named, or all."""
    known = known_names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(known))
    names = parser.parse_args(arguments).names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no workflows/api/{unknown[0]}.json; there are: {', '.join(known)}")
    if untitled := [name for name in names if name not in TITLES]:
        parser.error(f"{untitled[0]} has no title; write it into tools/workflow_titles.py")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_host(Path(folder)) as server,
            running_browser() as browser,
        ):
            object_info = server.request("/object_info")
            version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
            host_version = server.request("/system_stats")["system"]["comfyui_version"]
            versions = {"adastate": version[1], "comfy-core": host_version}
            for name in names:
                page = browser.new_page()
                open_page(page, server.port)
                graph, prompt = make(page, name, object_info, versions)
                shown(name).write_text(graph, encoding="utf-8")
                twin(name).write_text(prompt, encoding="utf-8")
                page.close()
                say(f"workflows/{shown(name).name}")
    except SetupError as error:
        say(f"make_workflows: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
