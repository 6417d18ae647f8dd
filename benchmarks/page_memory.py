"""Whether a long run grows the page that shows it or the server that makes it: heap, nodes of the page, resident memory.

    python3 run.py bench page_memory
    python benchmarks/page_memory.py --chunks 2000 --size 32 --steps 1

Needs playwright and a Chromium, as the browser tests do. The page is the host's own front end with the workflow open, its preview
playing and the tab with its timeline open. Pictures are small and steps few, so that chunks come fast: what counts is their number.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import write_table

from tools.host_client import Server
from tools.host_memory import held, newest_run
from tools.make_workflows import open_page, running_browser, running_host
from tools.setup_host import SetupError
from tools.workflow_titles import TITLES

MIB = 2**20
_OPEN = """async ([name, inputs]) => {
  const answer = await app.api.fetchApi(`/workflow_templates/ComfyUI-AdaState/${name}.json`);
  await app.loadGraphData(await answer.json(), true, true, name);
  const node = app.graph.nodes.find((node) => node.type === "AdaStateRollout");
  for (const widget of node.widgets) if (widget.name in inputs) widget.value = inputs[widget.name];
  await app.extensionManager.command.execute("Workspace.ToggleBottomPanelTab.adastate");
  await app.queuePrompt(0);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="chunks from one sample to the next")
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    if not Path(os.environ.get("COMFYUI_PATH", ""), "comfy").is_dir():
        raise SystemExit("benchmarks need the host: run them as `python3 run.py bench NAME`, or set COMFYUI_PATH.")
    try:
        with (
            running_browser() as browser,
            tempfile.TemporaryDirectory() as folder,
            running_host(Path(folder)) as server,
        ):
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            open_page(page, server.port)
            measure(server, page, arguments)
    except SetupError as error:
        raise SystemExit(str(error)) from None


def measure(server: Server, page: Any, arguments: argparse.Namespace) -> None:
    """Queue the run from the page and sample until it ends; write results/page-memory.md."""
    inputs = {"width": arguments.size, "height": arguments.size, "length": 12 * arguments.chunks - 3}
    page.evaluate(_OPEN, [TITLES["long_video"], inputs | {"steps": arguments.steps}])
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    samples, wanted = [], arguments.every
    while True:
        run = newest_run(server)
        if run and run["newest"] and run["newest"]["chunk"] + 1 >= wanted:
            samples.append([run["newest"]["chunk"] + 1, *page_figures(session), held(server, 0).resident / 1024])
            wanted += arguments.every
        if run and not run["running"]:
            if run["outcome"] != "done":
                raise SystemExit(f"the run ended as {run['outcome']}")
            break
        server.check_alive()
        time.sleep(0.3)
    rows = [[f"{done}", f"{heap:.1f}", f"{nodes}", f"{memory:.0f}"] for done, heap, nodes, memory in samples]
    first, last = samples[0], samples[-1]
    write_table(
        "page-memory",
        f"A run of {arguments.chunks} chunks with the page open",
        ["chunks", "page's heap, MiB", "page's DOM nodes", "server's resident memory, MiB"],
        rows,
        [
            f"From {first[0]} chunks to {last[0]}: heap {last[1] - first[1]:+.1f} MiB, nodes {last[2] - first[2]:+d}, server "
            f"{last[3] - first[3]:+.0f} MiB.",
            f"{arguments.size}x{arguments.size} pixels, {arguments.steps} step(s); the heap right after a garbage collection.",
        ],
    )


def page_figures(session: Any) -> tuple[float, int]:
    """(heap in MiB after a collection, nodes of the page's document)."""
    session.send("HeapProfiler.collectGarbage")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    return metrics["JSHeapUsedSize"] / MIB, int(metrics["Nodes"])


if __name__ == "__main__":
    main()
