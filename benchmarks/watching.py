"""What a watching page costs, told apart from a machine's moods: one rollout that is watched and not, a few chunks at a time.

    python3 run.py bench watching
    python benchmarks/watching.py --pairs 60

The shipped workflow's own nodes run in this process, beside the host's own web server, as in the host. What is watched goes the
whole way: meters, pictures, the hidden state's, JSON, the web server, a socket that another process reads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import PACK, interval, load_pack, write_table

from tools.host_client import Events, free_port

CLIENT = "page"
WORKFLOW = PACK / "workflows" / "api" / "long_video.json"
_SKIPPED = 8  # chunks, until the window is full and all is warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100, help="of stretches, one watched and one not")
    parser.add_argument("--stretch", type=int, default=4, help="chunks")
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels")
    arguments = parser.parse_args()
    load_pack()
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(PACK / "models" / "diffusion_models"), is_default=True)
    folder_paths.add_model_folder_path("vae", str(PACK / "models" / "vae"), is_default=True)
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_user_directory(folder)
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Run the graph; write results/watching.md."""
    chunks = _SKIPPED + 2 * arguments.pairs * arguments.stretch + 1
    server, client, taken = start_server()
    marks = watch(arguments.stretch, server)
    run_graph({"width": arguments.size, "height": arguments.size, "length": 12 * chunks - 3})
    client.terminate()
    rows = []
    for name, column in (("wall time", 0), ("processor time, all threads", 1)):
        pairs = paired(marks[_SKIPPED:], column, arguments.stretch)
        ratios = sorted(watched / alone for watched, alone in pairs)
        low, high = interval(ratios)
        alone = statistics.median(alone for _, alone in pairs) / arguments.stretch
        rows.append([name, f"{1000 * alone:.0f}", f"{statistics.median(ratios):.4f}", f"{low:.4f} to {high:.4f}"])
    write_table(
        "watching",
        f"One rollout of {chunks} chunks, watched and not, {arguments.stretch} chunks at a time",
        ["of a chunk", "unwatched, ms", "watched / unwatched", "in 95 of 100 cases"],
        rows,
        [
            f"{arguments.size}x{arguments.size} pixels, everything else as in the workflow long_video; medians of "
            f"{len(ratios)} pairs of neighbouring stretches, watched first in every second pair.",
            f"{taken.value} messages went through the host's web server to a client in another process.",
        ],
    )


def paired(marks: list[tuple[float, float, bool]], column: int, stretch: int) -> list[tuple[float, float]]:
    """(watched, unwatched) seconds of neighbouring stretches, by one of the clocks of `marks`."""
    borders = marks[::stretch]
    taken = [(after[column] - before[column], before[2]) for before, after in zip(borders, borders[1:], strict=False)]
    turns = [dict((on, seconds) for seconds, on in taken[i : i + 2]) for i in range(0, len(taken) - 1, 2)]
    return [(turn[True], turn[False]) for turn in turns]


def start_server() -> tuple[Any, Any, Any]:
    """The host's web server in a thread of this process, a process that reads what it sends to one client, and how many
    messages that has taken."""
    import utils.install_util  # noqa: F401  first, as in the host's main: its nodes hide this package behind one of that name
    import server as host_server  # isort: skip

    loop, port = asyncio.new_event_loop(), free_port()
    asyncio.set_event_loop(loop)
    server = host_server.PromptServer(loop)
    server.app.add_routes(server.routes)
    server.client_id = CLIENT

    async def serve() -> None:
        await server.start("127.0.0.1", port, verbose=False)
        await server.publish_loop()

    threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True).start()
    processes = multiprocessing.get_context("spawn")
    taken = processes.Value("i", 0)
    client = processes.Process(target=listen, args=(port, taken), daemon=True)
    client.start()
    while CLIENT not in server.sockets:
        time.sleep(0.1)
    return server, client, taken


def listen(port: int, taken: Any) -> None:
    """Take what comes, as a page does."""
    while True:
        try:
            events = Events(port, CLIENT)
            break
        except OSError:
            time.sleep(0.2)
    while True:
        taken.value += len(events.read(timeout=0.2))


def watch(stretch: int, server: Any) -> list[tuple[float, float, bool]]:
    """Let rollouts be watched in turns: (time, processor time, watched from here on) as each chunk is done."""
    from adastate_pack.nodes.host import live_runs as live

    marks: list[tuple[float, float, bool]] = []

    class InTurns(live.LiveRun):
        """Watched, unwatched, unwatched, watched, ..."""

        has_page = True

        @property
        def watched(self) -> bool:
            turn = max(0, len(marks) - _SKIPPED) // stretch
            on = turn % 4 in (0, 3)
            marks.append((time.perf_counter(), time.process_time(), on))
            return on

        def _send(self, event: str, data: dict[str, Any]) -> None:
            server.send_sync(event, self.ids() | data, self.client)

    live.LiveRun = InTurns
    live._STATE_SHARE /= (
        2  # unwatched time earns such pictures too; here it is half of all, and they fall on the other half
    )
    return marks


def run_graph(inputs: dict[str, Any]) -> None:
    """Run the nodes of the shipped workflow one after the other, with other inputs of the rollout."""
    from comfy_execution.utils import CurrentNodeContext

    import nodes as host_nodes

    extension = asyncio.run(sys.modules["adastate_pack"].comfy_entrypoint())
    ours = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    graph, outputs = json.loads(WORKFLOW.read_text(encoding="utf-8")), {}
    for name in sorted(graph, key=int):  # the file's nodes are in the order of their links
        kind = graph[name]["class_type"]
        given = graph[name]["inputs"] | (inputs if kind == "AdaStateRollout" else {})
        given = {key: outputs[value[0]][value[1]] if isinstance(value, list) else value for key, value in given.items()}
        with torch.inference_mode(), CurrentNodeContext("watching", name, 0):
            if kind in ours:
                clone = ours[kind].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
                clone.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id=name, dynprompt=None)
                outputs[name] = clone.execute(**given).result
            else:
                node = host_nodes.NODE_CLASS_MAPPINGS[kind]
                outputs[name] = getattr(node(), node.FUNCTION)(**given)


if __name__ == "__main__":
    main()
