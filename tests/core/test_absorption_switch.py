"""When layers are switched: as late as memory allows, or when the warm-up has stopped learning."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_absorption_solve import direct_fit
from test_phases import latents_of, rollout_of, spec_of
from test_rollout import SCHEDULE
from tiny_model import TinyModel

from adastate_core.absorption import warm_up
from adastate_core.absorption.collector import Collector
from adastate_core.absorption.settings import AbsorptionSettings, as_in_state, settings_from
from adastate_core.cache.byte_plan import KV_NAMES
from adastate_core.states.state_file import load_state, save_state

GIB = 2**30


def taken(spec) -> int:
    """Keys, values and an absorption's own bytes on the device, at most."""
    names = (*KV_NAMES, "absorption")
    return max(sum(sizes.get(name, 0) for name in names) for sizes in spec.plan().moments())


def asked(spec, **settings):
    return replace(spec, absorption=replace(spec.absorption, **settings))


def gone_on(spec, model, length, stop, tmp_path):
    """The latents of a run that is stopped at `stop`, saved, and gone on with; and the second rollout."""
    first = rollout_of(spec, model, length=stop)
    latents = latents_of(first, stop)
    state = load_state(save_state(first.snapshot(), tmp_path / f"{stop}.state.safetensors"))
    second = rollout_of(spec, model, state=state, length=length)
    return torch.cat([latents, latents_of(second, length)], 2), second


def test_memory_asks_when_one_chunk_more_would_exceed_the_budget(tmp_path):
    model = TinyModel(layers=4)
    fixed = spec_of(model, window=30, local_window_frames=3, ratio=0.75)
    sizes = {frames: taken(asked(fixed, warmup_frames=frames)) for frames in range(9, 40, 3)}
    for until, frames in ((9, 9), (18, 18)):
        spec = asked(fixed, switch="memory", budget_gib=(sizes[frames] + 8) / GIB)
        assert max(f for f, size in sizes.items() if size <= spec.absorption.budget_gib * GIB) == until
        rollout = rollout_of(spec, model)
        whole = latents_of(rollout, 27)
        report = rollout.absorber.report()["switch"]
        assert report["at_frame"] == report["latest_frame"] == until and "one chunk more would exceed" in report["why"]
        assert rollout.cache.peak_nbytes == spec.plan().kv_bytes <= spec.absorption.budget_gib * GIB
        assert torch.equal(whole, latents_of(rollout_of(asked(fixed, warmup_frames=until), model), 27))
    # a shorter video begins alike, although all of it would fit, and is gone on with
    again, resumed = gone_on(spec, model, 27, 15, tmp_path)
    assert torch.equal(again, whole) and resumed.absorber.report()["switch"] == report
    again, resumed = gone_on(spec, model, 27, 21, tmp_path)
    assert torch.equal(again, whole) and resumed.absorber.report()["switch"] == report


def test_memory_that_never_asks_leaves_the_whole_windows():
    model = TinyModel()
    spec = spec_of(model, window=12, switch="memory", budget_gib=1.0)
    plain = replace(spec, absorption=None)
    rollout = rollout_of(spec, model)
    assert torch.equal(latents_of(rollout, 18), latents_of(rollout_of(plain, model), 18))
    assert rollout.cache.peak_nbytes == spec.plan().kv_bytes == plain.plan().kv_bytes
    report = rollout.absorber.report()
    assert report["phase"] == "nothing to absorb" and report["switch"]["why"].startswith(
        "memory never asks: whole windows"
    )


def test_a_budget_below_the_least_warm_up_is_refused_with_what_that_takes():
    spec = asked(spec_of(TinyModel(layers=4), window=30), switch="memory", budget_gib=1e-6)
    words = "^the budget is 1e-06 GiB, and with the least warm-up, 9 latent frames, cache and statistics take .* GiB: give a larger"
    with pytest.raises(ValueError, match=words):
        spec.plan(length=60)


