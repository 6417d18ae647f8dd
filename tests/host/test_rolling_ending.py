"""Rolling Forcing through Model Preset, everything at auto: its published loop, and its two endings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adastate_pack.adastate_core.rollout import RolloutSpec
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.output_files import output_file
from published_rolling import MISTAKES, PublishedRolling
from test_stream import frames_of, stream  # noqa: F401  the fixture

PACK = Path(__file__).resolve().parents[2]
AUTO = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto", "seed": 7}
PICTURES = 153  # 39 latent frames, 13 chunks
OPEN_LATENTS = 27  # the last four chunks are made in a window that shrinks


class OnHost(PublishedRolling):
    """The loop over the host's own model, whose text it reads anew in every pass."""

    def text(self, layer, key, make):
        return make()

    def kernel(self, *args):
        return self.model.kernel(*args)


@torch.no_grad()
def published(model, positive, blocks, batch=1, loop=OnHost):
    host = adapter.HostModel(model, positive[0][0], batch)
    loop = loop(host, batch=batch, h=4, w=4)
    spec = RolloutSpec(host.geometry, batch, 4, 4, 3, 18, PRESETS["rolling_forcing"].anchor, "packed", host.dtype)
    host.load(spec.plan(16))
    return adapter.to_vae_space(model, loop.roll(blocks).float())


def latents_of(out):
    return out.args[0]["samples"]


def report_of(out):
    return json.loads(out.args[2])


@pytest.fixture
def rolling(rollout, model, node):
    """The rollout node behind Model Preset, at auto."""

    def call(ending=None, **inputs):
        chosen = {} if ending is None else {"ending": ending}
        preset = node("AdaStateModelPreset")(model=model, preset="rolling_forcing", **chosen).args[0]
        return rollout(**({"model": preset, "length": PICTURES} | AUTO | inputs))

    return call


def off(ours, theirs):
    return (ours - theirs).abs().unflatten(2, (-1, 3)).amax((0, 1, 3, 4, 5))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_nodes_are_the_published_loop(rolling, model, positive, batch):
    """semantics: Chunks denoised together."""
    out = rolling(batch_size=batch)
    theirs = published(model, positive, 13, batch)
    assert off(latents_of(out), theirs).max() < 1e-4
    said = "equals its published loop to 1e-4 over 13 chunks, the end included"
    assert said in PRESETS["rolling_forcing"].note
    systems = " ".join((PACK / "docs" / "systems.md").read_text().split())
    assert "equal to 1e-4 over 13 chunks, the end included" in systems
    page = " ".join((PACK / "web" / "docs" / "AdaStateModelPreset.md").read_text().split())
    assert "the preset equals that loop to 1e-4" in page
    report = report_of(out)
    assert (report["settings"]["ending"], report["warnings"]) == ("as published", [])
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] and "host_before_the_end" in report["plan_bytes"]


def test_a_mistake_would_show(rolling, model, positive):
    ours = latents_of(rolling())
    for mistaken in MISTAKES:
        assert off(ours, published(model, positive, 13, loop=type("Wrong", (OnHost, mistaken), {}))).max() > 1e-3


def test_a_state_goes_on_from_before_the_window_shrank_and_says_so(rolling, model, positive, node):
    first = rolling()
    saved = node("AdaStateSaveState")(state=first.args[1], filename_prefix="a")
    assert "12 latents more, in a window that shrank, are made again" in saved.ui.as_dict()["text"][0]
    state = node("AdaStateLoadState")(file=saved.args[0]).args[0]
    out = rolling(length=201, resume=state)
    assert off(latents_of(out), published(model, positive, 17)).max() < 1e-4
    told = "goes on from before its window shrank, and its last 4 chunks are made again"
    assert any(told in warning for warning in report_of(out)["warnings"])
    assert torch.equal(latents_of(rolling(resume=state)), latents_of(first))


def test_an_open_end_is_an_exact_prefix_and_its_state_ends_either_way(rolling, model, positive):
    whole, short = latents_of(rolling("open", length=201)), rolling("open")
    assert torch.equal(latents_of(short), whole[:, :, :39])
    assert report_of(short)["settings"]["ending"] == "open"
    assert "host_before_the_end" not in report_of(short)["plan_bytes"]
    assert torch.equal(latents_of(rolling("open", length=201, resume=short.args[1])), whole)
    assert off(latents_of(rolling(length=201, resume=short.args[1])), published(model, positive, 17)).max() < 1e-4
    kept = rolling(length=165, resume=short.args[1])  # the chunks under way begin beyond it
    assert torch.equal(latents_of(kept), whole[:, :, :42])
    assert any("begin beyond length 165, so the video ends open" in each for each in report_of(kept)["warnings"])
    assert any("from 201 on it ends as published" in each for each in report_of(kept)["warnings"])


