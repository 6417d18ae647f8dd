"""The absorption's nodes around the rollout node in a real host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state, save_state

DEFAULTS = {
    "ratio": 0.5, "warmup_frames": 12, "local_window_frames": 3, "sink_frames": 1, "ridge": "auto", "scope": "head",
    "rank": 8, "select": "residual", "absorb": True, "schedule": "once",
}  # fmt: skip
LONG = {"window_frames": 30, "length": 93}


@pytest.fixture
def absorption(node):
    return lambda **inputs: node("AdaStateAbsorption")(**(DEFAULTS | inputs)).args[0]


def report_of(out) -> dict:
    return json.loads(out.args[2])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ratio": 2.0}, "ratio is 2.0; it must lie between 0"),
        ({"ridge": "much"}, "ridge is 'much'; give auto, or a number of at least 0"),
        ({"ridge": "-1"}, "ridge is '-1'"),
        ({"ridge": "nan"}, "ridge is 'nan'"),
        ({"ridge": "1_0"}, "ridge is '1_0'"),
        ({"ridge": "1e400"}, "ridge is '1e400'"),
        ({"ridge": "\u0661"}, "ridge is '\u0661'"),
        ({"ridge": "0x1p3"}, "ridge is '0x1p3'"),
        ({"scope": "heads"}, "scope is 'heads'; it must be one of head, layer, lowrank"),
        ({"select": "luck"}, "select is 'luck'"),
        ({"schedule": "daily"}, "schedule is 'daily'; it must be one of once, when it drifts"),
        ({"warmup_frames": 0}, "warmup_frames is 0; it must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_said_before_anything_runs(node, inputs, message):
    good = {k: v for k, v in DEFAULTS.items() if k != "absorb"}
    assert node("AdaStateAbsorption").validate(**good) is True
    assert node("AdaStateAbsorption").validate(**dict.fromkeys(good)) is True
    assert message in node("AdaStateAbsorption").validate(**(good | inputs))


def test_half_the_layers_give_their_history_back(rollout, absorption, node):
    plain = report_of(rollout(**LONG))
    out = rollout(**LONG, absorption=absorption())
    report = report_of(out)
    found = report["absorption"]
    assert found["phase"] == "switched" and len(found["layers"]) == 1
    assert report["kv_bytes_planned"] == report["kv_bytes_used"] == found["kv_bytes_peak"]
    assert report["kv_bytes_without_absorption"] == plain["kv_bytes_planned"] == found["kv_bytes_before"]
    # latent frames of one layer's keys, of which those of the window are there once more; 24 latent frames are made
    whole, warm, small = (window * 1.5 + 3 for window in (26, 14, 3 + 1))
    frame = plain["kv_bytes_planned"] / (2 * whole)
    assert found["kv_bytes_after"] == pytest.approx(frame * (whole + small))
    assert found["kv_bytes_peak"] == pytest.approx(frame * (whole + small + warm))
    assert found["freed_share"] == pytest.approx(1 - (whole + small) / (2 * whole), abs=1e-4)
    assert found["correction_bytes"] < report["plan_bytes"]["absorption"] + found["kv_bytes_before"]
    image, text = node("AdaStateAbsorptionReport")(report=out.args[2]).args
    assert image.ndim == 4 and image.std() > 0.01 and json.loads(text) == found
    with pytest.raises(ValueError, match="not the REPORT of a rollout with absorption"):
        node("AdaStateAbsorptionReport")(report=rollout(length=21).args[2])


def test_half_absorbed_at_window_120_takes_three_fifths_of_the_plain_cache(absorption, node):
    """Of the demo's 6 layers 3 are switched: planned and taken at most .62 of what the cache takes without absorption."""
    import nodes as host_nodes

    (demo,) = host_nodes.UNETLoader().load_unet("adastate_demo.safetensors", "default")
    positive = node("AdaStateDemoPrompt")(terrain="city", pace="fast", balloon="gold", lantern="lantern").args[0]
    half = absorption(warmup_frames=24)
    inputs = {"model": demo, "width": 64, "height": 64, "length": 485, "window_frames": 120}
    text, plain = (node("AdaStatePlan")(**inputs, absorption=one).args for one in (half, None))
    numbers, plain = json.loads(text[1]), json.loads(plain[1])
    assert numbers["kv_bytes_without_absorption"] == plain["kv_bytes"]
    assert numbers["kv_bytes"] <= 0.62 * plain["kv_bytes"]
    share = 1 - numbers["kv_bytes"] / plain["kv_bytes"]
    assert f"absorption takes {share:.0%} of it off the peak" in text[0]
    run = inputs | {"positive": positive, "batch_size": 1, "seed": 1, "steps": 1, "shift": 5.0, "chunk_frames": 0}
    report = report_of(node("AdaStateRollout")(**run, positions="auto", absorption=half))
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] == numbers["kv_bytes"]
    assert report["absorption"]["kv_bytes_peak"] == numbers["kv_bytes"]


