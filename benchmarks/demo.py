"""Time the demo's video against that of another checkout of this pack: a server each, the same host, in turns.

    git worktree add --detach /elsewhere 91e434f
    COMFYUI_PATH=... python benchmarks/demo.py --other /elsewhere

Each checkout runs its own long_video with its own shipped model, with two threads. `seconds` are those of its report: from the
first pass to the finished file. The whole command is `run.py demo`: start of the server, loading, video, end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import PACK, interval, write_table

from tools.host_client import PACK_NAME, Server, run_prompt
from tools.setup_host import Host

WORKFLOW = Path("workflows", "api", "long_video.json")
THREADS = "2"


@contextmanager
def serving(checkout: Path, host: Host) -> Iterator[Server]:
    """A server with this checkout as its only pack."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / PACK_NAME).symlink_to(checkout, target_is_directory=True)
        with Server(host, base, base / "output", base / "log.txt", linked=False) as server:
            server.wait_ready()
            yield server


def video_report(server: Server, checkout: Path, seed: int) -> dict:
    """The report of the checkout's own demo, rolled out anew with this seed."""
    prompt = json.loads((checkout / WORKFLOW).read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "AdaStateRollout":
            node["inputs"]["seed"] = seed
    entry = run_prompt(server, prompt)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"the demo of {checkout} failed: {entry['status']['messages'][-1]}")
    reports = [text for node in entry["outputs"].values() for text in node.get("adastate_report", [])]
    return json.loads(reports[0])


def command_seconds(checkout: Path, host: Host) -> float:
    """How long `run.py demo` takes from its start to its end."""
    start = time.monotonic()
    environment = host.env() | {"COMFYUI_PYTHON": str(host.python)}
    command = [sys.executable, "run.py", "demo"]
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="the other checkout; without it there is nothing to compare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", type=int, default=2, help="whole `run.py demo` of each")
    arguments = parser.parse_args()
    if arguments.other is None:
        print("demo: name another checkout with --other.")
        return
    os.environ["OMP_NUM_THREADS"] = THREADS
    host = Host(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(sys.executable))
    checkouts = {"this version": PACK, "the other": arguments.other.resolve()}
    reports: dict[str, list[dict]] = {name: [] for name in checkouts}
    with ExitStack() as open_servers:
        servers = {name: open_servers.enter_context(serving(path, host)) for name, path in checkouts.items()}
        for turn in range(-1, arguments.rounds):  # the first turn warms up
            for name in list(checkouts)[:: 1 if turn % 2 else -1]:
                report = video_report(servers[name], checkouts[name], 1000 + turn)
                reports[name] += [report] if turn >= 0 else []
    seconds = {name: [report["seconds"] for report in reports[name]] for name in checkouts}
    commands = {
        name: [command_seconds(path, host) for _ in range(arguments.commands)] for name, path in checkouts.items()
    }
    write_results(seconds, commands, reports["this version"][0]["frames"])


def write_results(seconds: dict[str, list[float]], commands: dict[str, list[float]], frames: int) -> None:
    """results/demo.md."""
    ratios = sorted(one / other for one, other in zip(*seconds.values(), strict=True))
    low, high = interval(ratios)
    rows = [
        [
            name,
            f"{statistics.median(seconds[name]):.2f}",
            f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}",
            f"{statistics.median(commands[name]):.1f}" if commands[name] else "not run",
        ]
        for name in seconds
    ]
    medians = [statistics.median(values) for values in seconds.values()]
    write_table(
        "demo",
        "The demo's video against another version's",
        ["version", "seconds, median", "least to most", "whole command, seconds"],
        rows,
        [
            f"Median against median: {medians[0] / medians[1]:.2f}. Turn by turn: {statistics.median(ratios):.2f} "
            f"({low:.2f} to {high:.2f}).",
            f"{len(ratios)} turns of {frames} frames each after one to warm up; a server each on the same host, {THREADS} threads; "
            "the server that does not work waits.",
            "The whole command starts the server, loads the models, makes the video and ends.",
        ],
    )


if __name__ == "__main__":
    main()
