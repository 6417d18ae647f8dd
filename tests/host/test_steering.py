"""A run that is steered between its chunks, through the node, and the run of the timeline that it then tells: the same bits.

semantics: Steered while it is made
"""

from __future__ import annotations

import json
import shutil
import threading
import zlib
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes.host import live_runs as live
from adastate_pack.nodes.host import rerun
from adastate_pack.nodes.host.steer_wishes import Wish
from adastate_pack.nodes.output import StreamOutput
from adastate_pack.nodes.steering import Refused, Steering
from adastate_pack.nodes.timeline_sources import NOT_LIVE
from comfy_execution.utils import CurrentNodeContext
from PIL import Image

LENGTH, CHUNKS = 93, 8  # 24 latents


class Encoder:
    """A CLIP whose embeddings are drawn from the text's checksum. `held`: what a word waits for before it is encoded."""

    def __init__(self, device="cpu"):
        self.patcher = SimpleNamespace(load_device=torch.device(device))
        self.threads, self.held = {}, {}

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        if text in self.held:
            assert self.held[text].wait(60)
        if "broken" in text:
            raise RuntimeError("the encoder broke")
        self.threads[text] = threading.current_thread().name
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return [[torch.randn(1, 3, 4096, generator=generator), {}]]


@pytest.fixture
def script(monkeypatch):
    """`script[n]`: what is done, in a thread of its own, when n chunks of a run are generated and before the run looks at what
    waits. `script.steering` is the newest run's; a step in `script.failing[n]` fails then."""
    told = Script()
    between = Steering.between

    def hooked(steering, rollout):
        for act in told.acts.pop(rollout.generated, ()):
            thread = threading.Thread(target=told.run, args=(act,))
            thread.start()
            thread.join()
        if step := told.failing.get(rollout.generated):
            with monkeypatch.context() as patch:
                raising_once(patch, *step)
                between(steering, rollout)
            return
        if told.waits:  # what is encoded beside is there at the next gap at the latest
            told.all_encoded()
        between(steering, rollout)

    begin = Steering.__init__

    def begun(steering, *arguments):
        told.steering = steering
        begin(steering, *arguments)

    monkeypatch.setattr(Steering, "__init__", begun)
    monkeypatch.setattr(Steering, "between", hooked)
    return told


class Script:
    def __init__(self):
        self.acts, self.answers, self.waits, self.steering, self.failing = {}, [], True, None, {}

    def at(self, chunk, *wishes):
        for wish in wishes:
            self.acts.setdefault(chunk, []).append(lambda wish=wish: self.steering.ask(wish))

    def all_encoded(self) -> None:
        for asked in list(self.steering._waiting):
            if not asked.ready:
                asked.encoding.exception(60)

    def run(self, act):
        try:
            self.answers.append(act())
        except Refused as refused:
            self.answers.append((refused.status, str(refused)))


def timeline(node, clip, text="0s a meadow", **inputs):
    return node("AdaStatePromptTimeline")(
        clip=clip, text=text, **({"live": True, "shared": "film of {}"} | inputs)
    ).args[0]


def report_of(outputs):
    return json.loads(outputs[2])


TEN = {
    1: [Wish(prompt="a desert", transition="recache")],
    2: [Wish(seed=7), Wish(strength=0.5)],
    3: [Wish(prompt="snow", transition="soft", strength=0.25)],
    4: [Wish(prompt="a city {at night}", transition="cut"), Wish(seed=2**64 - 1)],
    5: [Wish(prompt="never seen"), Wish(prompt="9 trees\n2 birds", transition="flush")],
    6: [Wish(prompt="a river", transition="rope cut", seed=0), Wish(strength=1.0)],
}


