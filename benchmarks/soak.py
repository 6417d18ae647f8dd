"""Whether a long run with autosaves and a page that watches grows the server: resident memory, open handles, threads.

    python3 run.py bench soak
    python benchmarks/soak.py --chunks 2000 --seconds 1

Needs playwright and a Chromium, as the browser tests do. The run is the shipped workflow's, small and of one step, so that chunks
come fast; a state is saved every `--seconds`, or as much further apart as 1 % of the time asks for.
"""

from __future__ import annotations

import argparse
import json
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
from tools.host_memory import Held, held, newest_run
from tools.make_workflows import open_page, running_browser, running_host
from tools.setup_host import SetupError
from tools.workflow_titles import TITLES

_OPEN = """async ([name, inputs, saves]) => {
  const answer = await app.api.fetchApi(`/workflow_templates/ComfyUI-AdaState/${name}.json`);
  await app.loadGraphData(await answer.json(), true, true, name);
  const fill = (type, values) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
  };
  fill("AdaStateRollout", inputs);
  fill("AdaStateStreamOutput", { autosave_seconds: saves });
  await app.extensionManager.command.execute("Workspace.ToggleBottomPanelTab.adastate");
  await app.queuePrompt(0);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="from one autosave to the next")
    arguments = parser.parse_args()
    if not Path(os.environ.get("COMFYUI_PATH", ""), "comfy").is_dir():
        raise SystemExit("benchmarks need the host: run them as `python3 run.py bench NAME`, or set COMFYUI_PATH.")
    try:
        with running_browser() as browser, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with running_host(folder) as server:
                page = browser.new_page(viewport={"width": 1600, "height": 900})
                open_page(page, server.port)
                measure(server, page, folder / "output", arguments)
    except SetupError as error:
        raise SystemExit(str(error)) from None


def measure(server: Server, page: Any, output: Path, arguments: argparse.Namespace) -> None:
    """Queue the run from the page and sample until it ends; write results/soak.md."""
    inputs = {"width": arguments.size, "height": arguments.size, "length": 12 * arguments.chunks - 3}
    page.evaluate(_OPEN, [TITLES["long_video"], inputs | {"steps": arguments.steps}, arguments.seconds])
    wanted = sorted({max(1, arguments.chunks * share // 10) for share in (1, 2, 5)})
    samples: list[Held] = []
    while True:
        run = newest_run(server)
        done = run["newest"]["chunk"] + 1 if run and run["newest"] else 0
        if wanted and done >= wanted[0]:
            samples.append(held(server, done))
            wanted = [each for each in wanted if each > done]
        if run and not run["running"]:
            break
        server.check_alive()
        time.sleep(0.05)
    if run["outcome"] != "done":
        raise SystemExit(f"the run ended as {run['outcome']}")
    saved = json.loads(next(output.rglob("*.report.json")).read_text())["autosave"]
    time.sleep(2)
    samples.append(held(server, arguments.chunks))
    first, last = samples[0], samples[-1]
    write_table(
        "soak",
        f"A run of {arguments.chunks} chunks with autosaves and a page that watches",
        ["chunks", "resident memory, MiB", "open handles", "threads"],
        [[f"{each.chunks}", f"{each.resident / 1024:.0f}", f"{each.handles}", f"{each.threads}"] for each in samples],
        [
            f"{saved['count']} states were saved on the way, the last {saved['seconds_apart']} s apart, which took "
            f"{100 * saved['share']:.2f} % of the time. A sample may fall into one, which has a thread and a file open.",
            f"From {first.chunks} chunks to the end: resident memory {(last.resident - first.resident) / 1024:+.0f} MiB, handles "
            f"{last.handles - first.handles:+d}, threads {last.threads - first.threads:+d}. The last row is 2 s after it.",
            f"{arguments.size}x{arguments.size} pixels, {arguments.steps} step(s); the node and the tab of the page are open.",
        ],
    )


if __name__ == "__main__":
    main()
