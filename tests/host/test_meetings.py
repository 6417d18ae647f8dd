"""What a run can do at once: steering, take back, no end, files that are enlarged, a size that is taken. Its files are those of one
plain run with the timeline that it tells."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes.host.model import HostModel
from adastate_pack.nodes.host.output_files import output_file
from adastate_pack.nodes.host.steer_wishes import Wish
from adastate_pack.nodes.steering import NOT_ALONE
from PIL import Image
from small_enlargers import interpolator, load_upscaler
from test_endless import report_of
from test_links import STATE, VIDEO, ran, same_states  # noqa: F401  a fixture
from test_steering import Encoder, frames_of, script, timeline  # noqa: F401  a fixture

TEXT = "0s snow, gold balloon\n1s {seed 3}\n3s lantern"


@pytest.fixture
def models(tmp_path):
    return {"upscale_model": load_upscaler(tmp_path), "interp_model": interpolator(), "frame_multiplier": 2}


@pytest.fixture
def both(stream, node, models):
    """A video and frames of one run, twice as large and with in-betweens."""

    def make(name, join=False, **inputs):
        video = stream(filename_prefix=name, join=join, codec="ffv1", **models, **inputs)
        settings = dict(filename_prefix=f"{name}_stills", format="png", fps=16.0, preview=False, join=join)
        return node("AdaStateStreamFrames")(stream=video, **settings).args[0]

    return make


def files_of(out):
    """Of each item: the video's frames, and the pictures by their numbers."""
    report = report_of(out)
    for video, folder in zip(report["videos"], report["frame_folders"], strict=True):
        paths = sorted(output_file(folder).glob("*.png"))
        yield frames_of(output_file(video)), {int(path.stem): Image.open(path).tobytes() for path in paths}


def state_beside(out):
    return load_state(output_file(report_of(out)["videos"][0]).with_suffix(".state.safetensors"))


