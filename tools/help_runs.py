"""What the help pages' pictures are made from: graphs run on a host, their frames and pictures, and crops of the real page."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from PIL import Image, ImageDraw, ImageFont

from tools.host_client import Server, run_prompt
from tools.make_workflows import open_page
from tools.setup_host import SetupError
from tools.workflow_titles import shown, twin

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Graph = dict[str, dict[str, Any]]
WIDE = 640  # pixels of the widest picture; the help panel opens with less than half of that, so letters are large
FPS = 16
_DRAWN = 4000  # milliseconds that a page gets to draw what it was sent
PAPER, INK = "#1b1b1f", "#e6e6e6"

# Waits for a graph's texts and videos to be drawn, shows the nodes asked for, and gives their place on the page.
_SHOW = """(ids) => {
  const nodes = ids.map((id) => app.graph.getNodeById(id));
  const left = Math.min(...nodes.map((n) => n.pos[0])) - 14, top = Math.min(...nodes.map((n) => n.pos[1])) - 64;
  const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0])) + 14;
  const bottom = Math.max(...nodes.map((n) => n.pos[1] + (n.flags.collapsed ? 0 : n.size[1]))) + 14;
  app.canvas.deselectAll();
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [300 - left, 120 - top];
  app.canvas.setDirty(true, true);
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return { x: canvas.x + 300, y: canvas.y + 120, width: right - left, height: bottom - top };
}"""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(name: str, **changes: Any) -> Graph:
    """A shipped API workflow with some inputs changed: `n5__length=97` is input `length` of node 5."""
    graph = json.loads(twin(name).read_text(encoding="utf-8"))
    for key, value in changes.items():
        number, field = key.removeprefix("n").split("__", 1)
        graph[number]["inputs"][field] = value
    return graph


def with_rollout(graph: Graph, name: str, like: tuple[str, str], **inputs: Any) -> None:
    """Add a rollout `name` and its stream, copies of the nodes `like` but for `inputs` of the rollout."""
    rollout, stream = like
    graph[f"{name} stream"], graph[name] = copy.deepcopy(graph[stream]), copy.deepcopy(graph[rollout])
    graph[f"{name} stream"]["inputs"]["filename_prefix"] = f"help/{name}"
    graph[name]["inputs"] |= {"stream": [f"{name} stream", 0], **inputs}


class Run:
    """What a graph that has run left behind."""

    def __init__(self, outputs: dict[str, Any], folders: dict[str, Path]) -> None:
        self.outputs, self.folders = outputs, folders

    def file(self, number: str) -> Path:
        """The first file that a node lists."""
        listed = [f for files in self.outputs[number].values() for f in files if isinstance(f, dict)]
        file = next(f for f in listed if "filename" in f)
        return self.folders[file["type"]] / file["subfolder"] / file["filename"]

    def picture(self, number: str) -> Image.Image:
        """The first picture that a node shows, no wider than a help page's."""
        return narrowed(Image.open(self.file(number)).convert("RGB"))

    def text(self, number: str) -> str:
        """The text that a node shows."""
        return self.outputs[number]["text"][0]

    def frames(self, number: str) -> list[Image.Image]:
        """All frames of the video that a node lists."""
        with av.open(str(self.file(number))) as container:
            return [frame.to_image() for frame in container.decode(video=0)]

    def at(self, number: str, seconds: Sequence[float]) -> list[Image.Image]:
        """The frames of a video nearest to these seconds."""
        frames = self.frames(number)
        return [frames[min(len(frames) - 1, round(FPS * second))] for second in seconds]


