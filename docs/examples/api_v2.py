#!/usr/bin/env python3
"""A video through the official HTTP API v2: ComfyUI, before it comfy-api-proxy, and here its client comfy-sdk.

  pip install comfy-sdk==0.5.0 comfy-api-proxy==0.1.6
  comfy-api-proxy --comfyui http://127.0.0.1:8188 --port 8189 &
  COMFY_BASE_URL=http://127.0.0.1:8189 python3 api_v2.py workflows/api/long_video.json --set 5.length=97 --into results

The pack needs nothing for it. With --comfyui URL the report that lies beside a video is fetched from ComfyUI itself, and
Ctrl-C stops the run there too if the ComfyUI is too old to cancel a job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from comfy_sdk import Comfy
from comfy_sdk.events import Preview, Progress
from comfy_sdk.exceptions import ComfyError, InvalidWorkflow

SUFFIX = ".report.json"
ENDS = ("succeeded", "failed", "canceled")


def load(file: str, changes: list[str]) -> dict:
    """An API workflow with some inputs changed: `5.length=97` is input `length` of node 5, its value as JSON."""
    graph = json.loads(Path(file).read_text(encoding="utf-8"))
    for change in changes:
        place, _, value = change.partition("=")
        node, _, name = place.partition(".")
        graph[node]["inputs"][name] = json.loads(value)
    return graph


def sentences(refusal: InvalidWorkflow) -> list[str]:
    """Why a workflow was not taken: a line a node and sentence (ComfyUI repeats a sentence for every input)."""
    lines = []
    for node, found in ((refusal.details or {}).get("node_errors") or {}).items():
        for error in found["errors"]:
            text = error["details"].partition(" - ")[2] or f"{error['message']}: {error['details']}"
            lines.append(f"node {node} ({found['class_type']}): {text}")
    return list(dict.fromkeys(lines)) or [str(refusal)]


def follow(job) -> int:
    """Say how far the job is until it has ended; returns how many previews came."""
    previews, said = 0, -1
    for event in job.events():
        if isinstance(event, Preview):  # event.data is a JPEG
            previews += 1
        elif isinstance(event, Progress) and event.steps and event.step != said:
            said = event.step
            print(f"node {event.current_node}: pass {event.step} of {event.steps}", flush=True)
    # A job that ends between two questions of the proxy is "expired" for a moment: ask again.
    for _ in range(20):
        if job.refresh().status in ENDS:
            break
        time.sleep(0.5)
    return previews


def stop(job, comfyui: str | None) -> None:
    """Cancel. ComfyUI before 0.26 has no such route, and the proxy does not say so: interrupt there."""
    job.cancel()
    if comfyui:
        body = json.dumps({"prompt_id": job.id}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{comfyui}/interrupt", body), timeout=60).close()


def report_of(video: str, graph: dict, comfyui: str) -> dict | None:
    """The report beside a video, from ComfyUI itself: the API v2 gives the files that nodes show, and no other output."""
    prefix = next(n["inputs"]["filename_prefix"] for n in graph.values() if n["class_type"] == "AdaStateStreamOutput")
    place = {"filename": Path(video).stem + SUFFIX, "subfolder": prefix.rpartition("/")[0], "type": "output"}
    try:
        with urllib.request.urlopen(f"{comfyui}/view?{urllib.parse.urlencode(place)}", timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError:
        return None


def fetch(job, graph: dict, options: argparse.Namespace) -> None:
    """Save every file that the job's nodes show, and say the report of each video."""
    options.into.mkdir(parents=True, exist_ok=True)
    for output in job.outputs:
        print(f"Written: {output.to_file(options.into / output.name)}")
        if output.name.endswith(".mp4") and options.comfyui:
            if report := report_of(output.name, graph, options.comfyui):
                (options.into / (Path(output.name).stem + SUFFIX)).write_text(json.dumps(report), encoding="utf-8")
                print(f"{report['frames']} frames in {report['chunks']} chunks, {report['fps']:.1f} a second")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=JSON")
    parser.add_argument("--into", type=Path, default=Path("results"))
    parser.add_argument("--comfyui", help="ComfyUI's own address, for the report")
    options = parser.parse_args()
    graph = load(options.workflow, options.set)
    with Comfy() as client:  # COMFY_BASE_URL says where
        try:
            job = client.submit(client.workflows.from_json(graph))
        except InvalidWorkflow as refusal:
            print("\n".join(["refused", *sentences(refusal)]))
            return 1
        except ComfyError as error:
            print(error)
            return 1
        print(f"job {job.id}", flush=True)
        try:
            previews = follow(job)
        except KeyboardInterrupt:
            stop(job, options.comfyui)
            with contextlib.suppress(TimeoutError):
                job.wait(timeout=60)
            print(f"{job.status}; the finished chunks and a state to go on from are in ComfyUI's output folder")
            return 130
        if job.status != "succeeded":
            print(f"{job.status}: {job.error.message.strip() if job.error else 'ComfyUI knows no more about it'}")
            return 1
        print(f"{previews} previews came")
        fetch(job, graph, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