def test_a_run_without_an_end_that_is_enlarged_steered_and_goes_back(
    rollout, node, both, script, folders, progress_told  # noqa: F811
):  # fmt: skip
    demo = lambda text: node("AdaStateDemoTimeline")(text=text).args[0]  # noqa: E731
    anchor = node("AdaStateAnchorAdaptive")(state_frames=1).args[0]
    more = {"history_chunks": 1}
    inputs = {"anchor": anchor, "batch_size": 2, "steps": 1, "keep_latents": False}
    script.at(2, Wish(seed=9, strength=0.5), Wish(prompt="city", transition="cut"))
    script.at(3, Wish(take_back=1.0), Wish(prompt="desert"))
    script.at(4, Wish(seed=4), Wish(pause=True))
    first = rollout(length=0, positive=demo(TEXT), stream=both("first", **more), **inputs)
    report, steering = report_of(first), report_of(first)["steering"]
    assert report["stopped"] == {"frame": 45, "of": None, "by": "pause"}
    assert steering["done"][2]["taken_back"]["chunk"] == 1 and steering["done"][4]["at"] == 3.0
    assert "strength" not in steering["timeline"] and "city" not in steering["timeline"]
    assert NOT_ALONE in report["warnings"] and len({total for _, total, _ in progress_told}) > 1
    assert all(one[0] != other[0] for one, other in pairwise(progress_told))  # no picture is a step too many

    state, text = state_beside(first), steering["timeline"]
    script.at(7, Wish(take_back=0.1, seed=11))
    script.at(7, Wish(strength=0.25))
    script.at(8, Wish(pause=True))
    joined = rollout(
        length=0, width=0, height=0, positive=demo(text), resume=state, stream=both("joined", True, **more), **inputs
    )
    report, text = report_of(joined), report_of(joined)["steering"]["timeline"]
    assert report["frames_total"] == 93 and report["steering"]["done"][0]["taken_back"]["chunk"] == 6
    progress_told.clear()
    script.at(7, Wish(take_back=0.1))
    apart = rollout(length=93, positive=demo(text), resume=state, stream=both("apart", **more), **inputs)
    assert report_of(apart)["steering"]["done"][0]["at"] and NOT_ALONE not in report_of(apart)["warnings"]
    told = [one[:2] for one in progress_told]
    assert told[-1][0] == told[-1][1] and all(one[0] != other[0] for one, other in pairwise(told))
    whole = rollout(length=93, positive=demo(text), stream=both("whole", keep_state=True), **inputs)
    same_states(state_beside(joined), state_beside(whole))
    for ours, rest, theirs in zip(files_of(joined), files_of(apart), files_of(whole), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(rest[0], theirs[0][89:])
        assert ours[1] == theirs[1] and [*theirs[1]] == list(range(185))
        assert rest[1] == {number: theirs[1][number] for number in range(89, 185)}
    assert not list((folders / "output").rglob(".adastate*"))


def test_what_was_steered_is_said_and_never_taken_for_what_its_inputs_make(ran, script):  # noqa: F811
    history = {"history_chunks": 2}
    script.at(3, Wish(seed=9))
    _, steered = ran(VIDEO, stream=history)
    assert NOT_ALONE in steered["warnings"] and steered["videos"] == ["take_00001_.mp4"]
    _, again = ran(VIDEO, stream=history)
    assert ran.rolled == 2 and again["videos"] == ["take_00002_.mp4"] and NOT_ALONE not in again["warnings"]
    [state], report = ran(STATE, stream=history)
    assert ran.rolled == 2 and report["videos"] == again["videos"] and "steering" not in report
    [plain], _ = ran(STATE, stream=history | {"filename_prefix": "plain"})
    same_states(state, plain)


def test_after_words_are_encoded_all_is_loaded_again_that_works_in_turn(
    rollout, node, stream, models, script, monkeypatch  # noqa: F811
):  # fmt: skip
    loaded, load = [], HostModel.load

    def noted(model, plan, others=(), working=0, there=False):
        loaded.append(([id(each) for each in others], working, there))
        load(model, plan, others, working, there)

    monkeypatch.setattr(HostModel, "load", noted)
    script.at(1, Wish(prompt="x"))
    rollout(length=21, steps=1, positive=timeline(node, Encoder("meta")), stream=stream(**models))
    assert [there for *_, there in loaded] == [False, True] and loaded[0][:2] == loaded[1][:2]
    assert {id(models["upscale_model"].patcher), id(models["interp_model"])} < {*loaded[0][0]}


def test_frames_alone_are_gone_on_from_too_when_more_is_linked(ran, folders):  # noqa: F811
    def asked(*linked, **settings):
        inputs = {
            "vae": ["3", 0],
            "filename_prefix": "stills",
            "format": "png",
            "fps": 16.0,
            "preview": False,
        } | settings
        return ran(*linked, stream={}, more={"4": {"class_type": "AdaStateStreamFrames", "inputs": inputs}})

    for rolled, settings in enumerate(({"keep_state": True}, {"history_chunks": 2, "filename_prefix": "kept"}), 1):
        name = settings.get("filename_prefix", "stills")
        asked(**settings)
        beside = folders / "output" / f"{name}_00001_.state.safetensors"
        if "history_chunks" in settings:
            beside.unlink()
        [state], report = asked(STATE, **settings)
        assert state.emitted == 15 and "more outputs are linked than before" in " ".join(report["warnings"])
        assert report["frame_folders"] == [f"{name}_0000{rolled}_.frames"]
    assert (ran.rolled, ran.chunks) == (3, 5 + 5 + 1)
    pictures = [sorted(path.glob("*.png")) for path in sorted((folders / "output").glob("*.frames"))]
    kept, joined, plain = [[Image.open(path).tobytes() for path in each] for each in pictures]
    assert len(plain) == 57 and kept == joined == plain
    shutil.rmtree(folders / "output" / "kept_00002_.frames")
    asked(STATE, history_chunks=2, filename_prefix="kept")
    assert ran.rolled == 4  # what is not there any more is made again