def test_the_models_own_weights_stay_as_they_were(rollout, absorption, model):
    before = {n: p.clone() for n, p in model.model.diffusion_model.named_parameters()}
    first = rollout(**LONG).args[0]["samples"]
    rollout(**LONG, absorption=absorption(ratio=1.0))
    assert all(torch.equal(before[n], p) for n, p in model.model.diffusion_model.named_parameters())
    assert torch.equal(rollout(**LONG).args[0]["samples"], first)


def test_a_window_with_nothing_to_absorb_says_so(rollout, absorption):
    plain, absorbed = rollout(length=69), rollout(length=69, absorption=absorption())
    assert torch.equal(plain.args[0]["samples"], absorbed.args[0]["samples"])
    report = report_of(absorbed)
    assert report["absorption"]["phase"] == "nothing to absorb"
    assert any("nothing was absorbed" in warning for warning in report["warnings"])


LITTLE = "there was little to absorb: without its history no layer loses more than 0.00"


@pytest.mark.parametrize(("local", "absorb", "told"), [(12, True, True), (9, True, False), (12, False, False)], ids=str)
def test_a_history_that_hardly_counts_is_told_of(rollout, absorption, local, absorb, told):
    """At a local window of 9 one of the two layers loses more than .02."""
    wish = absorption(warmup_frames=local + 6, local_window_frames=local, absorb=absorb)
    report = report_of(rollout(window_frames=40, length=81, absorption=wish))
    lost = [one["before"] for one in report["absorption"]["residuals"]]
    assert report["absorption"]["phase"] == "switched" and min(lost) < 0.02
    assert (max(lost) < 0.02) == (local == 12)
    assert any(warning.startswith(LITTLE) for warning in report["warnings"]) == told


def test_with_an_adaptive_state_it_is_said_before_and_after(rollout, absorption, model, node):
    anchor = node("AdaStateAnchorAdaptive")(state_frames=1).args[0]

    def warned(**wishes):
        inputs = {"anchor": anchor, "absorption": absorption(**wishes), "window_frames": 30, "length": 45}
        plan = node("AdaStatePlan")(model=model, width=32, height=32, chunk_frames=3, **inputs).args[1]
        told = [json.loads(text)["warnings"] for text in (plan, rollout(**inputs, positions="auto").args[2])]
        return [any("the adaptive state carries what has to last" in one for one in warnings) for warnings in told]

    assert warned() == [True, True]
    assert warned(absorb=False) == warned(ratio=0.0) == warned(ridge="inf") == [False, False]


@pytest.mark.parametrize("length", [33, 69])
def test_a_state_goes_on_bit_for_bit(rollout, absorption, tmp_path, length):
    wish = absorption(schedule="every few chunks", monitor_chunks=2)
    whole = rollout(**LONG, absorption=wish).args[0]["samples"]
    state = rollout(**(LONG | {"length": length}), absorption=wish).args[1]
    state = load_state(save_state(state, tmp_path / "a.state.safetensors"))
    assert torch.equal(rollout(**LONG, absorption=wish, resume=state).args[0]["samples"], whole)
    with pytest.raises(ValueError, match="this state belongs to another rollout: absorption is"):
        rollout(**LONG, resume=state)


def test_a_saved_correction_serves_again_and_no_other_rollout(rollout, absorption, node, folders):
    out = rollout(**LONG, absorption=absorption())
    saved = node("AdaStateSaveAbsorption")(state=out.args[1], filename_prefix="adastate/half").args[0]
    assert saved.endswith(".absorption.safetensors [output]")
    assert (Path(folders) / "output" / saved.removesuffix(" [output]")).stat().st_size < 1_000_000
    loaded = node("AdaStateLoadAbsorption")(file=saved).args[0]
    again = rollout(**LONG, absorption=loaded)
    torch.testing.assert_close(again.args[0]["samples"], out.args[0]["samples"], atol=1e-3, rtol=1e-3)
    assert report_of(again)["absorption"]["layers"] == report_of(out)["absorption"]["layers"]
    assert not any("solved for another" in warning for warning in report_of(again)["warnings"])
    other = rollout(**LONG, absorption=loaded, seed=6)
    assert any("solved for another seed" in warning for warning in report_of(other)["warnings"])
    assert other.args[1].absorption["solved_for"] == out.args[1].absorption["solved_for"], (
        "not for the seed that took it"
    )
    with pytest.raises(ValueError, match="belongs to another rollout: width was 4 and is 8"):
        rollout(**LONG, absorption=loaded, width=64)
    with pytest.raises(ValueError, match="there is no correction to save: the rollout ran without absorption"):
        node("AdaStateSaveAbsorption")(state=rollout(length=21).args[1], filename_prefix="x")
    early = rollout(**(LONG | {"length": 21}), absorption=absorption()).args[1]
    with pytest.raises(ValueError, match="stands at 'warming'"):
        node("AdaStateSaveAbsorption")(state=early, filename_prefix="x")
    assert "there is no absorption file 'gone" in node("AdaStateLoadAbsorption").validate(file="gone.safetensors")
    assert "does not name a file inside" in node("AdaStateLoadAbsorption").validate(file="../x [output]")
    (Path(folders) / "input" / "bad.absorption.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.absorption.safetensors cannot be read as a saved absorption"):
        node("AdaStateLoadAbsorption")(file="bad.absorption.safetensors")