def test_ten_changes_in_one_run_are_those_of_the_timeline_that_it_tells(rollout, node, script):
    clip, anchor = Encoder(), node("AdaStateAnchorAdaptive")(state_frames=1).args[0]
    text = "0s a meadow\n2.3s {seed 3} fields\n5s a lake"  # at 2.25 s, of chunk 3, an entry is changed that there is
    for chunk, wishes in TEN.items():
        script.at(chunk, *wishes)
    steered = rollout(length=LENGTH, anchor=anchor, positive=timeline(node, clip, text)).args
    told = report_of(steered)["steering"]
    assert script.answers == list(range(1, 11))
    assert [done["id"] for done in told["done"]] == script.answers
    assert ["error" in done for done in told["done"]] == [False] * 6 + [True] + [False] * 3
    assert [done["at"] for done in told["done"]] == [0.75, 1.5, 1.5, 2.25, 3.0, 3.0, None, 3.75, 4.5, 4.5]
    assert clip.threads["film of a desert"] != threading.current_thread().name
    assert told["done"][7]["transition"] == "flush" and told["done"][0]["seconds_to_picture"] is None

    plain = timeline(node, clip, told["timeline"], live=False)
    whole = rollout(length=LENGTH, anchor=anchor, positive=plain).args
    assert whole[0]["samples"].equal(steered[0]["samples"])
    assert "steering" not in report_of(whole)
    unsteered = rollout(length=LENGTH, anchor=anchor, positive=timeline(node, clip, text)).args[0]["samples"]
    assert [unsteered[:, :, i : i + 3].equal(whole[0]["samples"][:, :, i : i + 3]) for i in (0, 3, 6)] == [
        True,
        False,
        False,
    ]

    first = rollout(length=45, anchor=anchor, positive=plain).args  # in the middle, with a chunk cut in two
    rest = rollout(length=LENGTH, anchor=anchor, positive=plain, resume=first[1]).args
    assert rest[0]["samples"].equal(whole[0]["samples"])
    assert "steered" not in " ".join(report_of(rest)["warnings"])

    assert (
        steered[1].steered["timeline"] == told["timeline"] and steered[1].steered["changes"][0]["prompt"] == "a desert"
    )
    longer = dict(length=LENGTH + 12, anchor=anchor, resume=steered[1])
    for positive, warned in (
        (timeline(node, clip, text), True),
        (plain, False),
        (node("AdaStateDemoPrompt")(terrain="snow", pace="slow", balloon="gold", lantern="lantern").args[0], True),
    ):
        warnings = " ".join(report_of(rollout(positive=positive, **longer).args)["warnings"])
        assert (
            "the state's video was steered while it was made (at 0.75, 1.5, 2.25, 3, 3.75, 4.5 s)" in warnings
        ) is warned


def test_a_streamed_run_is_paused_and_goes_on_with_what_it_was_told(
    rollout, node, stream, script, written, monkeypatch
):
    """The last word before a pause holds from where the run goes on; a picture is waited for; the demo's words leave words as they
    were, also those that come later in the timeline."""
    text = "0s snow, gold balloon\n3s lantern"
    demo = node("AdaStateDemoTimeline")(text=text).args[0]
    script.at(1, Wish(prompt="city", strength=0.5))
    script.at(2, Wish(prompt="meadow", transition="cut"))
    script.at(3, Wish(prompt="white balloon"), Wish(pause=True))
    script.at(3, Wish(seed=1))
    inputs = dict(length=LENGTH, anchor=node("AdaStateAnchorAdaptive")(state_frames=1).args[0])
    paused = rollout(positive=demo, stream=stream(), **inputs).args
    report = report_of(paused)
    assert report["stopped"] == {"frame": 33, "of": LENGTH, "by": "pause"} and report["ended"] == "stopped"
    done = report["steering"]["done"]
    assert [one["seconds_to_picture"] is not None for one in done] == [True, True, False, False, False]
    assert [one["at"] for one in done] == [0.75, 1.5, 2.25, 2.25, 2.25]
    assert script.steering.view.paused and script.steering.describe()["waiting"] == []
    with pytest.raises(Refused, match="the run is ending"):
        script.steering.ask(Wish(seed=1))

    shown = node("AdaStateLoadState")(file=report["state"]).ui.value  # whoever is killed leaves no report
    assert shown.endswith(f"steered while it was made; the timeline that has it all:\n{report['steering']['timeline']}")
    again = node("AdaStateDemoTimeline")(text=report["steering"]["timeline"]).args[0]
    assert [entry.text for entry in again.entries][-1] == "meadow terrain, steady pace, white balloon, lantern"
    rollout(positive=again, stream=stream(join=True), resume=paused[1], **inputs)
    pieces = torch.cat(written)
    written.clear()
    whole = rollout(positive=again, stream=stream(), **inputs).args
    assert torch.equal(torch.cat(written), pieces) and "steering" not in report_of(whole)

    with monkeypatch.context() as patch:  # while the old frames are joined and none is new: from the second chunk on
        opened = StreamOutput.open
        patch.setattr(StreamOutput, "open", lambda *told: (script.steering.ask(Wish(seed=5)), opened(*told)))
        early = rollout(positive=again, stream=stream(join=True), resume=paused[1], **inputs | {"length": 57}).args
    assert report_of(early)["steering"]["done"][0]["at"] == 3.0
    assert "3s {seed 5} lantern" in report_of(early)["steering"]["timeline"]