@pytest.mark.parametrize("keep", [True, False])
def test_join_makes_the_last_four_chunks_again(rolling, stream, keep):  # noqa: F811
    """The joined file's frames are those of the longer video in one run; the old file stays as it was."""
    whole = rolling(length=201, stream=stream(filename_prefix="video/whole"), keep_latents=keep)
    first = rolling(stream=stream(filename_prefix="video/first"), keep_latents=keep)
    old = output_file(report_of(first)["videos"][0])
    before = frames_of(old)
    assert len(before) == PICTURES
    joined = rolling(length=201, resume=first.args[1], stream=stream(join=True), keep_latents=keep)
    report = report_of(joined)
    assert report["frames_total"] == 201 and report["frames"] == 201 - 4 * OPEN_LATENTS + 3
    made = frames_of(output_file(report["videos"][0]))
    expected = frames_of(output_file(report_of(whole)["videos"][0]))
    assert torch.equal(made[: 4 * OPEN_LATENTS - 3], before[: 4 * OPEN_LATENTS - 3])
    assert made.shape == expected.shape and (made.float() - expected.float()).abs().mean() < 1
    assert torch.equal(frames_of(old), before)
    if keep:
        assert torch.equal(latents_of(joined), latents_of(whole))


@pytest.mark.parametrize("length", [9, 45])
def test_a_video_shorter_than_the_window_is_made_again_as_a_whole(rolling, stream, length):  # noqa: F811
    first = rolling(length=length, stream=stream(filename_prefix="video/first"))
    assert first.args[1].emitted == 0 and first.args[1].after == latents_of(first).shape[2]
    longer = rolling(length=81, resume=first.args[1], stream=stream(join=True))
    assert torch.equal(latents_of(longer), latents_of(rolling(length=81)))
    assert len(frames_of(output_file(report_of(longer)["videos"][0]))) == 81


def test_kept_and_saved_states_are_from_before_the_window_shrank(rolling, stream, node):  # noqa: F811
    out = rolling(stream=stream(history_chunks=4, autosave_seconds=0.001))
    report = report_of(out)
    assert report["history"] == [4, 8] and report["state"]
    state = load_state(output_file(report["videos"][0]).with_suffix(".state.safetensors"))
    assert (state.emitted, state.after, state.stream["vae_latents_seen"]) == (27, 12, 27)
    assert state.stream["file_frames"] == [4 * OPEN_LATENTS - 3]
    assert torch.equal(latents_of(rolling(resume=state)), latents_of(rolling()))


def test_a_run_that_stops_before_its_window_shrinks_ends_open(rolling):
    out = rolling(max_seconds=0.001)
    assert report_of(out)["stopped"]["by"] == "max_seconds" and out.args[1].after == 0
    assert torch.equal(latents_of(rolling(resume=out.args[1])), latents_of(rolling()))


def test_a_window_too_small_for_the_rule_is_read_whole_and_said(rolling, rollout, model):
    out = rolling(window_frames=3, length=33)
    report = report_of(out)
    assert report["settings"]["ending"] == "open"
    assert any(
        "Rolling Forcing's own rule takes 15 or more, so every pass reads the whole" in w for w in report["warnings"]
    )
    # what it makes is the state of before, too
    assert not {"ending", "shares_window"} & set(out.args[1].spec)


def test_a_state_of_before_goes_on_as_it_began(rolling):
    """It names a window of 3 frames that every pass reads; at auto it goes on so, and ends open."""
    whole = latents_of(rolling(window_frames=3, length=57))
    state = rolling(window_frames=3, length=33).args[1]
    out = rolling(length=57, resume=state)
    assert torch.equal(latents_of(out), whole)
    report = report_of(out)
    assert report["settings"]["ending"] == "open" and report["settings"]["window_frames"] == 3
    assert any("reads all 3 frames of the window" in w and "ends open" in w for w in report["warnings"])


@pytest.mark.parametrize("ending", ["as published", "open"])
def test_the_presets_words_say_how_it_ends(model, node, ending):
    text = node("AdaStateModelPreset")(model=model, preset="rolling_forcing", ending=ending).args[1]
    assert ("the window shrinks" in text) == (ending == "as published")
    assert "a pass has room for 21 frames: the anchor, the newest 3 past ones and those under way" in text