def test_a_warm_up_ends_when_it_has_stopped_learning(monkeypatch, tmp_path):
    """semantics: Absorption: when to switch. The shares are those of least squares on the stored rows."""
    model = TinyModel()
    spec = spec_of(model, window=60, switch="learned", most_warmup_frames=45, ridge=None, ratio=0.5)
    monkeypatch.setattr(warm_up, "LEAST_GAIN", 0.3)  # a small model of random weights learns little
    rows: dict[int, dict[int, list]] = {}
    add, rollout = Collector.add, rollout_of(spec, model, SCHEDULE)

    def recorded(collector, layer, local, full):
        pair = local.flatten(0, 1).clone(), full.flatten(0, 1).clone()
        rows.setdefault(layer, {}).setdefault(rollout.generated, []).append(pair)
        add(collector, layer, local, full)

    monkeypatch.setattr(Collector, "add", recorded)
    whole = latents_of(rollout, 48)
    monkeypatch.setattr(Collector, "add", add)
    heads, shares = model.geometry.heads, {}
    chunks = sorted(rows[0])
    for newest in range(3, len(chunks)):
        left = missing = 0.0
        for each in rows.values():
            fitted = [pair for chunk in chunks[: newest - 1] for pair in each[chunk]]
            matrix, constant = direct_fit(*(torch.cat(t) for t in zip(*fitted, strict=True)), heads, 1.0)
            local, full = (torch.cat(t).double() for t in zip(*each[chunks[newest]], strict=True))
            energy = full.square().sum()
            error = (full - local - local @ torch.block_diag(*matrix) - constant).square().sum()
            left, missing = left + float(error / energy), missing + float((full - local).square().sum() / energy)
        shares[3 * (chunks[newest] + 1)] = left / missing
    frames = sorted(shares)
    flat = [f for f, before in zip(frames[2:], frames, strict=False) if shares[f] > 0.7 * shares[before]]
    report = rollout.absorber.report()["switch"]
    assert report["at_frame"] == flat[0] == frames[-1] < 45 and "less than 30%" in report["why"]
    assert [frame for frame, _ in report["left"]] == frames
    assert [left for _, left in report["left"]] == pytest.approx([shares[f] for f in frames], rel=1e-3)
    assert rollout.cache.peak_nbytes <= spec.plan().kv_bytes
    again, resumed = gone_on_with(spec, model, 48, flat[0] - 3, tmp_path)
    assert torch.equal(again, whole) and resumed.absorber.report()["switch"] == report


def gone_on_with(spec, model, length, stop, tmp_path):
    first = rollout_of(spec, model, SCHEDULE)
    latents = latents_of(first, stop)
    state = load_state(save_state(first.snapshot(), tmp_path / "a.state.safetensors"))
    assert state.absorption["learned"]
    second = rollout_of(spec, model, SCHEDULE, state=state)
    return torch.cat([latents, latents_of(second, length)], 2), second


def test_a_warm_up_that_keeps_learning_ends_at_its_longest(monkeypatch):
    monkeypatch.setattr(warm_up, "LEAST_GAIN", -math.inf)
    model = TinyModel()
    spec = spec_of(model, window=60, switch="learned", ratio=0.5)
    rollout = rollout_of(spec, model)
    latents_of(rollout, 24)
    report = rollout.absorber.report()["switch"]
    assert (
        report["at_frame"] == report["latest_frame"] == 18 and "the longest warm-up, 18 latent frames" in report["why"]
    )
    assert rollout.cache.peak_nbytes == spec.plan().kv_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"switch": "soon"}, "switch is 'soon'; it must be one of fixed, memory, learned"),
        ({"switch": "learned", "absorb": False}, "needs something that learns: turn absorb on"),
        (
            {"switch": "learned", "ridge": math.inf},
            "needs something that learns: turn absorb on and give a finite ridge",
        ),
        ({"switch": "learned", "most_warmup_frames": 23}, "must be at least warmup_frames, 24, or 0 for twice that"),
        ({"budget_gib": -1.0}, "budget_gib is -1.0; it must be a number of GiB, or 0"),
        ({"prior": "0" * 16, "absorb": False}, "a prior does nothing with absorb off"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        AbsorptionSettings(**changes)


def test_memory_does_not_ask_of_a_cache_in_host_memory():
    with pytest.raises(
        ValueError, match="^switch when memory asks is about the device's memory, and the cache is in host"
    ):
        spec_of(TinyModel(), place=("model", "host memory"), switch="memory", budget_gib=1.0)


def test_what_no_input_says_is_as_it_was_in_the_state():
    before = settings_from({"warmup_frames": 9})
    assert (before.judge, before.switch, before.prior) == ("next", "fixed", "")
    assert before.describe().keys().isdisjoint({"judge", "switch", "prior", "budget_gib", "most_warmup_frames"})
    now = AbsorptionSettings(warmup_frames=9)
    assert as_in_state(now, before.describe()) == before and as_in_state(now, None) == now
    known = replace(now, switch="memory", budget_gib=2.5)
    assert as_in_state(replace(known, budget_gib=0.0), known.describe()) == known
    assert as_in_state(replace(known, budget_gib=3.0), known.describe()).budget_gib == 3.0
    for one, other in itertools.product((before, now, known), repeat=2):
        assert (settings_from(one.describe()) == other) == (one == other)
