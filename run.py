#!/usr/bin/env python3
"""ComfyUI-AdaState from a checkout. Each command first sets up what is missing (once; 11 GB of disk, 7 of them to stay).

  python3 run.py demo [WORKFLOW.json]   make a long video with the shipped model, in a real ComfyUI
  python3 run.py serve [--port N]       start ComfyUI with the pack, for a browser; further flags go to ComfyUI
  python3 run.py selftest [--quick]     try this machine's own device with tiny models; prints a table for a bug report
  python3 run.py test [LAYER] [...]     style and all tests, or one folder of tests/; further arguments go to pytest
  python3 run.py test --all-cases [...] the same, but for tests with very many alike cases not a sample of these, all of them
  python3 run.py test bounds [...]      the tests of files and videos with the oldest packages that are promised
  python3 run.py test quick [...]       style and, in under a minute, some tests of every layer that needs no browser
  python3 run.py faults [--sample N] [--seed S] [--only NAME] [--at "MODE N"]
                                        fail everything that a chunk does, in turn: nothing may be lost; writes a table
  python3 run.py campaign [NAME ...] [--seed S] [--fresh] [--only "KIND NUMBER"]
                                        try what breaks things, by the thousand; writes the table of docs/campaign.md
  python3 run.py fleet TABLE --into FOLDER
                                        make a table of videos on all GPUs of this machine or of a Ray cluster; --help has more
  python3 run.py bench [NAME ...]       run all of benchmarks/, or those named
  python3 run.py train STAGE [...]      run one stage of training/ with its arguments
  python3 run.py setup                  only set up

Python packages go to .venv and the rest to .cache, both in the checkout; both may be deleted at any time.
COMFYUI_PATH=/path/to/ComfyUI uses that ComfyUI and the interpreter that runs it, and downloads nothing;
COMFYUI_PYTHON names that interpreter where it is not found (looked for: .venv, venv, ../python_embeded, this one).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tools import campaign as campaigns
from tools import lower_bounds
from tools.host_client import Server, run_prompt, server_command
from tools.setup_fleet import DASHBOARD, TESTED, ensure_fleet
from tools.setup_host import CACHE, ROOT, Host, SetupError, child_env, duration, ensure_ready, say, versions_line

DEMO = ROOT / "workflows" / "api" / "long_video.json"
BASE = CACHE / "base"  # the server's models, custom_nodes, input, temp and user folders
OUTPUT = ROOT / "output"
# where two layers run at a time: the longest first, so that both lanes end together
SLOWEST = ["web", "training", "api", "core", "host", "bounds host", "bounds core"]
LAYERS = ["core", "training", "runpy", "host", "api", "web"]  # run in this order, then whatever else is in tests/
QUICK = ["core", "runpy", "host", "api"]  # those with tests that are marked quick
TEST_MODULES = {"pytest": "pytest", "ruff": "ruff", "websocket": "websocket-client", "hypothesis": "hypothesis"}


# ---- demo


def error_text(entry: dict) -> str | None:
    """What went wrong in a finished prompt, or None."""
    if entry["status"]["status_str"] == "success":
        return None
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip()}"
    return "The run was interrupted."


def written_files(entry: dict, output: Path) -> list[Path]:
    """The files that a prompt's nodes list in their ui, those of the output folder."""
    items = [
        item
        for node in entry["outputs"].values()
        for listed in node.values()
        for item in listed
        if isinstance(item, dict) and item.get("type") == "output" and "filename" in item
    ]
    return [output / item.get("subfolder", "") / item["filename"] for item in items]


def report_lines(report: dict) -> list[str]:
    """The rollout's report in words."""
    planned, used = report["kv_bytes_planned"], report["kv_bytes_used"]
    return [
        f"Length: {report['video_seconds']:.1f} s of video, {report['frames']} frames in {report['chunks']} chunks.",
        f"Speed: {report['fps']:.1f} frames per second ({duration(report['seconds'])} in all).",
        f"KV cache: {planned:,} bytes planned, {used:,} used ({used / 2**20:.1f} MiB, whatever the length).",
        *(f"Note: {warning}" for warning in report.get("warnings", [])),
    ]


