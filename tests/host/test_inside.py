"""start_mode of AdaState Rollout: pictures inside the first chunk, through the nodes as people connect them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from adastate_pack.adastate_core.given import BEFORE, INSIDE
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.weights.preset_file import preset_from
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.builder import START_MODES
from adastate_pack.nodes.defaults import NOT_CAUSAL
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.job import Job
from conftest import random_wan
from golden_models import golden_model
from slow_inside import by_hand
from test_models import AUTO, latents_of, report_of
from test_published import Bare
from test_stream import frames_of

MODE = START_MODES[INSIDE]
SIGMAS = (1.0, 5 / 6)  # two steps at shift 5


class Stop(Exception):
    pass


@pytest.fixture
def picture(node, vae):
    """The LATENT that Continue Video makes of so many pictures."""

    def encode(frames: int) -> dict[str, torch.Tensor]:
        images = torch.rand(frames, 32, 32, 3, generator=torch.Generator().manual_seed(2))
        inputs = {"vae": vae, "width": 32, "height": 32, "frames": frames, "crop": "center", "image": images}
        return node("AdaStateContinueVideo")(**inputs).args[0]

    return encode


@pytest.fixture
def forwards(monkeypatch):
    """(timestep, the noise level that the host's nodes are shown) of every pass; one whose number is in `fail` raises before it."""
    told, original = [], adapter.HostModel.velocity

    def velocity(self, x, timestep, attention):
        if len(told) in fail:
            raise Stop
        out = original(self, x, timestep, _Watching(attention, self, told, timestep))
        return out

    fail: set[int] = set()
    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    return told, fail


class _Watching:
    """Attention that notes once a pass what the model's options say meanwhile."""

    def __init__(self, attention, host, told, timestep) -> None:
        self._own = attention, host, told, timestep

    def __getattr__(self, name):
        attention, host, told, timestep = self._own
        if name == "attend" and (not told or told[-1][2] is not self):
            told.append((timestep, float(host._seen["sigmas"]), self))
        return getattr(attention, name)


def settings_of(out) -> dict:
    return report_of(out)["settings"]


def preset_inside(monkeypatch, node, model, name="self_forcing", **changed):
    """The model behind Model Preset, of a system that has given frames inside, and what the node says of it."""
    monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], start=INSIDE, **changed))
    return node("AdaStateModelPreset")(model=model, preset=name).args


def test_the_nodes_make_what_the_loop_by_hand_does(rollout, model, positive, picture):
    """semantics: Given frames. Continue Video's latent of five pictures, two latent frames of a chunk of three, at the node's own
    window; the rest of the video with every frame in the cache."""
    start = picture(5)
    ours = latents_of(rollout(start_latent=start, start_mode=MODE, length=33, window_frames=4))
    given = adapter.to_model_space(model, start["samples"])
    with torch.inference_mode():
        slow = by_hand(Bare(model, positive), given, F=3, W=4, length=9, sigmas=SIGMAS, seed=5)
    assert float((adapter.to_vae_space(model, slow.float()) - ours).abs().max()) < 1e-4
    torch.testing.assert_close(ours[:, :, :2], start["samples"], atol=1e-5, rtol=1e-5)


def test_what_a_run_says_counts_and_tells_the_model(rollout, stream, picture, forwards, written, progress_told):
    told, _ = forwards
    start = picture(1)
    out = rollout(start_latent=start, start_mode=MODE, stream=stream(), length=33)
    # three chunks of two steps and a clean pass; the first one's noisy passes have one timestep a frame
    high, low = (1000 * sigma for sigma in settings_of(out)["sigmas"])
    assert [t for t, *_ in told] == [(0.0, high, high), (0.0, low, low), 0.0, *[high, low, 0.0] * 2]
    assert [level for _, level, _ in told] == pytest.approx([t / 1000 for t in (high, low, 0.0)] * 3)
    report = report_of(out)
    assert report["chunks"] == 3 and report["settings"]["start_mode"] == MODE and report["warnings"] == [NOT_CAUSAL]
    # nine passes and a decode of three chunks: the bar ends full
    assert progress_told[-1][0] == progress_told[-1][1]
    pictures = torch.cat(written)
    before = rollout(start_latent=start, stream=stream(filename_prefix="before"), length=33)
    assert settings_of(before)["start_mode"] == START_MODES[BEFORE]
    # the first picture is the given one's, whatever comes behind it
    assert torch.equal(pictures[0], torch.cat(written)[len(pictures)]) and len(pictures) == 33
    assert not torch.equal(latents_of(out)[:, :, 1:], latents_of(before)[:, :, 1:])
    assert "start_mode" not in settings_of(rollout(length=9))


