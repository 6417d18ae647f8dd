#!/usr/bin/env python3
"""Many videos from one API workflow on a running ComfyUI: submit, follow, fetch; stop one, keep it and go on with it.

  python3 batch.py run workflows/api/long_video.json --seeds 7 8 9 --set 5.length=97 --into results
  python3 batch.py stop PROMPT_ID
  python3 batch.py resume workflows/api/long_video.json --seed 8 --set 5.length=97 --into results

Standard library only. With the package websocket-client installed progress comes by websocket, else by polling.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import websocket
except ModuleNotFoundError:
    websocket = None


class Refused(Exception):
    """The server did not take a prompt; its text says why, node by node."""


def call(server: str, path: str, body: dict | None = None) -> dict:
    """GET, or POST with a body. Refused for a prompt that is not valid, with the answer's reasons."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server + path, data), timeout=60) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            raise Refused(reasons(json.loads(text))) from None
        except ValueError:
            raise Refused(f"HTTP {error.code}: {text[:300]}") from None


def reasons(answer: dict) -> str:
    """One line a node and sentence: an answer repeats a sentence for every input that was checked together."""
    lines = []
    for node, found in answer.get("node_errors", {}).items():
        for error in found["errors"]:
            sentence = error["details"].partition(" - ")[2] or f"{error['message']}: {error['details']}"
            lines.append(f"node {node} ({found['class_type']}): {sentence}")
    error = answer.get("error", {})
    return "\n".join(dict.fromkeys(lines)) or f"{error.get('message')} {error.get('details')}".strip()


# ---- making prompts


def load(file: str, changes: list[str]) -> dict:
    """An API workflow with some inputs changed: `5.length=97` is input `length` of node 5, its value as JSON."""
    prompt = json.loads(Path(file).read_text(encoding="utf-8"))
    for change in changes:
        place, _, value = change.partition("=")
        node, _, name = place.partition(".")
        prompt[node]["inputs"][name] = json.loads(value)
    return prompt


def node_of(prompt: dict, class_type: str) -> dict:
    """The inputs of the first node of a class."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == class_type)


def for_seed(prompt: dict, seed: int, prefix: str) -> dict:
    """A copy with this seed and with a file name of its own, by which its files are found again."""
    prompt = json.loads(json.dumps(prompt))
    node_of(prompt, "AdaStateRollout")["seed"] = seed
    node_of(prompt, "AdaStateStreamOutput")["filename_prefix"] = f"{prefix}_{seed}"
    return prompt


def resumed(prompt: dict, state: str) -> dict:
    """The prompt, going on from a saved state, the old video's frames copied in front."""
    prompt = prompt | {"state": {"class_type": "AdaStateLoadState", "inputs": {"file": state}}}
    node_of(prompt, "AdaStateRollout")["resume"] = ["state", 0]
    node_of(prompt, "AdaStateStreamOutput")["join"] = True
    return prompt


# ---- following them


def entry_of(server: str, prompt_id: str) -> dict | None:
    """A prompt's entry in the history: None until it has ended, and for one that was taken out of the queue."""
    return call(server, f"/history/{prompt_id}").get(prompt_id)


def queued(server: str) -> set[str]:
    """The ids that run or wait. One that does not any more has ended, or was taken out of the queue."""
    return {item[1] for items in call(server, "/queue").values() for item in items}


def by_polling(server: str, waiting: set[str]) -> Iterator[str]:
    """Ids as they end."""
    while waiting:
        ended = waiting - queued(server)
        yield from ended
        waiting = waiting - ended
        if waiting and not ended:
            time.sleep(1)


