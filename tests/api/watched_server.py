"""A server that is tried to be misled: who hears what, what its log says, where files come to lie, and whether it still answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign import Trial
from conftest import Client, error_of, workflow
from graph_fuzz import MARK

from tools.host_client import Events
from tools.setup_host import ROOT, SetupError

EVERY = 50  # trials after which the folders are looked at
QUICK = 20.0  # s within which the server answers, on a machine where twenty others work
LONGEST, SOONEST = 5.0, 90.0  # s: a run is interrupted after the first, and over within the second
ALWAYS = {"status"}  # what the host tells every socket
# what the host tells every socket of a prompt that was queued without a client_id
OF_NOBODY = {"progress", "progress_state", "execution_error", "execution_interrupted"}
OURS = ("ComfyUI-AdaState", f"{ROOT}{os.sep}nodes", f"{ROOT}{os.sep}adastate_core")
# what only Python, torch and their kin say
MACHINE = re.compile(
    r"\b(Traceback|[A-Z]\w+(Error|Exception)\b|NoneType)|object (is|has) n|'(int|str|list|dict|float|bool|tuple|Tensor)' object|"
    r"<[\w.]+ object at|dictionary update sequence|not subscriptable|to unpack|positional argument|keyword argument|"
    r"index out of range|index \d+ is out|invalid literal|could not convert|unsupported operand|not supported between|"
    r"must be real|size of tensor|shapes cannot|Sizes of tensors|Given groups|math domain|can't convert|codec can't|"
    r"not iterable|^'[^']*'$|Expected (all|size|tensor)|arg is an empty|null (byte|character)|surrogates not|Errno|\btorch\.|"
    r"recursion depth|required positional|unhashable|cannot be interpreted|mat1|invalid for input of size|Expecting value"
)

_THREAD_ENDED = "Exception in thread"
_CHAINED = "above exception"  # between the tracebacks of one failure and of what it led to


class HostEndedError(Exception):
    """The host's own thread that runs prompts is over, by a failure of the host's."""


class Listener:
    """A socket that is read all the time; what it heard, until it is taken."""

    def __init__(self, port: int, client_id: str) -> None:
        self.name, self._heard, self._lock, self._over = client_id, [], threading.Lock(), False
        self._events = Events(port, client_id)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over and self._events.socket:
            for opcode, payload in self._events.frames(0.2):
                with self._lock, contextlib.suppress(ValueError):
                    if opcode == 2:
                        self._heard.append(("picture", None))
                    elif opcode == 1:
                        message = json.loads(payload)
                        data = message.get("data") if isinstance(message.get("data"), dict) else {}
                        self._heard.append((message.get("type"), data.get("prompt_id")))

    def take(self) -> list[tuple[str, str | None]]:
        """(type of the message, its prompt_id) of all that came since the last time; a binary message is a "picture"."""
        with self._lock:
            heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        self._over = True
        self._thread.join(5)
        self._events.close()


class Watched:
    """What the trials ask of the server, and what is looked at after each."""

    def __init__(self, client: Client) -> None:
        self.client, self.tried, self.slowest, self.messages = client, 0, 0.0, Counter()
        self.owned: set[str] = set()  # prompts of the owner's
        self.nobodys: set[str] = set()  # prompts without a client_id
        self.begin()
        self.idle(SOONEST)  # what other tests queued
        self._unheard()
        self._prime()
        self._outside = self._files()

    # ---- the server itself

    def begin(self) -> None:
        """Connect to a server that has just started."""
        self.port = self.client.server.port
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self._read = self.client.server.log.stat().st_size
        self.owner, self.stranger, self.nameless = (Listener(self.port, each) for each in ("owner", "stranger", ""))
        self.info = json.loads(self.ask("GET", "/object_info")[1])

    def _prime(self) -> None:
        """A state, an absorption and a sound, for the nodes that load such files."""
        self.sound = self.client.folder / "base" / "input" / f"{MARK}.wav"
        with wave.open(str(self.sound), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(b"\0\1" * 8000)
        prompt = workflow(
            "long_video", n5__length=5, n5__width=32, n5__height=32, n5__steps=1, n4__filename_prefix="given"
        )
        _, answer = self.queue({"prompt": prompt})
        assert self.entry(answer["prompt_id"], 300)["status"]["status_str"] == "success", answer
        self.info = json.loads(self.ask("GET", "/object_info")[1])

    def close(self) -> None:
        for each in (self.owner, self.stranger, self.nameless):
            each.close()
        self.sound.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove what runs left in output and temp, but not what was there."""
        for path in sorted(self._inside() - self._kept, reverse=True):
            with contextlib.suppress(OSError):
                path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()
        self.ask("POST", "/history", b'{"clear": true}')

    def restart(self) -> None:
        """After its end, whosever fault that was."""
        for each in (self.owner, self.stranger, self.nameless):
            each.close()
        self.client.kill()
        self.client.start()
        self.begin()

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """(status, body), over a connection that stays."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        for again in (True, False):
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, OSError):
                self._connection.close()
                if not again:
                    raise
        raise AssertionError("not reached")

    # ---- prompts

    def queue(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """POST /prompt; (status, answer), `answer` with the text where it is no JSON."""
        status, got = self.ask("POST", "/prompt", json.dumps(body).encode())
        try:
            answer = json.loads(got)
        except ValueError:
            answer = {"text": got.decode(errors="replace")[:300]}
        if "prompt_id" in answer:
            client = body.get("client_id", (body.get("extra_data") or {}).get("client_id"))
            (self.owned if client == "owner" else self.nobodys if client is None else set()).add(answer["prompt_id"])
        return status, answer

    def entry(self, prompt_id: str, longest: float = LONGEST) -> dict[str, Any]:
        """The history's entry once the prompt is over; interrupted after `longest` seconds."""
        begun, asked = time.monotonic(), False
        while (passed := time.monotonic() - begun) < longest + SOONEST:
            self.client.server.check_alive()
            if entry := json.loads(self.ask("GET", "/history?max_items=1")[1]).get(prompt_id):
                return entry
            if passed > longest and not asked:
                asked = True
                self.ask("POST", "/interrupt", b"{}")
            if passed > 1 and _THREAD_ENDED in self.new_log() and self.hosts_own():
                raise HostEndedError(self.new_log()[-900:])
            time.sleep(0.01 if passed < 1 else 0.1)
        raise AssertionError(
            f"prompt {prompt_id!r} was not over {SOONEST} s after an interrupt: {self.new_log()[-1500:]}"
        )

    # ---- what is looked at

    @contextlib.contextmanager
    def watching(self, trial: Trial) -> Iterator[str]:
        """For the inside of a trial: afterwards all is looked at, and files every so many trials. A server that is gone is started
        again; what a broken trial left under way is ended, so that it is not laid to the next."""
        what, self.slowest = f"{trial.kind} {trial.number}", 0.0
        try:
            yield what
            self.check(what)
            self.tried += 1
            if self.tried % EVERY == 0:
                self.check_files(what)
        except Exception:
            self._settle()
            raise
        finally:
            trial.saw(ms_until_it_answers=round(1000 * self.slowest))

    def end_all(self) -> None:
        """Nothing runs or waits any more."""
        for path in ("/queue", "/interrupt"):
            self.ask("POST", path, b'{"clear": true}')
        self.idle(SOONEST)

    def _settle(self) -> None:
        try:
            self.end_all()
        except (AssertionError, OSError, http.client.HTTPException, SetupError):
            self.restart()
        self._read = self.client.server.log.stat().st_size
        self._unheard()

    def _unheard(self) -> None:
        for listener in (self.owner, self.stranger, self.nameless):
            listener.take()

    def waiting(self) -> int:
        """How many prompts run or wait."""
        return json.loads(self.ask("GET", "/prompt")[1])["exec_info"]["queue_remaining"]

    def idle(self, seconds: float) -> None:
        """Wait until nothing runs or waits."""
        end = time.monotonic() + seconds
        while self.waiting():
            self.client.server.check_alive()
            assert time.monotonic() < end, f"something runs {seconds} s after an interrupt: {self.new_log()[-1500:]}"
            time.sleep(0.05)

    def new_log(self) -> str:
        """What the server has written since it was last looked at."""
        with self.client.server.log.open("rb") as file:
            file.seek(self._read)
            return file.read().decode(errors="replace")

    def hosts_own(self) -> bool:
        """Whether a failure that was just answered is the host's: its log has a traceback, and none names a file of the pack."""
        found = tracebacks(self.new_log())
        return bool(found) and not any(is_ours(under_way) for under_way, _ in found)

    def check(self, what: str) -> None:
        """Alive, quick, nothing of Python's in its log from the pack, and nobody heard what is not theirs."""
        self.client.server.check_alive()
        begun = time.monotonic()
        status, _ = self.ask("GET", "/system_stats")
        took = time.monotonic() - begun
        self.slowest = max(self.slowest, took)
        assert status == 200 and took < QUICK, (what, status, took)
        with self.client.server.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        check_log(text.decode(errors="replace"), what)
        self.check_heard(what)

    def check_heard(self, what: str) -> None:
        """No event of the pack's and no picture at sockets that queued nothing; of a prompt only what the host tells everybody."""
        for listener in (self.stranger, self.nameless):
            for kind, prompt in listener.take():
                told = kind in ALWAYS or kind in OF_NOBODY and (prompt is None or prompt in self.nobodys)
                assert told, f"{listener.name or 'a nameless socket'} heard {kind} of prompt {prompt!r}: {what}"
        for kind, prompt in self.owner.take():
            if prompt is not None and prompt not in self.owned:
                assert kind in OF_NOBODY and prompt in self.nobodys, f"the owner heard {kind} of {prompt!r}: {what}"

    def check_files(self, what: str) -> None:
        """Nothing new but in output and temp; what lies there is removed, unless a run is under way that may be writing it."""
        new = self._files() - self._outside
        if not self.waiting():
            self.clean()
        assert not new, f"{sorted(map(str, new))[:5]} came to be: {what}"

    def _inside(self) -> set[Path]:
        return {
            path for folder in (self.client.output, self.client.folder / "base" / "temp") for path in folder.rglob("*")
        }

    def _files(self) -> set[Path]:
        """All that lies in the server's folders but for output and temp, in the checkout's code, and marked names above them."""
        if not hasattr(self, "_kept"):
            self._kept = self._inside()
        folder, base = self.client.folder, self.client.folder / "base"
        found = set(folder.iterdir()) | set(base.iterdir()) | set(base.joinpath("custom_nodes").iterdir())
        found |= {path for name in ("input", "user", "models") for path in base.joinpath(name).rglob("*")}
        for name in ("adastate_core", "nodes", "models", "web", "locales", "workflows"):
            found |= {path for path in ROOT.joinpath(name).rglob("*") if "__pycache__" not in path.parts}
        places = {*folder.parents, ROOT, *ROOT.parents, self.client.host.path, Path.home(), Path("/tmp"), Path.cwd()}
        for place in places:
            with contextlib.suppress(OSError):
                found |= {place / name for name in os.listdir(place) if MARK in name}
        log = (base / "user").glob("*.db*")
        return found - {folder / "server.log", *log}