@pytest.fixture
def rollouts(monkeypatch):
    """The rollout of every run."""
    made, original = [], Job.rollout

    def rollout(self, progress):
        made.append(original(self, progress))
        return made[-1]

    monkeypatch.setattr(Job, "rollout", rollout)
    return made


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_failure_in_a_pass_of_the_first_chunk_loses_nothing(
    rollout, stream, picture, node, folders, forwards, rollouts, number, monkeypatch
):
    """There is no video yet and no file beside it. What the run stood at has the frames that wait: written and loaded by the
    nodes, it goes on to the bits of the whole."""
    told, fail = forwards
    start = picture(5)
    whole = rollout(start_latent=start, start_mode=MODE, length=21, stream=stream(filename_prefix="whole"))
    fail.add(len(told) + number)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(
            type(rollouts[-1]), "close", lambda self: None
        )  # what it stood at is asked for when its node has ended
        rollout(start_latent=start, start_mode=MODE, length=21, stream=stream(filename_prefix="cut"))
    fail.clear()
    node("AdaStateSaveState")(state=rollouts[-1].snapshot(), filename_prefix="waiting")
    state = node("AdaStateLoadState")(file="waiting_00001_.state.safetensors [output]").args[0]
    assert state.start == INSIDE and state.given.shape[2] == 2 and not state.emitted
    on = rollout(resume=state, length=21, stream=stream(filename_prefix="on"))
    assert torch.equal(latents_of(on), latents_of(whole)) and settings_of(on)["start_mode"] == MODE
    assert torch.equal(*(frames_of(folders / "output" / f"{name}_00001_.mp4") for name in ("on", "whole")))
    if number == 0:
        other = report_of(rollout(resume=state, length=21, start_mode=START_MODES[BEFORE]))
        assert other["settings"]["start_mode"] == MODE
        assert "the state's start latents stand inside the first chunk" in other["warnings"][-1]


def test_a_failure_behind_the_first_chunk_goes_on_from_the_state_beside_the_video(
    rollout, stream, picture, folders, forwards
):
    told, fail = forwards
    start = picture(5)
    whole = rollout(start_latent=start, start_mode=MODE, length=21, stream=stream(filename_prefix="whole"))
    fail.add(len(told) + 3)
    with pytest.raises(Stop):
        rollout(start_latent=start, start_mode=MODE, length=21, stream=stream(filename_prefix="cut"))
    fail.clear()
    state = load_state(folders / "output" / "cut_00001_.state.safetensors")
    assert (state.start, state.given, state.next_chunk) == (BEFORE, None, 1)
    on = rollout(resume=state, length=21, stream=stream(filename_prefix="on", join=True))
    assert torch.equal(latents_of(on), latents_of(whole)) and "start_mode" not in settings_of(on)
    assert len(frames_of(folders / "output" / "on_00001_.mp4")) == 21


def test_two_videos_of_the_golden_model_with_a_state_in_eight_bits(node, positive):
    """Other weights, batch 2 from one picture, an adaptive anchor, int8 in host memory; cut behind the first chunk."""
    start = {"samples": torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(4))}
    more = {
        "model": golden_model(random_wan()), "positive": positive, "width": 0, "height": 0, "batch_size": 2, "seed": 5, "steps": 2,
        "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "fixed", "cache_dtype": "int8",
        "cache_device": "host memory", "anchor": node("AdaStateAnchorAdaptive")(state_frames=1).args[0],
    }  # fmt: skip
    run = node("AdaStateRollout")
    whole = latents_of(run(**more, length=33, start_latent=start, start_mode=MODE))
    torch.testing.assert_close(whole[:, :, :1], start["samples"].expand(2, -1, -1, -1, -1), atol=1e-5, rtol=1e-5)
    assert not torch.equal(whole[0, :, 1:], whole[1, :, 1:])
    first = run(**more, length=9, start_latent=start, start_mode=MODE)
    assert torch.equal(latents_of(run(**more, length=33, resume=first.args[1])), whole)


