"""A rollout whose prompt changes: through the host's own executor, against the core, and across a resume."""

from __future__ import annotations

import json

import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive, AnchorStatic
from adastate_pack.adastate_core.prompts.demo_words import prompt
from adastate_pack.adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_pack.adastate_core.prompts.values import PromptAt, Prompts
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.nodes.host import model as adapter
from safetensors.torch import load_file
from test_models import models, report_of, written  # noqa: F401

WORDS = (
    {"terrain": "snow", "pace": "slow", "balloon": "gold", "lantern": "lantern"},
    {"terrain": "city", "pace": "any", "balloon": "violet", "lantern": "no lantern"},
)
TRANSITIONS = ("cut", "recache", "flush", "rope cut", "soft")


def context(seed, tokens=5):
    return torch.randn(1, tokens, 4096, generator=torch.Generator().manual_seed(seed))


def timeline(*entries, **more):
    """Prompts of (seconds, context, transition)."""
    return Prompts(tuple(PromptAt(s, [[c, {}]], t, **more) for s, c, t in entries))


@torch.no_grad()
def core_latents(model, changes, frames, anchor=None, window=3, seed=5, text_tokens=16):
    """The core's own rollout on the host's model under a PromptPlan; latents in VAE space."""
    host = adapter.HostModel(model, changes[0].context, 1)
    spec = RolloutSpec(host.geometry, 1, 4, 4, 3, window, anchor or AnchorStatic(1), "packed", host.dtype)
    host.load(spec.plan(text_tokens))
    plan = PromptPlan(changes, 3)
    rollout = Rollout(host, spec, Settings(seed, Schedule.shifted(2, 5.0)), text_tokens=text_tokens, prompts=plan)
    return adapter.to_vae_space(model, torch.cat([chunk.latents for chunk in rollout.chunks(frames)], 2))


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_timeline_through_the_hosts_executor_is_the_cores(execute, models, wan_state, model, folders, transition):  # noqa: F811
    written(models, "tiny.safetensors", wan_state)
    numbers = {
        "width": 32, "height": 32, "length": 45, "batch_size": 1, "seed": 5, "steps": 2, "shift": 5.0, "chunk_frames": 3,
        "window_frames": 3, "positions": "packed",
    }  # fmt: skip

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    outputs = execute({
        "load": node("AdaStateLoadModel", file="tiny.safetensors", weight_dtype="default"),
        "preset": node("AdaStateModelPreset", model=["load", 0], preset="infinity_rope"),
        "first": node("AdaStateDemoPrompt", **WORDS[0]),
        "second": node("AdaStateDemoPrompt", **WORDS[1]),
        "at0": node("AdaStatePromptAt", positive=["first", 0], seconds=0.0, transition="cut"),
        "at1": node(
            "AdaStatePromptAt", positive=["second", 0], seconds=1.0, transition=transition, prompts=["at0", 0], blend_chunks=2,
        ),
        "roll": node("AdaStateRollout", model=["preset", 0], positive=["at1", 0], **numbers),
        "save": node("SaveLatent", samples=["roll", 0], filename_prefix="x"),
        "report": node("PreviewAny", source=["roll", 2]),
        "plan": node("AdaStatePlan", model=["preset", 0], width=32, height=32, length=45),
        "look": node("AdaStateInspectCheckpoint", file="tiny.safetensors"),
    })  # fmt: skip
    (saved,) = (folders / "output").glob("x*.latent")
    found = load_file(saved)["latent_tensor"]
    changes = [PromptChange(0, prompt(WORDS[0])), PromptChange(4, prompt(WORDS[1]), transition, 2)]
    torch.testing.assert_close(found, core_latents(model, changes, 12), atol=1e-5, rtol=1e-5)
    steady = core_latents(model, changes[:1], 12)
    assert torch.equal(found[:, :, :3], steady[:, :, :3]) and not torch.equal(found[:, :, 3:6], steady[:, :, 3:6])
    report = json.loads(outputs["report"]["text"][0])
    assert report["settings"]["preset"] == "infinity_rope" and report["settings"]["anchor"]["sink_frames"] == 1
    assert report["prompts"] == [
        {"seconds": 0.0, "latent_frame": 0, "text": "", "transition": "cut"},
        {"seconds": 1.0, "latent_frame": 4, "text": "", "transition": transition},
    ]
    assert "keys and values in all" in outputs["plan"]["text"][0]
    assert "tiny.safetensors: Wan 2.1 text to video" in outputs["look"]["text"][0]


def test_a_shots_opening_holds_for_its_first_chunk(rollout, monkeypatch):
    """Of three chunks the second begins the shot: each sees its own words, and the cache of texts has room for the longest."""
    seen, original = [], adapter.HostModel.set_context
    monkeypatch.setattr(
        adapter.HostModel, "set_context", lambda self, words: seen.append(words) or original(self, words)
    )
    entries = (
        PromptAt(0.0, [[context(1), {}]]),
        PromptAt(1.0, [[context(2), {}]], "shot", opening=[[context(3, 9), {}]]),
    )
    report = report_of(rollout(positive=Prompts(entries), length=33, window_frames=6))
    order = [
        next(i for i, tokens in ((1, 5), (2, 5), (3, 9)) if torch.equal(words, context(i, tokens))) for words in seen
    ]
    assert list(dict.fromkeys(order)) == [1, 3, 2]
    assert [entry["transition"] for entry in report["prompts"]] == ["recache", "shot"]
    assert report["plan_bytes"]["text_kv"] == 2 * 2 * 9 * 128 * 4
    carried = Prompts(
        (entries[0], PromptAt(1.0, [[context(2), {}]], "shot", opening=[[context(3), {"area": (1, 1, 0, 0)}]]))
    )
    with pytest.raises(ValueError, match="the prompt at 1 s: positive carries an area"):
        rollout(positive=carried, window_frames=6)