def test_what_cannot_be_done_is_said_and_the_run_goes_on(rollout, node, script, positive):
    clip = Encoder()
    clip.held = {"film of late": threading.Event()}
    script.waits = False
    script.at(
        1, Wish(prompt="broken"), Wish(strength=0.5), Wish(prompt="0:05 b\n[5s: c] | d [5s]"),
        Wish(prompt="a sea", transition="shot"), Wish(pause=True),
    )  # fmt: skip
    script.at(2, Wish(take_back=1.0), Wish(prompt="late"), Wish(seed=4))
    script.acts[3] = [clip.held["film of late"].set]
    script.acts[6] = [script.all_encoded]  # on a full machine it takes its time
    script.at(7, *[Wish(seed=100 + i) for i in range(65)])  # of 8 chunks one is left
    script.at(8, Wish(seed=9))
    out = rollout(length=LENGTH, positive=timeline(node, clip, duration=5.5)).args
    done = report_of(out)["steering"]["done"]
    assert [answer[0] if isinstance(answer, tuple) else "id" for answer in script.answers if answer is not None] == [
        "id", 409, 400, 400, 409, 409, *["id"] * 66, 429, "id"
    ]  # fmt: skip
    assert "the none anchor" in script.answers[1][1] and "connect Stream To Video" in script.answers[4][1]
    assert "a shot keeps its first chunk of 3" in script.answers[3][1]
    assert done[0]["error"] == "the encoder broke"
    at = {one.get("prompt", one.get("seed")): (one["at"], "error" in one) for one in done}
    assert at["late"][0] >= 2.25 and at[4] == at["late"] and at[163] == (5.25, False)
    assert at[162] == (None, True) and at[9] == (None, True)
    assert done[-1]["error"] == "there was no chunk left to make when it was asked"

    plain = dict(length=45, positive=positive)  # of another model's device it is the loop's own thread that encodes
    script.acts.clear(), script.answers.clear()
    script.at(2, Wish(prompt="b"), Wish(seed=9))
    steered = rollout(**plain).args
    assert script.answers[0][0] == 409 and "connect Prompt Timeline, with live on" in script.answers[0][1]
    assert report_of(steered)["steering"]["timeline"] is None and steered[1].steered["changes"][0]["seed"] == 9
    resumed = rollout(length=45, positive=positive, resume=rollout(length=21, positive=positive).args[1], seed=9).args
    assert resumed[0]["samples"].equal(steered[0]["samples"])

    other = Encoder("meta")
    script.acts.clear()
    script.at(1, Wish(prompt="here", transition="cut"), Wish(prompt="x"))
    assert "turn live on" in NOT_LIVE
    rollout(length=21, positive=timeline(node, other))
    assert other.threads == dict.fromkeys(("film of a meadow", "film of x"), threading.current_thread().name)
    script.at(1, Wish(prompt="x"))
    rollout(length=21, positive=timeline(node, other, live=False))
    assert script.answers[-1] == (409, NOT_LIVE)


LONG = "0s snow, gold balloon\n1s {seed 3}\n3s lantern"


def test_a_run_goes_back_and_makes_the_video_of_what_then_holds(rollout, node, stream, script, written, folders):
    """Words that came after the second gone back to are undone, those of the timeline come again, words that are asked with it hold
    from there; frames that stay are copied, and the history goes on from there."""
    out = folders / "output"
    demo = node("AdaStateDemoTimeline")(text=LONG).args[0]
    script.at(2, Wish(prompt="city", transition="cut"))
    script.at(4, Wish(take_back=60.0), Wish(prompt="meadow"))
    script.at(5, Wish(take_back=1.6, seed=77, strength=0.5), Wish(prompt="desert"))  # to chunk 2, at 21 frames

    def both(name, **settings):
        video = stream(
            filename_prefix=name, codec="ffv1", **settings
        )  # without loss, so that nothing depends on an encoder's past
        settings = dict(filename_prefix=f"{name}_stills", format="png", fps=16.0, preview=False)
        return node("AdaStateStreamFrames")(stream=video, **settings).args[0]

    inputs = dict(length=LENGTH, batch_size=2, anchor=node("AdaStateAnchorAdaptive")(state_frames=1).args[0])
    steered = rollout(positive=demo, stream=both("ours", history_chunks=2), keep_latents=True, **inputs).args
    report = report_of(steered)
    done = report["steering"]["done"]
    assert "no state is kept at or before 0 s to go back to" in done[1]["error"] and done[1]["at"] is None
    assert done[3]["taken_back"] == {"to": 21 / 16, "chunk": 2} and done[3]["at"] == 1.5 and done[4]["at"] == 1.5
    assert done[3]["seconds_to_picture"] is not None and script.steering.describe()["back_to"] == [
        21 / 16,
        45 / 16,
        69 / 16,
    ]
    assert (report["chunks"], report["frames_total"], report["history"]) == (8, LENGTH, [2, 4, 6, 8])
    assert "city" not in report["steering"]["timeline"] and "meadow" not in report["steering"]["timeline"]

    again = node("AdaStateDemoTimeline")(text=report["steering"]["timeline"]).args[0]
    whole = rollout(positive=again, stream=both("whole"), keep_latents=True, **inputs).args
    assert steered[0]["samples"].equal(whole[0]["samples"])
    for item in ("b0", "b1"):
        ours, theirs = (frames_of(out / f"{name}_00001_{item}.mkv") for name in ("ours", "whole"))
        assert len(ours) == LENGTH and torch.equal(ours, theirs)
        ours, theirs = (stills(out / f"{name}_stills_00001_{item}.frames") for name in ("ours", "whole"))
        assert len(ours) == LENGTH and torch.equal(ours, theirs)
    assert not list(out.rglob(".adastate*"))


