"""What watching costs: the demo rollout without preview, with nobody and with a client that watches, in turns, on one server.

python3 run.py bench live_preview
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import PACK, interval, write_table

from tools.host_client import Events, Server
from tools.setup_host import Host

HOW = ("preview off", "preview on, nobody watches", "preview on, a client watches")


class Watcher:
    """A client as the pack's page is one: an open socket that takes what comes."""

    def __init__(self, server: Server) -> None:
        self.name, self.chunks, self.pictures, self.bytes = uuid.uuid4().hex, 0, 0, 0
        self._events, self._open = Events(server.port, self.name), True
        server.request(f"/adastate/runs?page=1&client_id={self.name}")
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while self._open:
            for message in self._events.read(timeout=0.2):
                if message["type"] == "adastate.chunk":
                    self.chunks += 1
                elif message["type"] == "adastate.pictures":
                    self.pictures += len(message["data"]["pictures"])
                    self.bytes += len(json.dumps(message))

    def close(self) -> None:
        self._open = False
        self._thread.join()
        self._events.close()


def run(server: Server, prompt: dict, client: str | None) -> tuple[float, float]:
    """(seconds of the rollout itself, as its report says; seconds of processor time the server took for the prompt)."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    body = {"prompt": prompt} | ({"client_id": client} if client else {})
    prompt_id = server.request("/prompt", body)["prompt_id"]
    while not (entry := server.request(f"/history/{prompt_id}").get(prompt_id)):
        server.check_alive()
        time.sleep(0.5)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"the rollout failed: {entry['status']['messages'][-1]}")
    after = process.cpu_times()
    taken = after.user + after.system - before.user - before.system
    return json.loads(entry["outputs"]["5"]["adastate_report"][0])["seconds"], taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=129, help="video frames")
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    if not Path(os.environ.get("COMFYUI_PATH", ""), "comfy").is_dir():
        raise SystemExit("benchmarks need the host: run them as `python3 run.py bench NAME`, or set COMFYUI_PATH.")
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with Server(host, base / "base", base / "output", base / "server.log") as server:
            server.wait_ready()
            measure(server, arguments.length, arguments.repeats)


def cells(how: str, taken: list[tuple[float, float]], alone: list[tuple[float, float]]) -> list[str]:
    """One line of the table."""
    line = [how]
    for mine, base in zip(zip(*taken, strict=True), zip(*alone, strict=True), strict=True):
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        low, high = interval(ratios)
        line += [f"{statistics.median(mine):.2f}", f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"]
    return line


def measure(server: Server, length: int, repeats: int) -> None:
    """Rounds of runs in an order that goes back and forth, each round with a seed of its own; write results/live-preview.md."""
    demo = json.loads((PACK / "workflows" / "api" / "long_video.json").read_text(encoding="utf-8"))
    times: dict[str, list[tuple[float, float]]] = {how: [] for how in HOW}
    told = []
    for turn in range(-1, repeats):  # the first round warms up
        for number, how in enumerate(HOW if turn % 2 else HOW[::-1]):
            prompt = copy.deepcopy(demo)
            prompt["5"]["inputs"] |= {"length": length if turn >= 0 else 33, "seed": turn + 10}
            prompt["4"]["inputs"] |= {"filename_prefix": f"live/{turn}_{number}", "preview": how != HOW[0]}
            watcher = Watcher(server) if how == HOW[2] else None
            taken = run(server, prompt, watcher.name if watcher else None)
            if watcher:
                watcher.close()
            if turn >= 0:
                times[how].append(taken)
                if watcher:
                    told.append((watcher.chunks, watcher.pictures, watcher.bytes))
    chunks, pictures, sent = (statistics.median(column) for column in zip(*told, strict=True))
    table = [cells(how, times[how], times[HOW[0]]) for how in HOW]
    write_table(
        "live-preview",
        f"The demo rollout of {length} frames, watched and not",
        ["how", "s (median)", "ratio", "processor s (median)", "ratio"],
        table,
        [
            f"{repeats} rounds in turns on one server, a seed each; ratios: medians of those to the round's first row, with the "
            "interval that holds such a median in 95 of 100 cases (for six rounds and more). Rounds are short and many, since a "
            "machine's speed changes from minute to minute.",
            "Seconds are the rollout's own, from its report: denoising, decoding and writing the video.",
            "Processor seconds are the whole server's, on all threads, for the prompt: what watching costs wherever it runs. They "
            "depend less on what else the machine does.",
            f"A watched run sent {chunks:.0f} events of chunks and {pictures:.0f} pictures, {sent / 1024:.0f} KiB in all.",
        ],
    )


if __name__ == "__main__":
    main()