def demo(arguments: list[str]) -> int:
    """Make a video through the HTTP interface, as any client would."""
    workflow = Path(arguments[0]).resolve() if arguments else DEMO
    try:
        prompt = json.loads(workflow.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{workflow} cannot be read as a workflow: {error}.") from error
    host = ensure_ready()
    say("Starting ComfyUI.")
    with Server(host, BASE, OUTPUT, CACHE / "demo-server.log") as server:
        server.wait_ready()
        say(f"Running {workflow.name}.")
        entry = run_prompt(server, prompt)
    if error := error_text(entry):
        say(f"{error}\nThe server's log is {CACHE / 'demo-server.log'}.")
        return 1
    if not (files := written_files(entry, OUTPUT)):
        say("The workflow ran, but wrote no file.")
        return 1
    for file in files:
        say(f"Written: {file}")
    reports = [text for node in entry["outputs"].values() for text in node.get("adastate_report", [])]
    for report in reports:
        say("\n".join(report_lines(json.loads(report))))
    say(
        f"Next: change the words or the length in {workflow} and run this again,\n"
        "or `python3 run.py serve` and open the pack's workflows from the template browser."
    )
    return 0


# ---- the other commands


def serve(arguments: list[str]) -> int:
    """Run the host in the foreground."""
    parser = argparse.ArgumentParser(prog="run.py serve")
    parser.add_argument("--port", type=int, default=8188)
    options, flags = parser.parse_known_args(arguments)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", options.port))
        except OSError as error:
            raise SetupError(f"Port {options.port} is taken; choose another one with --port.") from error
    host = ensure_ready()
    command = server_command(host, BASE, OUTPUT, options.port)
    say(f"ComfyUI will be at http://127.0.0.1:{options.port} in some seconds. Ctrl-C ends it.")
    return run_child([*command, *flags], host, host.path)


def selftest(arguments: list[str]) -> int:
    """Run the node AdaState Self Test, and print its table; 0 if all of it is ok."""
    parser = argparse.ArgumentParser(prog="run.py selftest")
    parser.add_argument("--quick", action="store_true", help="leave out the time of a block of Wan 2.1 1.3B")
    options = parser.parse_args(arguments)
    host = ensure_ready()
    say("Starting ComfyUI.")
    prompt = {"1": {"class_type": "AdaStateSelfTest", "inputs": {"speed": not options.quick}}}
    with Server(host, BASE, OUTPUT, CACHE / "selftest-server.log") as server:
        server.wait_ready()
        entry = run_prompt(server, prompt)
    if error := error_text(entry):
        say(f"{error}\nThe server's log is {CACHE / 'selftest-server.log'}.")
        return 1
    text = entry["outputs"]["1"]["text"][0]
    say(text)
    return int(not all_ok(text))


def all_ok(text: str) -> bool:
    """Whether the first line of a self test's table says that all checks are ok."""
    found = re.search(r"(\d+) of (\d+) ok", text)
    return bool(found) and found[1] == found[2]


def run_child(
    command: list[str], host: Host, folder: Path = ROOT, said: IO[bytes] | None = None, front: Path | None = None
) -> int:
    """Run a program, ended with this one; returns its exit status. What it says goes to the screen, or into `said`.

    `front`: a folder of packages that come before the environment's.
    """
    env = host.env() | {"COMFYUI_PYTHON": str(host.python)} | ({"PYTHONPATH": str(front)} if front else {})
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=said and subprocess.STDOUT)
    try:
        return process.wait()
    except KeyboardInterrupt:  # it got the Ctrl-C as well: let it end in its own way
        process.wait(30)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def test_layers(tests: Path, wanted: str | None = None) -> list[str]:
    """The folders of `tests` that have a pytest.ini, in order."""
    found = sorted(path.parent.name for path in tests.glob("*/pytest.ini"))
    ordered = [name for name in LAYERS if name in found] + [name for name in found if name not in LAYERS]
    return ordered if wanted is None else [name for name in ordered if name == wanted]