def test_statistics_that_do_not_fit_are_refused_with_the_scope_that_would(rollout, absorption, monkeypatch):
    from adastate_pack.nodes.host import model as host_model

    needed = report_of(rollout(**LONG))["plan_bytes"]
    monkeypatch.setattr(host_model, "available_bytes", lambda patcher: sum(needed.values()) + 1000)
    with pytest.raises(ValueError, match="caches need"):
        rollout(**LONG, absorption=absorption(scope="layer"))


def test_a_batch_that_does_not_fit_is_refused_with_the_batch_that_would(rollout, absorption, monkeypatch):
    from adastate_pack.nodes.host import model as host_model

    wish, small = absorption(), {"window_frames": 14, "length": 21}
    for scope in ("head", "layer"):
        wish = absorption(scope=scope)
        three = sum(report_of(rollout(**small, absorption=wish, batch_size=3))["plan_bytes"].values())
        monkeypatch.setattr(host_model, "available_bytes", lambda patcher, most=three: most)
        with pytest.raises(ValueError, match=r"(window_frames \d+ or )?batch_size 3 would fit"):
            rollout(**small, absorption=wish, batch_size=4)
        monkeypatch.undo()


def test_layers_are_chosen_by_the_picture_or_taken_of_a_saved_absorption(rollout, absorption, node, folders):
    chosen = rollout(**LONG, absorption=absorption(select="sensitivity"), batch_size=2)
    told = report_of(chosen)["absorption"]
    assert (told["select"], told["selection_passes"]) == ("sensitivity", 3) and "change" in told["residuals"][0]
    assert node("AdaStateAbsorption").validate(**(DEFAULTS | {"select": "saved"})) is True
    with pytest.raises(ValueError, match="select saved takes the layers of a saved absorption"):
        absorption(select="saved")
    saved = node("AdaStateSaveAbsorption")(state=chosen.args[1], filename_prefix="adastate/pair").args[0]
    loaded = node("AdaStateLoadAbsorption")(file=saved).args[0]
    again = rollout(**LONG, absorption=absorption(select="saved", saved_layers=loaded), batch_size=2)
    assert torch.equal(again.args[0]["samples"], chosen.args[0]["samples"])
    with pytest.raises(ValueError, match="has a correction for each of 2 videos, and batch_size is 1: give 2, or load"):
        rollout(**LONG, absorption=loaded)
    loaded.belongs_to["model"] = "other"
    with pytest.raises(
        ValueError, match="the layers of the absorption pair.* are another checkpoint's: choose another"
    ):
        rollout(**LONG, absorption=absorption(select="saved", saved_layers=loaded))
    with pytest.raises(ValueError, match="saved_layers holds no layers: connect Load Absorption"):
        absorption(select="saved", saved_layers=absorption())


ODD_REPORTS = [
    "5", "[]", "null", "", "{", '{"absorption": 5}', '{"absorption": {}}', '{"absorption": null}', '{"absorption": []}',
    "[" * 100_000,
    '{"absorption": {"monitor": [], "residuals": 5}}', '{"absorption": {"monitor": [], "residuals": [{"layer": "a"}]}}',
    '{"absorption": {"monitor": [5], "residuals": [], "layers": [1]}}', '{"absorption": ' + "9" * 5000 + "}",
    '{"absorption": {"monitor": [], "residuals": [], "layers": [1e999], "kv_bytes_before": 1, "kv_bytes_after": 1, "phase": "a", '
    '"solve_seconds": "b"}}',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_REPORTS, ids=lambda text: text[:40])
def test_a_report_that_is_none_is_refused(node, text):
    with pytest.raises(
        ValueError, match="^report is not the REPORT of a rollout with absorption; connect that output$"
    ):
        node("AdaStateAbsorptionReport")(report=text)


@pytest.mark.parametrize("text", ["auto", " Auto ", "0", "0.3", ".3", "1e-3", "inf", "INF", "Infinity", "3."])
def test_ridges_as_people_write_them(node, text):
    assert node("AdaStateAbsorption").validate(ridge=text) is True