def by_websocket(server: str, client_id: str, waiting: set[str]) -> Iterator[str]:
    """Ids as they end, and meanwhile lines about what is at work. After a lost connection polling goes on."""
    said = 0.0
    try:
        line = websocket.create_connection(f"{server.replace('http', 'ws', 1)}/ws?clientId={client_id}", timeout=5)
        with contextlib.closing(line):
            changed = True
            while waiting:
                if changed:
                    ended = waiting - queued(server)
                    yield from ended
                    waiting = waiting - ended
                    changed = False
                try:
                    message = line.recv()
                except websocket.WebSocketTimeoutException:
                    changed = True  # nothing said for a while: look
                    continue
                if not isinstance(message, str):  # a preview picture
                    continue
                message = json.loads(message)
                changed = message["type"] == "status"  # the queue has changed
                if message["type"] == "progress_state" and time.monotonic() - said > 1:
                    said = time.monotonic()
                    for node in message["data"]["nodes"].values():
                        if node["state"] == "running" and node["max"] > 1:
                            print(
                                f"{message['data']['prompt_id']} {node['value']:.0f} of {node['max']:.0f}", flush=True
                            )
    except (OSError, websocket.WebSocketException):
        yield from by_polling(server, waiting)


def failure(entry: dict | None) -> str | None:
    """Why a prompt did not end well, or None."""
    if entry is None:
        return "taken out of the queue"
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}"
        if event == "execution_interrupted":
            return "interrupted"
    return None if entry["status"]["status_str"] == "success" else "failed"


# ---- what they made


def fetch(server: str, name: str, subfolder: str, kind: str, folder: Path) -> Path:
    """Save one file of the server's output or temp folder."""
    query = urllib.parse.urlencode({"filename": name, "subfolder": subfolder, "type": kind})
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(f"{server}/view?{query}", timeout=60) as answer, (folder / name).open("wb") as file:
        while part := answer.read(1 << 20):
            file.write(part)
    return folder / name


def fetch_results(server: str, entry: dict, folder: Path) -> list[Path]:
    """Save all files that the prompt's nodes list."""
    listed = [item for node in entry.get("outputs", {}).values() for items in node.values() for item in items]
    files = [item for item in listed if isinstance(item, dict) and "filename" in item]
    return [fetch(server, f["filename"], f.get("subfolder", ""), f.get("type", "output"), folder) for f in files]


def peek(server: str, name: str, subfolder: str, method: str = "GET") -> bytes | None:
    """A file of the output folder (with HEAD only whether it is there), or None."""
    query = urllib.parse.urlencode({"filename": name, "subfolder": subfolder, "type": "output"})
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{server}/view?{query}", method=method), timeout=60
        ) as answer:
            return answer.read()
    except urllib.error.HTTPError:
        return None


def find_report(server: str, prompt_id: str, prefix: str) -> dict | None:
    """The report that a prompt left beside its video, whatever ended it; None after a kill, and while it runs or waits.

    The host drops the outputs of a prompt that was interrupted or failed, so its file is looked for under its name.
    """
    subfolder, _, stem = prefix.rpartition("/")
    for number in itertools.count(1):
        names = [f"{stem}_{number:05}_{item}" for item in ("", "b0")]  # a batch's first video is b0
        for name in names:
            if text := peek(server, f"{name}.report.json", subfolder):
                report = json.loads(text)
                if report["prompt_id"] == prompt_id:
                    return report | {"name": f"{subfolder}/{name}.report.json".lstrip("/")}
        if all(
            peek(server, f"{name}.{kind}", subfolder, "HEAD") is None
            for name in names
            for kind in ("mp4", "report.json")
        ):
            return None
    return None


def kept_state(server: str, prefix: str) -> str | None:
    """The newest state that a stream of this name saved, as AdaStateLoadState lists it."""
    node = call(server, "/object_info/AdaStateLoadState")["AdaStateLoadState"]
    listed = node["input"]["required"]["file"]
    names = listed[1]["options"] if listed[0] == "COMBO" else listed[0]
    return next((name for name in names if name.startswith(f"{prefix}_0")), None)


def fetch_named(server: str, name: str, folder: Path) -> Path:
    """Save a file that a report names, by its path in the output folder."""
    subfolder, _, file = name.rpartition("/")
    return fetch(server, file, subfolder, "output", folder)