def junit_counts(file: Path) -> tuple[int, int, int] | None:
    """Passed, failed and skipped tests of a pytest report, or None if pytest did not get to write it."""
    if not file.is_file():
        return None
    suites = list(xml.etree.ElementTree.parse(file).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


@dataclass(frozen=True)
class Layer:
    """Tests that run in a process of their own: a folder of tests/, or files of it, with packages of `front` first."""

    name: str
    folder: str
    files: tuple[str, ...] = ()
    front: Path | None = None


def bounds_layers(host: Host) -> list[Layer]:
    """The tests with the oldest packages, or with those of ADASTATE_AV_PATHS; says which, or why there are none."""
    folders = lower_bounds.named_folders()
    if not folders:
        if reason := lower_bounds.why_skipped(host):
            say(f"bounds: skipped: {reason}.")
            return []
        folders = [lower_bounds.ensure_bounds(host)]
    layers = []
    for number, front in enumerate(folders, 1):
        which = f" {number}" if len(folders) > 1 else ""
        say(f"bounds{which}: {lower_bounds.versions(host, front)}")
        layers += [
            Layer(f"bounds{which} {name}", name, tuple(files), front) for name, files in lower_bounds.TESTS.items()
        ]
    return layers


def run_layer(
    layer: Layer, host: Host, arguments: list[str], aside: bool = False
) -> tuple[bool, tuple[int, int, int], str]:
    """One pytest process; returns success, counts and a line about it.

    `aside`: others run at the same time, so what it says is shown when it has ended.
    """
    report = CACHE / f"junit-{layer.name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    if not aside:
        say(f"== tests: {layer.name}")
    # From inside the folder: pytest puts the current folder on sys.path, and the checkout must never be there
    # together with the host, whose `nodes` and `tests` have the same names.
    python = ensure_fleet(TESTED) if layer.folder == "fleet" else host.python
    command = [str(python), "-m", "pytest", f"--junitxml={report}", *layer.files, *arguments]
    folder = ROOT / "tests" / layer.folder
    if aside:
        with tempfile.TemporaryFile() as said:
            code = run_child(command, host, folder, said, layer.front)
            said.seek(0)
            text = said.read().decode(errors="replace")
        say(f"== tests: {layer.name}\n{text.rstrip()}")
    else:
        code = run_child(command, host, folder, front=layer.front)
    counts = junit_counts(report) or (0, 0, 0)
    good = code == 0 or (code == 5 and bool(arguments))  # 5: nothing selected, which is all right with a -k
    line = "{} passed, {} failed, {} skipped".format(*counts)
    line += f", {duration(time.monotonic() - started)}" + ("" if good else f", pytest ended with status {code}")
    return good, counts, f"{layer.name + ':':13} {line}"


def chosen_layers(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The names of the layers that `run.py test` was asked for, and what is left for pytest. `--all-cases` is told to the tests by
    the environment (tests/core/sampled.py)."""
    if "--all-cases" in arguments:
        os.environ["ADASTATE_CASES"] = "all"
        arguments = [each for each in arguments if each != "--all-cases"]
    names = [*test_layers(ROOT / "tests"), "bounds"]
    if arguments and arguments[0] == "quick":
        return QUICK, ["-m", "quick", *arguments[1:]]
    if arguments and arguments[0].isidentifier():
        if arguments[0] not in names:
            raise SetupError(
                f"There is no folder tests/{arguments[0]} with a pytest.ini; there are: {', '.join(names)}, and quick."
            )
        return arguments[:1], arguments[1:]
    return names, arguments


def test(arguments: list[str]) -> int:
    """Style, then every layer of tests, each in a process of its own."""
    names, arguments = chosen_layers(arguments)
    host = ensure_ready(TEST_MODULES)
    CACHE.mkdir(exist_ok=True)
    layers = [Layer(name, name) for name in names if name != "bounds"]
    if any(layer.folder == "fleet" for layer in layers):  # before two layers run at a time
        ensure_fleet(TESTED)
    layers += bounds_layers(host) if "bounds" in names else []
    say(f"== {versions_line(host)}")
    say("== style")
    checks = (["check"], ["format", "--check"])
    apart = [".", "--extend-exclude", ".cache"]  # the unpacked host; .gitignore says so too, but only to a git checkout
    bad_style = any([run_child([str(host.python), "-m", "ruff", *each, *apart], host) for each in checks])
    results = run_layers(layers, host, arguments)
    say(f"\n{'style:':13} {'failed' if bad_style else 'passed'}")
    for _, _, line in results:
        say(line)
    passed, failed, skipped = (sum(counts[i] for _, counts, _ in results) for i in range(3))
    say(f"total: {passed} passed, {failed} failed, {skipped} skipped")
    return int(bad_style or not all(good for good, _, _ in results))


def run_layers(layers: list[Layer], host: Host, arguments: list[str]) -> list[tuple[bool, tuple[int, int, int], str]]:
    """What `run_layer` says of each, in order; two run at a time where there are two processors."""
    lanes = min(2, os.cpu_count() or 1, len(layers))
    if lanes < 2:
        return [run_layer(layer, host, arguments) for layer in layers]
    say(f"== tests: {', '.join(layer.name for layer in layers)}; {lanes} at a time, each shown when it has ended")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    first = sorted(layers, key=lambda layer: SLOWEST.index(layer.name) if layer.name in SLOWEST else len(SLOWEST))
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        ended = pool.map(lambda layer: run_layer(layer, host, arguments, aside=True), first)
        by_layer = dict(zip(first, ended, strict=True))
    return [by_layer[layer] for layer in layers]


def faults(arguments: list[str]) -> int:
    """Fault injection: what a streamed run asks of the system, then every operation of a chunk (tests/core/faults)."""
    host = ensure_ready(TEST_MODULES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    row, ended = CACHE / "faults" / "stream.json", []
    if not arguments:
        row.parent.mkdir(parents=True, exist_ok=True)
        row.unlink(missing_ok=True)
        os.environ |= {"ADASTATE_FAULTS": "all", "ADASTATE_CASES": "all", "ADASTATE_FAULTS_ROW": str(row)}
        ended.append(not run_layer(Layer("host", "host"), host, ["test_faults.py"])[0])
        arguments = ["--row", str(row)]
    ended.append(run_child([str(host.python), "-m", "faults", *arguments], host, ROOT / "tests" / "core"))
    return int(any(ended))


def campaign(arguments: list[str]) -> int:
    """All trials of the campaign's parts, each file of tests in a process of its own (tests/core/campaign.py)."""
    options, known = campaigns.parser().parse_args(arguments), campaigns.parts(ROOT / "tests")
    if unknown := [name for name in options.names if name not in known]:
        raise SetupError(f"There is no part {unknown[0]}; there are: {', '.join(known)}.")
    if options.only:
        campaigns.check_only(options.only)
    host, kept, good = ensure_ready(TEST_MODULES), CACHE / "campaign", True
    kept.mkdir(parents=True, exist_ok=True)
    kinds = kept / "kinds.txt"
    kinds.unlink(missing_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"ADASTATE_CAMPAIGN_SEED": str(options.seed), "ADASTATE_CAMPAIGN_KINDS": str(kinds)}
    os.environ |= {"ADASTATE_CAMPAIGN_ONLY": options.only} if options.only else {"ADASTATE_CAMPAIGN": str(kept)}
    for name in options.names or known:
        books = kept / f"{name}.jsonl"
        if options.fresh and not options.only:
            books.unlink(missing_ok=True)
        for path in known[name]:
            layer = Layer(f"campaign {name}, {path.parent.name}", path.parent.name, (path.name,))
            good &= run_layer(layer, host, ["-s"])[0]
            if not options.only:
                campaigns.write_page(name, books, options.seed)
    if options.only and good:
        campaigns.check_found(options.only, kinds)
    return int(not good)


def fleet(arguments: list[str]) -> int:
    """Run a table of videos: fleet/, in an environment of its own. It gets Ctrl-C itself: the first one is not an end."""
    far = any(each.partition("=")[0] in ("--address", "--host") for each in arguments)
    env = child_env()
    if not (far or {"-h", "--help", "--check"} & {*arguments}):  # else the hosts are none of this machine's business
        host = ensure_ready()
        env |= host.env() | {"COMFYUI_PYTHON": str(host.python)}
    python = ensure_fleet(*([DASHBOARD] if "--dashboard" in arguments else []))
    command, env = [str(python), "-m", "fleet", *arguments], env | {"PYTHONPATH": str(ROOT)}
    if os.name == "nt":
        return subprocess.run(command, env=env).returncode
    sys.stdout.flush()
    os.execve(command[0], command, env)  # noqa: S606  in this process' place, so that every signal is its own
    raise AssertionError("execve returns only by an error")


def choose(kind: str, folder: Path, names: list[str]) -> list[str]:
    """`names`, or all scripts of this folder if none is named; a sentence that lists them if one is unknown."""
    known = sorted(path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    if unknown := [name for name in names if name not in known]:
        raise SetupError(f"There is no {kind} {unknown[0]}; there are: {', '.join(known) or 'none'}.")
    return names or known


def bench(arguments: list[str]) -> int:
    """Run benchmarks one after the other."""
    names = choose("benchmark", ROOT / "benchmarks", [name.removesuffix(".py") for name in arguments])
    host = ensure_ready()
    return max(
        [run_child([str(host.python), str(Path("benchmarks", f"{name}.py"))], host) for name in names], default=0
    )


def train(arguments: list[str]) -> int:
    """Run a stage of the training."""
    if not arguments:
        raise SetupError(f"Name a stage: {', '.join(choose('stage', ROOT / 'training', []))}.")
    choose("stage", ROOT / "training", arguments[:1])
    host = ensure_ready()
    return run_child([str(host.python), "-m", f"training.{arguments[0]}", *arguments[1:]], host)


def setup(arguments: list[str]) -> int:
    """Set up, and say where things are."""
    host = ensure_ready()
    say(f"Ready. ComfyUI: {host.path}\nPython: {host.python}")
    return 0


COMMANDS = {
    "demo": demo,
    "serve": serve,
    "selftest": selftest,
    "test": test,
    "faults": faults,
    "campaign": campaign,
    "fleet": fleet,
    "bench": bench,
    "train": train,
    "setup": setup,
}


def main(arguments: list[str]) -> int:
    """Run one command."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this is how a user learns it)
        say(f"run.py needs Python 3.10 or newer, and this is {sys.version.split()[0]}.")
        return 2
    if not arguments or arguments[0] not in COMMANDS:
        say(str(__doc__).strip())
        return 0 if arguments and re.fullmatch("-h|--help|help", arguments[0]) else 2
    for name in ("SIGTERM", "SIGHUP"):  # so that what was started is ended too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except SetupError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