def frames_of(path):
    with av.open(str(path)) as container:
        return torch.stack(
            [torch.from_numpy(f.to_ndarray(format="rgb48le").astype(np.int32)) for f in container.decode(video=0)]
        )


def stills(folder):
    made = []
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        assert int(path.stem) == number
        with Image.open(path) as image:
            made.append(torch.from_numpy(np.array(image.convert("RGB"))))
    return torch.stack(made)


def test_a_shot_that_is_asked_for_is_that_of_the_timeline(rollout, node, script):
    """Its two texts are encoded on the way, and those of the shot that the timeline has later, under the new words."""
    clip, text = Encoder(), "0s a meadow\n3s {shot}"
    script.at(1, Wish(prompt="a desert", transition="shot"))
    steered = rollout(length=69, window_frames=6, positive=timeline(node, clip, text)).args
    told = report_of(steered)["steering"]
    assert told["timeline"] == "0s a meadow\n0.75s {shot} a desert\n3s {shot}"
    assert told["done"][0]["transition"] == "shot" and "error" not in told["done"][0]
    sentences = [f"The scene transitions. film of a {place}" for place in ("meadow", "desert")]
    assert [word in clip.threads for word in (*sentences, "film of a desert")] == [True] * 3
    whole = rollout(length=69, window_frames=6, positive=timeline(node, clip, told["timeline"], live=False)).args[0][
        "samples"
    ]
    assert whole.equal(steered[0]["samples"])
    cut = rollout(
        length=69, window_frames=6, positive=timeline(node, clip, told["timeline"].replace("{shot} a", "{cut} a"))
    ).args[0]
    assert not whole[:, :, 3:6].equal(cut["samples"][:, :, 3:6])


def raising_once(patch, owner, name, count=0):
    """The `count`-th call from now on fails, all others are as they were."""
    calls, original = [], getattr(owner, name)

    def called(*arguments, **named):
        calls.append(name)
        if len(calls) == count + 1:
            raise OSError(28, f"no room for {name}")
        return original(*arguments, **named)

    patch.setattr(owner, name, called)


def test_a_way_back_that_fails_leaves_all_as_it_was(rollout, stream, script, monkeypatch, folders):
    """Each step of it in turn: the run goes on, says so, and its video is that of a run that nobody asked anything of."""
    from adastate_pack.adastate_core.cache.rotated import RotatedLayer
    from adastate_pack.adastate_core.states.kept_states import StateHistory
    from adastate_pack.adastate_core.video.sink import VideoSink
    from adastate_pack.nodes import output, saved_states
    from adastate_pack.nodes.host.codec import HostDecoder

    steps = [(output, "load_state"), (VideoSink, "again"), (RotatedLayer, "restore", 1), (HostDecoder, "restore"),
             (saved_states, "save_state"), (StateHistory, "go_back")]  # fmt: skip

    plain = dict(length=LENGTH + 12, keep_latents=True)
    for chunk, step in enumerate(steps, 3):
        script.at(chunk, Wish(take_back=0.1))
        script.failing[chunk] = step
    inputs = dict(codec="ffv1", history_chunks=1, history_states=32)
    out, taken = folders / "output", rollout(stream=stream(**inputs), **plain).args
    report = report_of(taken)
    assert ["no room for" in one["error"] for one in report["steering"]["done"]] == [True] * len(steps)
    assert [one["at"] for one in report["steering"]["done"]] == [None] * len(steps)
    whole = rollout(stream=stream(filename_prefix="whole", **inputs), **plain).args
    assert taken[0]["samples"].equal(whole[0]["samples"])
    assert torch.equal(*(frames_of(out / f"{name}_00001_.mkv") for name in ("take", "whole")))
    assert report["chunks"] == 9 and report["history"] == list(range(1, 10)) and not list(out.rglob(".adastate*"))