def tracebacks(text: str) -> list[tuple[str, str]]:
    """(what was under way, the last line) of every traceback of a log; of those that one failure led to, the last one alone."""
    found, lines, begun = [], text.splitlines(), []
    for begin, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last):"):
            end = begin + 1
            while end < len(lines) and (lines[end].startswith((" ", "\t")) or not lines[end].strip()):
                end += 1
            begun += lines[begin:end]
            if not any(_CHAINED in each for each in lines[end : end + 4]):
                found.append(("\n".join(begun), lines[end] if end < len(lines) else ""))
                begun = []
    return found


def is_ours(text: str) -> bool:
    """Whether a traceback names a file of the pack."""
    return any(each in text for each in OURS)


def check_log(text: str, what: str) -> None:
    """Of the pack's tracebacks each has to end with a sentence: the host writes them for every failure that it tells a user."""
    for under_way, last in tracebacks(text):
        kind, _, sentence = last.partition(": ")
        if is_ours(under_way):
            assert not MACHINE.search(sentence) and kind.rpartition(".")[2] != "AssertionError", (
                what,
                last,
                under_way[-900:],
            )
    for line in text.splitlines():
        # of a client whose feature flags are none the host cannot say whether it takes pictures
        if "could not be" in line and not line.startswith((" ", "*", "Failed", "invalid prompt", "a chunk's preview")):
            assert not MACHINE.search(line), (what, line)


def check_refusal(answer: dict[str, Any], what: str, in_circle: bool) -> None:
    """What POST /prompt says of the pack's nodes is a sentence, and no exception of theirs."""
    for name, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            more = error.get("extra_info") or {}
            if error["type"].startswith("exception_during"):
                if more.get("exception_type") == "RecursionError" and in_circle:
                    continue  # the host goes round until its stack ends, wherever that is
                assert not is_ours("".join(more.get("traceback", []))), (what, name, node["class_type"], error)
            elif error["type"] == "custom_validation_failed" and str(node["class_type"]).startswith("AdaState"):
                sentence = error["details"].partition(" - ")[2]
                assert sentence and not MACHINE.search(sentence), (what, name, node["class_type"], error["details"])


def failure(entry: dict[str, Any]) -> tuple[str, str] | None:
    """(class of the node, what it said) of an error that came through the pack; None for a success, or another's error."""
    error = error_of(entry)
    if error.get("event") != "execution_error":
        return None
    kind = str(error.get("node_type"))
    if not kind.startswith("AdaState") and not is_ours("".join(error.get("traceback", []))):
        return None
    return kind, f"{error['exception_type']}: {error['exception_message'].strip()}"