def outcome(entry: dict | None, report: dict | None) -> tuple[str, bool]:
    """How a prompt ended, in words, and whether its video is whole; one of length 0 is as long as it was when it was stopped."""
    reason = failure(entry)
    if report is None:
        return reason or "done", not reason
    place = f"at frame {report['frames_total']}" + (f" of {report['length']}" if report["length"] else "")
    words = {
        "whole": reason or "done",
        "stopped": f"stopped {place}",
        "interrupted": f"interrupted {place}",
        "failed": f"{report['error']['type']}: {report['error']['message']}" if report["error"] else "",
    }[report["ended"]]
    if report["ended"] != "whole" and report["state"]:
        words += f"; goes on from {report['state']}"
    whole = report["ended"] == "whole" or (report["ended"] == "stopped" and not report["length"])
    return words, whole and not reason


def stop(server: str, prompt_id: str) -> None:
    """End a prompt that runs, take one out that waits."""
    running = {item[1] for item in call(server, "/queue")["queue_running"]}
    if prompt_id in running:
        call_plain(server, "/interrupt", {"prompt_id": prompt_id})
    else:
        call_plain(server, "/queue", {"delete": [prompt_id]})


def call_plain(server: str, path: str, body: dict) -> None:
    """POST to a route that answers nothing."""
    urllib.request.urlopen(urllib.request.Request(server + path, json.dumps(body).encode()), timeout=60).close()


# ---- commands


def run(options: argparse.Namespace, prompts: dict[int, dict]) -> int:
    """Submit a prompt a seed, follow them all, fetch what they made; returns how many did not end well."""
    client_id = uuid.uuid4().hex
    seeds: dict[str, int] = {}
    bad = 0
    for seed, prompt in prompts.items():
        try:
            answer = call(options.server, "/prompt", {"prompt": prompt, "client_id": client_id})
        except Refused as refusal:
            print(f"seed {seed} was refused\n{refusal}")
            bad += 1
            continue
        seeds[answer["prompt_id"]] = seed
        print(f"seed {seed} is {answer['prompt_id']}", flush=True)
    if websocket and not options.poll:
        ended = by_websocket(options.server, client_id, set(seeds))
    else:
        ended = by_polling(options.server, set(seeds))
    for prompt_id in ended:
        entry = entry_of(options.server, prompt_id)
        files = fetch_results(options.server, entry or {}, options.into)
        report = find_report(options.server, prompt_id, f"{options.prefix}_{seeds[prompt_id]}")
        if report and not files:  # the host keeps no outputs of a prompt that did not end well
            files = [fetch_named(options.server, name, options.into) for name in [*report["videos"], report["name"]]]
        words, whole = outcome(entry, report)
        bad += not whole
        print(f"seed {seeds[prompt_id]}: {words}: {', '.join(map(str, files)) or 'no file'}", flush=True)
    return bad


def resume(options: argparse.Namespace) -> int:
    """Go on with a stopped prompt from the state beside its video."""
    prompt = for_seed(load(options.workflow, options.set), options.seed, options.prefix)
    state = kept_state(options.server, f"{options.prefix}_{options.seed}")
    if state is None:
        print(f"there is no state of {options.prefix}_{options.seed}; a stopped run leaves one beside its video")
        return 1
    return run(options, {options.seed: resumed(prompt, state)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "resume"):
        command = commands.add_parser(name)
        command.add_argument("workflow")
        command.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=JSON")
        command.add_argument("--prefix", default="batch/video", help="name and subfolder of the files on the server")
        command.add_argument("--into", type=Path, default=Path("results"), help="where results are saved here")
        command.add_argument("--poll", action="store_true", help="do not use a websocket")
        if name == "run":
            command.add_argument("--seeds", type=int, nargs="+", required=True)
        else:
            command.add_argument("--seed", type=int, required=True)
    commands.add_parser("stop").add_argument("prompt_id")
    options = parser.parse_args()
    if options.command == "stop":
        stop(options.server, options.prompt_id)
        return 0
    if options.command == "resume":
        return int(resume(options) > 0)
    prompt = load(options.workflow, options.set)
    return int(run(options, {seed: for_seed(prompt, seed, options.prefix) for seed in options.seeds}) > 0)


if __name__ == "__main__":
    sys.exit(main())