def test_a_run_that_ends_right_behind_its_way_back_leaves_what_stayed(rollout, stream, script, folders):
    """Two videos, of which nothing more is made."""
    script.at(4, Wish(take_back=0.8), Wish(pause=True))
    paused = rollout(length=LENGTH, batch_size=2, stream=stream(history_chunks=1)).args
    out, report = folders / "output", report_of(paused)
    state = load_state(out / "take_00001_b0.state.safetensors")
    assert (report["frames_total"], state.next_chunk, state.stream["file_frames"]) == (21, 2, [21, 21])
    assert [len(frames_of(out / f"take_00001_b{item}.mp4")) for item in range(2)] == [21, 21]
    assert b"moof" not in (out / "take_00001_b0.mp4").read_bytes() and not list(out.rglob(".adastate*"))
    done = rollout(length=33, batch_size=2, stream=stream(join=True), resume=state).args
    assert report_of(done)["frames_total"] == 33


def test_a_kill_on_the_way_back_leaves_what_plays_and_a_state_that_fits(
    rollout, node, stream, script, monkeypatch, folders
):
    """What lies on the disk before and after each step: copied, as a kill would leave it."""
    from adastate_pack.adastate_core.states.kept_states import StateHistory
    from adastate_pack.adastate_core.video.frame_folder import FrameFolder
    from adastate_pack.nodes.saved_states import SavedStates
    from adastate_pack.nodes.take_back import Fresh

    out, copies, hidden = folders / "output", [], shutil.ignore_patterns(".adastate*")

    def copied(owner, name):
        original = getattr(owner, name)

        def called(*arguments):
            copies.append(shutil.copytree(out, folders / f"copy{len(copies)}", ignore=hidden))
            made = original(*arguments)
            copies.append(shutil.copytree(out, folders / f"copy{len(copies)}", ignore=hidden))
            return made

        monkeypatch.setattr(owner, name, called)

    for owner, name in ((StreamOutput, "go_back"), (SavedStates, "go_back"), (StateHistory, "go_back"), (Fresh, "take_over"),
                        (FrameFolder, "go_back"), (Fresh, "place")):  # fmt: skip
        copied(owner, name)
    script.at(6, Wish(take_back=1.6))
    video = stream(history_chunks=1, autosave_seconds=0.001)
    frames = node("AdaStateStreamFrames")(
        stream=video, filename_prefix="stills", format="png", fps=16.0, preview=False
    ).args[0]
    rollout(length=LENGTH, stream=frames)
    assert len(copies) >= 12
    for copy in copies:
        state = load_state(copy / "take_00001_.state.safetensors")
        held = frames_of(copy / "take_00001_.mp4")
        assert len(held) >= state.stream["file_frames"][0] and state.stream["files"] == ["take_00001_.mp4"]
        assert len(list((copy / "stills_00001_.frames").glob("*.png"))) >= state.emitted * 4 - 3
        for kept in (copy / "take_00001_.history").iterdir():
            assert load_state(kept).stream["file_frames"][0] <= len(held)
    states = [load_state(copy / "take_00001_.state.safetensors").next_chunk for copy in copies]
    assert states[0] == 5 and states[-1] == 3 and states == sorted(states, reverse=True)
    (folders / "output").rename(folders / "done")
    shutil.copytree(copies[9], folders / "output")  # the new file has all that stays, and not yet the name
    state = node("AdaStateLoadState")(file="take_00001_.state.safetensors [output]").args[0]
    rollout(length=LENGTH, stream=stream(join=True), resume=state)
    assert len(frames_of(folders / "output" / "take_00002_.mp4")) == LENGTH


def test_what_was_steered_is_not_taken_for_what_the_graph_makes(folders):
    """A run of the same graph makes the graph's own video."""
    place, words = rerun.Place("prompt", "9"), []
    for used in (False, False, True, False):
        with CurrentNodeContext(*place, 0):
            words.append(rerun.fingerprint({"seed": 1}, frozenset((0, 1))))
            if len(words) == 2:
                continue
            with live.live_run() as (run, end):
                run.steering = SimpleNamespace(used=used, describe=dict)
                end.outputs = frozenset((0, 1))
    assert words[0] == words[1] == words[2] != words[3]