class Stage:
    """A host and a browser; a graph is run once, however many pictures are made from it."""

    def __init__(self, server: Server, folder: Path, browser: Browser) -> None:
        self.server, self.browser = server, browser
        self.folders = {kind: folder / kind for kind in ("input", "output", "temp")}
        self._done: dict[str, Run] = {}

    def run(self, graph: Graph) -> Run:
        """SetupError if the graph does not run to its end."""
        key = json.dumps(graph, sort_keys=True)
        if key not in self._done:
            entry = run_prompt(self.server, graph)
            if entry["status"]["status_str"] != "success":
                raise SetupError(f"a graph did not run; the host's log is {self.server.log}", code=1)
            self._done[key] = Run(entry["outputs"], self.folders)
        return self._done[key]

    def crop(self, name: str, ids: Sequence[int], graph: Graph | None = None, run: bool = True) -> Image.Image:
        """Nodes of a workflow in the real page, once it has run there; of `graph` instead if one is given (its ids are numbers)."""
        with self._opened(name, graph) as page:
            if run:
                page.evaluate("() => app.queuePrompt(0)")
                self._wait_idle(page)
            page.wait_for_timeout(_DRAWN)
            return _taken(page, page.evaluate(_SHOW, list(ids)))

    def watched(self, name: str, number: int, chunks: int) -> Image.Image:
        """What a rollout node of a workflow shows of its run when it has made so many chunks."""
        with self._opened(name) as page:
            page.evaluate("() => app.queuePrompt(0)")
            strip = "document.querySelectorAll('.adastate-strip button')"
            page.wait_for_function(f"(n) => {strip}.length >= n", arg=chunks, timeout=300_000)
            page.evaluate(_SHOW, [number])
            page.wait_for_timeout(700)
            taken = _taken(page, page.locator(".adastate-live").bounding_box())
            page.evaluate("() => app.api.interrupt()")
            self._wait_idle(page)
            return taken

    @contextlib.contextmanager
    def _opened(self, name: str, graph: Graph | None = None) -> Iterator[Page]:
        """The real page with the workflow, or with `graph`."""
        page = self.browser.new_page(viewport={"width": 1700, "height": 1500}, device_scale_factor=2)
        try:
            open_page(page, self.server.port)
            if graph is None:
                text = shown(name).read_text(encoding="utf-8")
                page.evaluate("(text) => app.loadGraphData(JSON.parse(text))", text)
            else:
                page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph, name])
            page.wait_for_timeout(500)
            yield page
        finally:
            page.close()

    def _wait_idle(self, page: Page, seconds: int = 300) -> None:
        for _ in range(2 * seconds):
            page.wait_for_timeout(500)
            if not any(self.server.request("/queue").values()):
                return
        raise SetupError(f"a graph did not end within {seconds} s; the host's log is {self.server.log}", code=1)


def _taken(page: Page, clip: dict[str, float]) -> Image.Image:
    """A part of the page, once it is drawn."""
    page.wait_for_timeout(700)
    return narrowed(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))


def narrowed(picture: Image.Image) -> Image.Image:
    """The picture, made smaller if it is too wide for a help page."""
    if picture.width <= WIDE:
        return picture
    return picture.resize((WIDE, picture.height * WIDE // picture.width), Image.Resampling.LANCZOS)


def written(text: str) -> Image.Image:
    """A node's text as it came, its long lines broken."""
    font, lines = ImageFont.load_default(24), []
    for line in text.splitlines():
        lines.append("")
        for word in line.split(" "):
            longer = f"{lines[-1]} {word}".removeprefix(" ")
            if font.getlength(longer) > WIDE - 32 and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
    sheet = Image.new("RGB", (WIDE, 32 * len(lines) + 24), PAPER)
    ImageDraw.Draw(sheet).multiline_text((16, 10), "\n".join(lines), fill=INK, font=font, spacing=8)
    return sheet


def strip(rows: dict[str, list[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """Rows of frames under their titles ("" for none), and a caption (it may have several lines) under each column."""
    columns = max(map(len, rows.values()))
    cell, gap = min(WIDE // columns, 160), 2
    title_font, font = ImageFont.load_default(26), ImageFont.load_default(24)
    head = {title: 36 if title else 0 for title in rows}
    foot = 8 + 28 * max((caption.count("\n") + 1 for caption in captions), default=0) if captions else 0
    sheet = Image.new("RGB", (columns * cell, sum(head.values()) + len(rows) * (cell + gap) + foot), PAPER)
    draw, y = ImageDraw.Draw(sheet), 0
    for title, frames in rows.items():
        draw.text((4, y + 3), title, fill=INK, font=title_font)
        y += head[title]
        for i, frame in enumerate(frames):
            smooth = Image.Resampling.NEAREST if cell % frame.width == 0 else Image.Resampling.BICUBIC
            sheet.paste(frame.resize((cell - gap, cell), smooth), (i * cell, y))
        y += cell + gap
    for i, caption in enumerate(captions):
        draw.multiline_text((i * cell + 4, y + 2), caption, fill=INK, font=font, spacing=5)
    return sheet
