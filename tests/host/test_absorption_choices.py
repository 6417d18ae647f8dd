"""What the absorption's nodes let one choose: a prior of several videos, and when layers are switched."""

from __future__ import annotations

import json

import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state, save_state
from test_absorption import DEFAULTS, LONG, report_of

SHORT = {"window_frames": 30, "length": 69}
# beside the keys of a smaller picture the statistics take more than a whole window
WIDE = {"window_frames": 90, "length": 93, "width": 96, "height": 96, "steps": 1}


@pytest.fixture
def absorption(node):
    return lambda **inputs: node("AdaStateAbsorption")(**(DEFAULTS | inputs)).args[0]


@pytest.fixture
def prior(rollout, absorption, node):
    """Two videos' prior, saved one after the other, and loaded."""
    whole = absorption(warmup_frames=4096)
    loaded = None
    for seed in (11, 12):
        state = rollout(**SHORT, seed=seed, absorption=whole).args[1]
        inputs = {"state": state, "filename_prefix": "adastate/prior", "save_as": "prior"}
        out = node("AdaStateSaveAbsorption")(**inputs, **({"prior": loaded} if loaded else {}))
        loaded = node("AdaStateLoadAbsorption")(file=out.args[0]).args[0]
    return inputs, loaded


def test_a_prior_of_two_videos_draws_a_third(rollout, absorption, node, prior, tmp_path):
    inputs, loaded = prior
    assert len(loaded.prior.runs) == 2
    wish = absorption(prior=loaded, ratio=1.0, warmup_frames=18)
    out, without = (rollout(**LONG, absorption=one) for one in (wish, absorption(ratio=1.0, warmup_frames=18)))
    found = report_of(out)["absorption"]
    assert found["prior"] == loaded.prior.fingerprint and any(one.get("towards_prior") for one in found["residuals"])
    assert not torch.equal(out.args[0]["samples"], without.args[0]["samples"])
    state = rollout(**(LONG | {"length": 57}), absorption=wish).args[1]
    state = load_state(save_state(state, tmp_path / "a.state.safetensors"))
    assert torch.equal(rollout(**LONG, absorption=wish, resume=state).args[0]["samples"], out.args[0]["samples"])
    saved = node("AdaStateSaveAbsorption")(state=out.args[1], filename_prefix="adastate/drawn").args[0]
    again = report_of(rollout(**LONG, absorption=node("AdaStateLoadAbsorption")(file=saved).args[0]))["absorption"]
    assert again["layers"] == found["layers"] and again["prior"] == loaded.prior.fingerprint
    for call, words in (
        (lambda: rollout(**SHORT, absorption=loaded), "is a prior and no absorption: connect it to prior of ISPA"),
        (lambda: rollout(**(SHORT | {"window_frames": 24}), absorption=wish), "window_frames was 30 and is 24"),
        (lambda: rollout(**SHORT, absorption=absorption(prior=loaded, local_window_frames=2)), "was 3 and is 2"),
        (lambda: absorption(prior=wish), "prior holds none: connect Load Absorption with a file"),
        (lambda: absorption(prior=loaded, absorb=False), "a prior does nothing with absorb off"),
        (
            lambda: node("AdaStateSaveAbsorption")(**inputs, prior=loaded),
            "already holds a run of this prompt and seed 12",
        ),
        (lambda: node("AdaStateSaveAbsorption")(**(inputs | {"state": out.args[1]})), "has switched already"),
        (
            lambda: node("AdaStateSaveAbsorption")(**(inputs | {"state": rollout(length=21).args[1]})),
            "there is nothing to make a prior of: the rollout ran without absorption",
        ),
        (
            lambda: node("AdaStateSaveAbsorption")(state=out.args[1], filename_prefix="x", prior=loaded),
            "a prior is connected and save_as is correction",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_memory_asks_by_the_budget_or_by_what_is_free(rollout, absorption, node, model, monkeypatch):
    from adastate_pack.nodes import absorption_budget

    free = 0
    monkeypatch.setattr(absorption_budget.host_model, "available_bytes", lambda _: free)
    monkeypatch.setattr(absorption_budget.host_model, "check_memory", lambda *_: None)
    wish = {"switch": "when memory asks", "ratio": 1.0}

    def told(wish, **inputs):
        out = rollout(**(WIDE | inputs), absorption=wish)
        return out, report_of(out)["absorption"]["switch"]

    # with nothing free the budget is what the least warm-up takes
    gib = told(absorption(**wish, warmup_frames=18))[1]["budget_gib"]
    out, found = told(absorption(**wish, budget_gib=gib))
    assert found["at_frame"] == 18 and found["why"].startswith("after a warm-up of 18 latent frames one chunk more")
    # what is open is what is free beside all the rest when it begins, and in a run that goes on what it was then
    monkeypatch.setattr(absorption_budget.host_model, "forward_bytes", lambda *_: 1000)
    plan = report_of(rollout(**WIDE, absorption=absorption(ratio=1.0)))["plan_bytes"]
    beside = sum(plan.values()) - told(absorption(**wish))[1]["budget_gib"] * 2**30
    free = int(gib * 2**30 + beside) + 1000 + model.model_size() + 2**12
    open_budget = absorption(**wish)
    auto, found = told(open_budget)
    assert found["at_frame"] == 18 and abs(found["budget_gib"] - gib) < 2**15 / 2**30
    part = rollout(**(WIDE | {"length": 57}), absorption=open_budget).args[1]
    free = 2**40
    assert torch.equal(rollout(**WIDE, absorption=open_budget, resume=part).args[0]["samples"], auto.args[0]["samples"])
    never = report_of(rollout(**WIDE, absorption=open_budget))
    assert any("nothing was absorbed: memory never asks" in warning for warning in never["warnings"])
    with pytest.raises(ValueError, match="the budget is 1e-06 GiB, and with the least warm-up"):
        rollout(**WIDE, absorption=absorption(**wish, budget_gib=1e-6))
    with pytest.raises(ValueError, match="switch when memory asks is about the device's memory"):
        rollout(**WIDE, absorption=absorption(**wish, budget_gib=gib), cache_device="host memory")
    plan = node("AdaStatePlan")(
        model=model, width=96, height=96, length=93, window_frames=90, absorption=absorption(**wish, budget_gib=gib)
    ).args[0]
    assert "layers are switched after 18 latent frames, for a budget of" in plan
    saved = node("AdaStateSaveAbsorption")(state=out.args[1], filename_prefix="adastate/asked").args[0]
    loaded = node("AdaStateLoadAbsorption")(file=saved).args[0]
    assert report_of(rollout(**WIDE, absorption=loaded))["absorption"]["switch"]["at_frame"] == 18


def test_it_switches_when_it_stopped_learning(rollout, absorption, node):
    wish = absorption(switch="when it stopped learning", most_warmup_frames=21)
    out = rollout(**LONG, absorption=wish)
    found = report_of(out)["absorption"]["switch"]
    assert 12 <= found["at_frame"] <= found["latest_frame"] == 21 and found["why"] and found["left"]
    assert report_of(out)["kv_bytes_used"] <= report_of(out)["kv_bytes_planned"]
    image, text = node("AdaStateAbsorptionReport")(report=out.args[2]).args
    assert image.ndim == 4 and json.loads(text)["switch"] == found
    good = {k: v for k, v in DEFAULTS.items() if k != "absorb"}
    check = node("AdaStateAbsorption").validate
    assert check(**good, switch="when memory asks", budget_gib=0.0) is True
    assert "switch is 'soon'; it must be one of after the warm-up" in check(**good, switch="soon")
    assert "most_warmup_frames is 11" in check(**good, switch="when it stopped learning", most_warmup_frames=11)
    assert "needs something that learns" in check(**good, switch="when it stopped learning", absorb=False)