def test_auto_is_what_the_models_preset_says(rollout, node, model, picture, monkeypatch):
    given, described = preset_inside(monkeypatch, node, model)
    assert "pictures to start from stand inside the first chunk" in described
    more, start = {"model": given, "length": 17} | AUTO, picture(1)
    auto, inside, before = (
        rollout(**more, start_latent=start, start_mode=mode) for mode in ("auto", MODE, START_MODES[BEFORE])
    )
    assert torch.equal(latents_of(auto), latents_of(inside)) and settings_of(auto) == settings_of(inside)
    assert not torch.equal(latents_of(auto), latents_of(before))
    assert settings_of(auto)["start_mode"] == MODE
    left_out = rollout(**more, start_latent=start)
    assert torch.equal(latents_of(left_out), latents_of(auto))
    plan = node("AdaStatePlan")
    text, numbers = plan(model=given, width=0, height=0, length=17, start_latent=start).args
    assert json.loads(numbers)["settings"]["start_mode"] == MODE and f"start_latent stands {MODE}" in text
    text, numbers = plan(model=given, width=0, height=0, length=17, start_latent=picture(9)).args
    assert "the first chunk has 3 latent frames" in json.loads(numbers)["warnings"][-1]
    text, numbers = plan(model=model, width=0, height=0, length=17, start_latent=start).args
    assert json.loads(numbers)["settings"]["start_mode"] == START_MODES[BEFORE] and "start_latent stands" not in text
    with pytest.raises(ValueError, match="start is 'beside'; it must be one of before, inside"):
        preset_from({"name": "own", "start": "beside"})
    assert preset_from({"name": "own", "start": "inside"}).start == INSIDE


def test_what_cannot_stand_inside_is_refused_before_anything_is_loaded(rollout, node, model, picture, monkeypatch):
    given, _ = preset_inside(monkeypatch, node, model)
    other = {
        name: node("AdaStateModelPreset")(model=model, preset=name).args[0] for name in ("rolling_forcing", "krea_14b")
    }
    loaded = lambda *inputs, **more: pytest.fail("a model was loaded")  # noqa: E731
    start, long = picture(1), picture(9)
    monkeypatch.setattr("comfy.model_management.load_models_gpu", loaded)
    fits = "are 9 pictures .3 latent frames. and the first chunk has 3 .* at most 5 pictures .* before the first chunk"
    for inputs, sentence in (
        ({"start_latent": long, "start_mode": MODE}, fits),
        ({"start_latent": long, "model": given, **AUTO}, fits),
        ({"start_latent": start, "start_mode": MODE, "chunk_frames": 1}, "so none fits inside: choose the start mode"),
        ({"start_latent": start, "start_mode": MODE, "model": other["rolling_forcing"], **AUTO}, "chunks denoised together"),
        ({"start_latent": start, "start_mode": MODE, "model": other["krea_14b"], **AUTO}, "made anew before every chunk"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            rollout(**({"length": 45} | inputs))
    assert "start_mode is 'beside'" in node("AdaStateRollout").validate(start_mode="beside")


def test_a_mode_that_nothing_is_given_for_is_told(rollout):
    plain, chosen = rollout(length=9), rollout(length=9, start_mode=MODE)
    assert torch.equal(latents_of(plain), latents_of(chosen)) and "start_mode" not in settings_of(chosen)
    assert report_of(chosen)["warnings"][len(report_of(plain)["warnings"]) :] == [
        f"start_mode is {MODE}, and start_latent is not connected, so it was not used"
    ]