def test_seconds_count_at_the_streams_frames_a_second(rollout, node, vae):
    prompts = timeline((0.0, context(1), "cut"), (1.5, context(2), "cut"))
    settings = {"vae": vae, "filename_prefix": "a", "codec": "h264", "quality": 18, "preview": False}
    for fps, frame in ((None, 6), (16.0, 6), (24.0, 9), (8.0, 3)):
        stream = node("AdaStateStreamOutput")(fps=fps, **settings).args[0] if fps else None
        report = report_of(rollout(positive=prompts, stream=stream, length=41))
        assert [entry["latent_frame"] for entry in report["prompts"]] == [0, frame]
    assert report_of(rollout(length=9))["prompts"] == []
    assert report_of(rollout(length=9, positive=timeline((0.0, context(1), "cut"))))["prompts"] == []


def test_timelines_that_cannot_be_rolled_out(rollout):
    near = timeline((0.0, context(1), "cut"), (1.0, context(2), "cut"), (1.1, context(3), "cut"))
    with pytest.raises(ValueError, match=r"the prompt at 1.1 s falls on latent frame 4, as the one before it"):
        rollout(positive=near)
    area = Prompts((PromptAt(0, [[context(1), {}]]), PromptAt(2.5, [[context(2), {"area": (1, 1, 0, 0)}]])))
    with pytest.raises(ValueError, match="the prompt at 2.5 s: positive carries an area"):
        rollout(positive=area)
    wide = Prompts((PromptAt(0, [[context(1), {}]]), PromptAt(2.5, [[torch.zeros(1, 5, 768), {}]])))
    with pytest.raises(ValueError, match="has 768 channels and the model reads 4096"):
        rollout(positive=wide)
    several = Prompts((PromptAt(0, [[context(1), {}]]), PromptAt(2.5, [[context(2), {}]] * 2)))
    with pytest.raises(ValueError, match="the prompt at 2.5 s: positive holds 2 conditioning entries"):
        rollout(positive=several)
    with pytest.raises(
        ValueError, match="window_frames is 3, and a shot keeps its first chunk of 3 latent frames there"
    ):
        rollout(positive=timeline((0.0, context(1), "cut"), (2.5, context(2), "shot")))


def test_one_prompt_over_time_is_that_prompt(rollout):
    positive = [[context(1), {}]]
    plain = rollout(positive=positive).args[0]["samples"]
    assert torch.equal(rollout(positive=timeline((0.0, context(1), "cut"))).args[0]["samples"], plain)
    again = timeline((0.0, context(1), "cut"), (1.0, context(1), "cut"), (1.5, context(1), "soft"))
    torch.testing.assert_close(rollout(positive=again).args[0]["samples"], plain, atol=1e-5, rtol=1e-5)


def test_the_text_cache_is_planned_for_the_longest_prompt(rollout):
    for lengths in ((4, 9, 2), (9, 4, 2), (2, 4, 9)):
        prompts = timeline(*((float(i), context(i, n), "cut") for i, n in enumerate(lengths)))
        report = report_of(rollout(positive=prompts, length=45))
        assert report["plan_bytes"]["text_kv"] == 2 * 2 * 9 * 128 * 4  # k and v, layers, tokens, width, float32
        assert report["text_kv_bytes_used"] == 2 * 2 * lengths[-1] * 128 * 4  # of the prompt at the end
        assert report["kv_bytes_used"] == report["kv_bytes_planned"]


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("anchor", [AnchorStatic(1), AnchorAdaptive(1)], ids=lambda a: a.kind)
def test_a_resume_changes_where_the_whole_run_does(rollout, node, anchor, transition):
    prompts = timeline((0.0, context(1), "cut"), (1.5, context(2, 7), transition), (3.0, context(3), transition))
    inputs = {"positive": prompts, "anchor": anchor, "window_frames": 6}
    whole = rollout(length=57, **inputs)
    samples = whole.args[0]["samples"]
    for length in (21, 25, 45):  # right before a change, within the chunk that begins with it, before the next
        state = rollout(length=length, **inputs).args[1]
        name = node("AdaStateSaveState")(state=state, filename_prefix="a").args[0]
        loaded = node("AdaStateLoadState")(file=name).args[0]
        assert torch.equal(rollout(length=57, resume=loaded, **inputs).args[0]["samples"], samples)


def test_rolling_forcing_under_changing_prompts_goes_on_from_a_state(rollout, model, node):
    rolling = node("AdaStateModelPreset")(model=model, preset="rolling_forcing").args[0]
    prompts = timeline((0.0, context(1), "cut"), (1.5, context(2), "recache"))
    inputs = {
        "model": rolling, "positive": prompts, "steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1,
        "positions": "auto",
    }  # fmt: skip
    whole = rollout(length=57, **inputs).args[0]["samples"]
    state = rollout(length=25, **inputs).args[1]
    assert torch.equal(rollout(length=57, resume=state, **inputs).args[0]["samples"], whole)
