"""The frames a second of a video: the model's where nobody says another. All that is told in seconds counts with them."""

from __future__ import annotations

import json

import av
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.prompts.values import PromptAt, Prompts
from adastate_pack.adastate_core.weights.presets import PRESETS, Preset, register_preset
from adastate_pack.nodes.host import live_runs
from comfy_api.latest import InputImpl
from test_continue import go_on, write_video  # noqa: F401

SLOW = (
    "the model makes 24 frames a second and the stream says 16: motion is slowed to 0.67 of its pace; set fps 0 to follow the "
    "model"
)


@pytest.fixture
def of_24(model, node):
    """A MODEL whose preset makes 24 frames a second."""
    register_preset(Preset("mine_24", "Mine", "mine", fps=24.0, chunk_frames=3, window_frames=3, positions="packed"))
    yield node("AdaStateModelPreset")(model=model, preset="mine_24").args[0]
    del PRESETS["mine_24"]


def words(second: float) -> Prompts:
    texts = [torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return Prompts(tuple(PromptAt(at, [[text, {}]], "cut") for at, text in zip((0.0, second), texts, strict=True)))


def rate_of(path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate)


@pytest.mark.parametrize(("asked", "fps"), [(None, 24.0), (0.0, 24.0), (16.0, 16.0)])
def test_a_run_counts_with_one_rate(of_24, rollout, stream, node, folders, monkeypatch, asked, fps):
    """File, prompts, anchor, report and panel have the stream's rate, at 0 and without a stream the model's."""
    about, chunks = [], []
    monkeypatch.setattr(live_runs.LiveRun, "watched", True)
    monkeypatch.setattr(live_runs.LiveRun, "started", lambda self, told=None: told and about.append(told))
    monkeypatch.setattr(live_runs.LiveRun, "chunk", lambda self, facts, *pictures: chunks.append(facts))
    anchor = node("AdaStateAnchorAdaptive")(state_frames=1, freeze_seconds=1.0).args[0]
    inputs = {"model": of_24, "positive": words(1.5), "anchor": anchor, "length": 41, "steps": 1}
    out = rollout(**inputs, stream=None if asked is None else stream(fps=asked))
    report = json.loads(out.args[2])
    assert report["video_fps"] == fps and report["video_seconds"] == 41 / fps
    assert [entry["latent_frame"] for entry in report["prompts"]] == [0, round(1.5 * fps / 4)]
    assert report["settings"]["anchor"] == AnchorAdaptive(1, freeze_frame=round(fps / 4)).describe()
    assert (SLOW in report["warnings"]) == (asked == 16.0)
    if asked is None:
        return
    assert rate_of(folders / "output" / "take_00001_.mp4") == fps
    assert about[-1]["fps"] == fps and chunks[-1]["seconds"] == 41 / fps


def test_what_a_file_says_beats_its_preset_and_what_makes_no_sense_is_passed_over(of_24, rollout):
    wishes = of_24.model_options["adastate_defaults"]
    for said, fps in ((25, 25.0), (0.25, 24.0), ("30", 24.0)):
        own = of_24.clone()
        own.model_options["adastate_defaults"] = wishes | {"fps": said}
        report = json.loads(rollout(model=own, length=9, steps=1).args[2])
        assert report["video_fps"] == fps
        assert any(f"fps {said!r}, which makes no sense" in told for told in report["warnings"]) == (fps == 24.0)


def test_plan_and_wan_2_1_follow_the_same_rule(of_24, model, rollout, node, stream):
    plan = node("AdaStatePlan")
    for subject, asked, fps, told in ((of_24, 0.0, 24.0, False), (of_24, 16.0, 16.0, True), (model, 0.0, 16.0, False)):
        text, numbers = plan(model=subject, width=32, height=32, length=41, stream=stream(fps=asked)).args
        assert json.loads(numbers)["files"]["fps"] == fps and f"32x32 at {fps:g} fps, 41 frames" in text
        assert (SLOW in text) == told
    fast = json.loads(rollout(length=9, steps=1, stream=stream(fps=24.0)).args[2])["warnings"]
    assert any(
        "makes 16 frames a second and the stream says 24: motion is sped up to 1.5 of its pace" in w for w in fast
    )


def test_a_state_made_at_16_is_extended_at_0(of_24, model, rollout, stream, folders):
    """The same bits; joined where the model makes 16, refused by both rates where it makes 24."""
    inputs = {"length": 21, "steps": 1, "keep_latents": False}
    for subject in (model, of_24):
        state = rollout(model=subject, stream=stream(fps=16.0), **inputs).args[1]
        longer = inputs | {"model": subject, "length": 33, "resume": state, "keep_latents": True}
        at_16 = rollout(stream=stream(fps=16.0, join=True), **longer).args[0]["samples"]
        if subject is of_24:
            with pytest.raises(ValueError, match="has 16 fps and fps is 24; use the same fps"):
                rollout(stream=stream(fps=0.0, join=True), **longer)
        at_0 = rollout(stream=stream(fps=0.0, join=subject is model), **longer)
        assert at_0.args[0]["samples"].equal(at_16)
        made = folders / "output" / json.loads(at_0.args[2])["videos"][0]
        assert rate_of(made) == (16.0 if subject is model else 24.0)
        with av.open(str(made)) as container:
            assert sum(1 for _ in container.decode(video=0)) == (33 if subject is model else 12)


def test_new_graphs_follow_the_model_and_saved_rates_stay(go_on, node, vae, folders):  # noqa: F811
    defaults = {
        "AdaStateStreamOutput": 0,
        "AdaStateStreamFrames": 0,
        "AdaStateRenderVideo": 0,
        "AdaStateContinueVideo": -1,
    }
    for name, default in defaults.items():
        schema = node(name).node.define_schema()
        assert next(each.default for each in schema.inputs if each.id == "fps") == default
        assert node(name).validate(fps=0.0) is True and node(name).validate(fps=24.0) is True
        allowed = "-1, 0" if default else "0"
        assert f"fps is 0.5; it must be {allowed} or between 1 and 240" in node(name).validate(fps=0.5)
    write_video(folders / "v.mp4", 20, rate=32)
    video = InputImpl.VideoFromFile(str(folders / "v.mp4"))
    own, every, at_16 = (go_on(video=video, frames=5, **fps)[1] for fps in ({"fps": -1.0}, {"fps": 0.0}, {"fps": 16.0}))
    assert own.equal(at_16) and own.equal(go_on(video=video, frames=5)[1]) and not own.equal(every)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    rendered = node("AdaStateRenderVideo")(
        latent=latent, vae=vae, filename_prefix="r", fps=0.0, codec="h264", quality=30
    ).args[0]
    assert rate_of(rendered.get_stream_source()) == 16.0
