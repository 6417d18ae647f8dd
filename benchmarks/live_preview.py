"""What watching costs: the demo rollout with and without a client that watches, in turns, on one server.

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

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from host import PACK, write_table

from tools.host_client import Events, Server
from tools.setup_host import Host


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


def run(server: Server, prompt: dict, client: str | None) -> float:
    """Seconds of the rollout itself, as its report says."""
    body = {"prompt": prompt} | ({"client_id": client} if client else {})
    prompt_id = server.request("/prompt", body)["prompt_id"]
    while not (entry := server.request(f"/history/{prompt_id}").get(prompt_id)):
        server.check_alive()
        time.sleep(0.5)
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"the rollout failed: {entry['status']['messages'][-1]}")
    return json.loads(entry["outputs"]["5"]["adastate_report"][0])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=513, help="video frames")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not Path(os.environ.get("COMFYUI_PATH", ""), "comfy").is_dir():
        raise SystemExit("benchmarks need the host: run them as `python3 run.py bench NAME`, or set COMFYUI_PATH.")
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with Server(host, base / "base", base / "output", base / "server.log") as server:
            server.wait_ready()
            measure(server, arguments.length, arguments.repeats)


def measure(server: Server, length: int, repeats: int) -> None:
    """Pairs of runs whose order goes back and forth, each pair with a seed of its own; write results/live-preview.md."""
    demo = json.loads((PACK / "workflows" / "api" / "long_video.json").read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {"alone": [], "watched": []}
    told = []
    for turn in range(-1, repeats):  # the first pair warms up
        for how in ("alone", "watched") if turn % 2 else ("watched", "alone"):
            prompt = copy.deepcopy(demo)
            prompt["5"]["inputs"] |= {"length": length if turn >= 0 else 33, "seed": turn + 10}
            prompt["4"]["inputs"]["filename_prefix"] = f"live/{how}{turn}"
            watcher = Watcher(server) if how == "watched" else None
            seconds = run(server, prompt, watcher.name if watcher else None)
            if watcher:
                watcher.close()
            if turn >= 0:
                times[how].append(seconds)
                if watcher:
                    told.append((watcher.chunks, watcher.pictures, watcher.bytes))
    ratio = statistics.median(a / b for a, b in zip(times["watched"], times["alone"], strict=True))
    chunks, pictures, sent = (statistics.median(column) for column in zip(*told, strict=True))
    table = [
        ["nobody watches", f"{statistics.median(times['alone']):.2f}", "1.000", "", ""],
        [
            "a client watches",
            f"{statistics.median(times['watched']):.2f}",
            f"{ratio:.3f}",
            f"{chunks:.0f}",
            f"{pictures:.0f}",
        ],
    ]
    write_table(
        "live-preview",
        f"The demo rollout of {length} frames with and without a client that watches",
        ["how", "s (median)", "ratio", "chunk events", "pictures"],
        table,
        [
            f"{repeats} pairs in turns on one server, each pair with a seed of its own; the ratio is the median of the pairs'.",
            "Seconds are the rollout's own, from its report: denoising, decoding and writing the video.",
            f"Pictures took {sent / 1024:.0f} KiB as messages.",
        ],
    )


if __name__ == "__main__":
    main()
