"""Make workflows/<name>.json, what users drag in, from workflows/api/<name>.json with the host's own front end.

    python -m tools.make_workflows              # all of them, from the checkout's root
    python -m tools.make_workflows long_video

Needs what the browser tests need: playwright, and a Chromium on PATH or named by CHROMIUM. The same API file and the
same host give the same bytes. How a graph is laid out and explained stands in LAYOUTS.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.host_client import PACK_NAME, Server
from tools.setup_host import ROOT, SetupError, ensure_ready, say

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WORKFLOWS = ROOT / "workflows"
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


@dataclass(frozen=True)
class Layout:
    """Titled groups of columns of node ids, left to right, and a note above the first; `room` is kept free below a node."""

    note: str
    groups: dict[str, list[list[int]]]
    room: dict[int, int] = field(default_factory=dict)


LAYOUTS = {
    "long_video": Layout(
        note="""\
### Long video at constant memory
Each chunk is decoded and written to the mp4 as soon as it is made, so memory stays the same however large **length** is.

Stop it whenever you like: the file plays, and the state saved beside it can be resumed.

*Demo Prompt* is for the tiny demo model; real checkpoints take *CLIP Text Encode*.""",
        groups={"Model and prompt": [[1, 2, 3]], "Roll out and write": [[4], [5]]},
        room={5: 340},
    ),
    "hidden_state": Layout(
        note="""\
### The hidden state
The adaptive anchor denoises a hidden latent with every chunk. The model looks back to it; it is never shown.

*Decode Hidden State* makes a picture of it as it is after the last chunk. Other anchors have none: bypass that node \
when you try them.

It needs weights that were trained with it. On others it acts like one more frame.""",
        groups={
            "Model, prompt, anchor": [[1, 2, 3, 4]],
            "Roll out": [[5]],
            "What is seen and what is not": [[6, 8], [7, 9]],
            "What is looked at": [[10], [11]],
        },
        room={6: 330, 7: 370, 9: 240, 11: 340},
    ),
    "absorption": Layout(
        note="""\
### Half the layers without their history
With a long **window_frames** most of the cache is history. After the warm-up half the layers drop theirs, and a correction \
solved in closed form stands in for it (ISPA).

The report shows what each layer would lose before and after, which were switched (shaded), and how the corrections age.

Turn **absorb** off on *ISPA Cache Absorption* to see the same without a correction.""",
        groups={
            "Model, prompt, settings": [[1, 2, 3], [4]],
            "Roll out and write": [[5], [6]],
            "What it did": [[7], [8]],
        },
        room={6: 340, 8: 340},
    ),
    "anchor_comparison": Layout(
        note="""\
### Four anchors side by side
The same prompt, seed and noise with four things to look back to: a hidden state, the first frame, a running mean, nothing. \
All read equally many cached frames: where there is no anchor the window is one frame longer.

The demo's weights were trained with the state, so the other three only show what the machinery does. The fair comparison, \
each trained with its own anchor, is in the model card.""",
        groups={
            "Model, prompt, anchors": [[1, 2, 3], [4, 5, 6, 7]],
            "Adaptive": [[8, 9]],
            "Static": [[10, 11]],
            "EMA": [[12, 13]],
            "None": [[14, 15]],
            "Side by side": [[16], [17]],
        },
        room={9: 340, 11: 340, 13: 340, 15: 340, 17: 370},
    ),
    "save_and_resume": Layout(
        note="""\
### Save and resume
The second rollout goes on from the state of the first. Its **length** counts from the very first frame. *join* copies \
the first file in front, so the second file holds the whole video.

On another day put *Load Rollout State* in the first rollout's place.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "First part": [[4], [5]],
            "Keep its state, go on from it": [[6, 7], [8]],
        },
        room={5: 340, 8: 340},
    ),
}

# Sets the sizes and places of the loaded graph and adds the note; litegraph's title bar lies above a node's pos.
_ARRANGE = """(layout) => {
  const TITLE = 30, GAP_X = 60, GAP_Y = 40, PAD = 20, FOOT = 40, HEAD = 60, WIDTH = 320, NOTE = 260;
  const graph = app.graph;
  for (const node of graph.nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name === "control_after_generate") widget.value = "fixed";
  const note = LiteGraph.createNode("MarkdownNote");
  graph.add(note);
  note.title = "About this workflow";
  note.widgets[0].value = layout.note;
  note.setSize([WIDTH, NOTE]);
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
        const height = node.type === "PreviewImage" ? fitting + room : fitting;  // it does not always grow by itself
        node.setSize([WIDTH, height]);
        node.pos = [x, y];
        const end = y + fitting + room;
        bottom = Math.max(bottom, end);
        y = end + GAP_Y + TITLE;
      }
      x += WIDTH + GAP_X;
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
    page.goto(f"http://127.0.0.1:{port}/")
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


def make(page: Page, name: str, owners: dict[str, str], versions: dict[str, str]) -> str:
    """The text of workflows/<name>.json."""
    if name not in LAYOUTS:
        raise SetupError(f"{name} has no entry in LAYOUTS of tools/make_workflows.py; write its note and groups there")
    layout = LAYOUTS[name]
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("([api, name]) => app.loadApiJson(api, name)", [api, name])
    page.wait_for_function("(n) => app.graph.nodes.length === n", arg=len(api))
    arranged = {
        "note": layout.note,
        "groups": list(layout.groups.items()),
        "room": {str(node): pixels for node, pixels in layout.room.items()},
    }
    graph = json.loads(page.evaluate(_ARRANGE, arranged))
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.workflows.adastate"))
    return json.dumps(with_packs(graph, owners, versions), indent=2) + "\n"


def main(arguments: list[str]) -> int:
    """Make the workflows named, or all."""
    known = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(known))
    names = parser.parse_args(arguments).names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no workflows/api/{unknown[0]}.json; there are: {', '.join(known)}")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_host(Path(folder)) as server,
            running_browser() as browser,
        ):
            owners = owners_of(server.request("/object_info"))
            version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
            host_version = server.request("/system_stats")["system"]["comfyui_version"]
            versions = {"adastate": version[1], "comfy-core": host_version}
            for name in names:
                page = browser.new_page()
                open_page(page, server.port)
                (WORKFLOWS / f"{name}.json").write_text(make(page, name, owners, versions), encoding="utf-8")
                page.close()
                say(f"workflows/{name}.json")
    except SetupError as error:
        say(f"make_workflows: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
