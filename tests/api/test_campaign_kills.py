"""kill -9 of a real server at any instant of a streamed rollout: its files play, the newest state that the next server lists goes
on to the bits of a run that nobody killed, and nothing is left lying about."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
import wave
from pathlib import Path

import pytest
from bit_equal import decoded, differences, distance
from conftest import WORKFLOWS, report_of, workflow
from sounds import lag, played, siren

from adastate_core.rollout import RolloutState
from adastate_core.states.state_file import load_state

FEATURES = ("autosave", "transitions", "absorption", "8-bit cache", "steering", "sound")
CODECS = {"h264": ".mp4", "ffv1": ".mkv", "prores": ".mov"}
FRAMES = ("", "", "png", "tiff16")
SUFFIXES = {"png": ".png", "tiff16": ".tiff"}
RATE, FPS, SECONDS = 16_000, 16, 20.0
ENDLESS, NEAR = 2001, 0.1
STATE = ".state.safetensors"


class Wanted:
    """A prompt that is drawn: `feature` and what its files are."""

    def __init__(self, number: int, luck: random.Random) -> None:
        self.feature, self.name = FEATURES[number % len(FEATURES)], f"kills{number}"
        self.codec, self.frames = luck.choice(list(CODECS)), luck.choice(FRAMES)
        self.dtype = luck.choice(("fp8", "int8"))
        self.transitions = luck.choices(("cut", "recache", "soft", "flush"), k=2)
        self.history = luck.choice((0, 2))
        self.text = "0s meadow, slow, crimson balloon"
        if self.feature == "transitions":
            one, two = self.transitions
            self.text += f"\n0.8s {{{one}}} snow\n2s {{{two}}} city, gold balloon"

    def prompt(self, length: int, text: str = "", state: str = "", place: str = "run") -> dict:
        """Of a run of so many frames; from a state, joined, where one is given. Its own state stays."""
        made = workflow(
            "prompt_timeline", n3__text=text or self.text, n4__codec=self.codec, n4__autosave_seconds=0.05, n4__join=True,
            n4__filename_prefix=f"{self.name}/{place}", n4__history_chunks=self.history, n4__history_states=2,
            n4__keep_state=True, n5__length=length, n5__width=32, n5__height=32, n5__steps=1,
        )  # fmt: skip
        if self.feature == "8-bit cache":
            made["5"]["inputs"]["cache_dtype"] = self.dtype
        if self.feature == "absorption":
            given = json.loads((WORKFLOWS / "absorption.json").read_text())["4"]["inputs"]
            given |= {"warmup_frames": 9, "local_window_frames": 2, "rank": 8}
            made["20"] = {"class_type": "AdaStateAbsorption", "inputs": given}
            made["5"]["inputs"] |= {"absorption": ["20", 0], "window_frames": 12}
        if self.feature == "sound":
            made["21"] = {"class_type": "AdaStateLoadSound", "inputs": {"file": "kills.wav"}}
            made["4"]["inputs"]["audio"] = ["21", 0]
        if self.frames:
            frames = json.loads((WORKFLOWS / "stream_to_frames.json").read_text())["6"]
            frames["inputs"] |= {"filename_prefix": f"{self.name}/{place}-frames", "format": self.frames, "join": True}
            made |= {"22": frames}
            made["5"]["inputs"]["stream"] = ["22", 0]
        if state:
            made["23"] = {"class_type": "AdaStateLoadState", "inputs": {"file": state}}
            made["5"]["inputs"]["resume"] = ["23", 0]
        return made

    def shown(self, path: Path) -> list:
        """The pictures of a video or of a folder of frames; whatever does not decode raises."""
        if path.suffix != ".frames":
            return list(decoded(path))
        files = sorted(path.glob(f"*{SUFFIXES[self.frames]}"))
        assert [int(each.stem) for each in files] == list(range(len(files)))
        return [next(decoded(each)) for each in files]


def killed(client, wanted: Wanted, wait: float) -> None:
    """Have it rolled out, and the server killed so many seconds after the first state is there; steered on the way."""
    prompt_id, folder = client.queue(wanted.prompt(ENDLESS)), client.output / wanted.name
    end = time.monotonic() + 300
    while not list(folder.glob(f"*{STATE}")):
        client.server.check_alive()
        assert time.monotonic() < end, "no state"
        time.sleep(0.02)
    until = time.monotonic() + wait
    if wanted.feature == "steering":
        for what in ({"prompt": "snow", "transition": wanted.transitions[0]}, {"seed": 11, "prompt": "gold balloon"}):
            answer = client.server.request("/adastate/steer", {"prompt_id": prompt_id, "node_id": "5"} | what)
            assert "steer" in answer, answer
            time.sleep(max(0.0, min(wait / 3, until - time.monotonic())))
    time.sleep(max(0.0, until - time.monotonic()))
    client.kill()


def newest(client, wanted: Wanted) -> str:
    """The first state that a server lists."""
    info = client.server.request("/object_info/AdaStateLoadState")["AdaStateLoadState"]
    first = json.loads(json.dumps(info["input"]["required"]["file"]))
    names = [
        name for name in re.findall(r'"([^"]+\[output\])"', json.dumps(first)) if name.startswith(f"{wanted.name}/")
    ]
    assert names, "no state is listed"
    return names[0]


def files_of(client, wanted: Wanted, report: dict) -> list[Path]:
    return [client.output / name for name in (*report["videos"], *report.get("frame_folders", []))]


def kill_and_go_on(client, wanted: Wanted, wait: float) -> dict[str, float]:
    """One trial; what was seen of it."""
    killed(client, wanted, wait)
    folder = client.output / wanted.name
    ended = [
        folder / f"run_00001_{CODECS[wanted.codec]}",
        *([folder / "run-frames_00001_.frames"] if wanted.frames else []),
    ]
    before = [wanted.shown(path) for path in ended]
    client.start()
    name = newest(client, wanted)
    state = load_state(client.output / name.removesuffix(" [output]"))
    counted = 4 * state.emitted - 3
    assert min(map(len, before)) >= counted, f"{counted} frames are counted, and {list(map(len, before))} shown"
    length, text = counted + 24, state.steered.get("timeline", "")
    outputs = client.run(wanted.prompt(length, text, name))
    require_no_litter(client, wanted)
    whole = client.run(wanted.prompt(length, text, place="whole"))
    reports = [report_of(each) for each in (outputs, whole)]
    states = [load_state(client.output / each["state"].removesuffix(" [output]")) for each in reports]
    require_same_states(*states, wanted)
    for path, other, old in zip(
        files_of(client, wanted, reports[0]), files_of(client, wanted, reports[1]), before, strict=True
    ):
        joined, straight = wanted.shown(path), wanted.shown(other)
        assert len(joined) == len(straight) == length
        exact = length if path.suffix in (".frames", ".mkv") else counted
        far = [i for i in range(length) if distance(joined[i], straight[i]) > (0.0 if i < exact else NEAR)]
        assert not far, f"frames {far} of {path.name} are others than those of {other.name}"
        # what is steered after the newest state is not told by it
        shown = min(len(old), counted if wanted.feature == "steering" else length)
        assert not [i for i in range(shown) if distance(old[i], straight[i])], "what was killed showed others"
    if wanted.feature == "sound":
        found, rate = played(files_of(client, wanted, reports[0])[0])
        heard = siren(RATE, SECONDS)[:, : found.shape[1]]
        assert rate == RATE and 0 <= found.shape[1] / rate - length / FPS < 1024 / rate + 0.001
        assert lag(found[0][: heard.shape[1]], heard[0]) == 0
    shutil.rmtree(folder)
    return {"frames_that_played": min(map(len, before)), "latents_gone_on_from": state.emitted}


def require_same_states(one: RolloutState, other: RolloutState, wanted: Wanted) -> None:
    ignored = ("steered",) if wanted.feature == "steering" else ()
    bad = [name for name in differences(one, other) if name not in ignored]
    assert not bad, f"of the state differ: {', '.join(bad)}"


def require_no_litter(client, wanted: Wanted) -> None:
    """Files, states and reports of the two runs, and nothing hidden anywhere."""
    folder, ends = client.output / wanted.name, (CODECS[wanted.codec], ".frames", STATE, ".history", ".report.json")
    known = re.compile(rf"run(-frames)?_0000[12]_({'|'.join(map(re.escape, ends))})")
    left = [each.name for each in folder.iterdir() if not known.fullmatch(each.name)]
    hidden = [each.name for each in client.output.rglob(".*")] + [each.name for each in client.output.rglob("*.tmp")]
    assert not left and not hidden, f"left are {left + hidden}"


@pytest.fixture
def song(client) -> None:
    with wave.open(str(client.folder / "base" / "input" / "kills.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((siren(RATE, SECONDS).T * 32767).round().astype("<i2").tobytes())


def test_a_killed_server_loses_nothing(client, song, campaign):
    for trial in campaign("kill -9 of a real server", full=40, sample=1):
        with trial:
            if client.server.process.poll() is not None:  # a trial before ended between a kill and a start
                client.start()
            wanted = Wanted(trial.number, trial.chance)
            trial.saw(**kill_and_go_on(client, wanted, trial.chance.uniform(0.0, 2.5)))
