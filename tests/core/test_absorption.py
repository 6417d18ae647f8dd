"""The absorption of whole rollouts against independent, slower ways; its arithmetic alone is in test_absorption_solve.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_absorption_solve import direct_fit
from test_rollout import SCHEDULE, roll, spec_for
from tiny_model import TinyModel

from adastate_core.absorption import absorber as absorber_module
from adastate_core.absorption.absorber import Absorber
from adastate_core.absorption.collector import Collector
from adastate_core.absorption.saved import load_solution, save_solution, solution_from
from adastate_core.absorption.settings import AbsorptionSettings, settings_from
from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.rollout import ModelGeometry, Rollout, RolloutSpec, Settings
from adastate_core.states.state_file import load_state, save_state

ANCHORS = [Anchor(), AnchorStatic(1), AnchorEMA(1, 0.9), AnchorAdaptive(1)]
WARM = {"warmup_frames": 12, "local_window_frames": 3, "sink_frames": 1}


def absorbed_spec(model, anchor=Anchor(), positions="packed", window=100, **settings):  # noqa: B008
    spec = spec_for(model, anchor=anchor, W=window, positions=positions)
    return replace(spec, absorption=AbsorptionSettings(**(WARM | settings)))


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: a.kind)
def test_ratio_zero_and_a_short_warm_up_are_the_plain_run(anchor):
    model = TinyModel()
    plain_run, _, _ = roll(model, spec_for(model, anchor=anchor, W=100), 24)
    for settings in ({"ratio": 0.0}, {"warmup_frames": 3}):
        spec = absorbed_spec(model, anchor, **settings)
        latents, rollout, _ = roll(model, spec, 24)
        assert torch.equal(latents, plain_run)
        assert rollout.absorber.report()["phase"] == "nothing to absorb"
        assert spec.plan().plain.kv_bytes == rollout.cache.nbytes


@pytest.mark.parametrize("positions", ["packed", "fixed", "absolute"])
@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: a.kind)
def test_an_infinite_ridge_is_no_absorb_is_a_small_cache(anchor, positions):
    if positions == "absolute" and anchor.relative_only:
        pytest.skip("refused")
    model = TinyModel()
    off, rollout, _ = roll(model, absorbed_spec(model, anchor, positions, ratio=1.0, absorb=False), 33)
    infinite, _, _ = roll(model, absorbed_spec(model, anchor, positions, ratio=1.0, ridge=math.inf), 33)
    assert torch.equal(off, infinite)
    full, _, _ = roll(model, spec_for(model, anchor=anchor, W=100, positions=positions), 33)
    torch.testing.assert_close(off[:, :, :12], full[:, :, :12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(off[:, :, 12:], full[:, :, 12:], atol=1e-3)
    for layer in rollout.cache:
        assert [slot.frame for slot in layer.window.values()] == [30, 31, 32]
        assert [slot.frame for slot in layer.pinned.values()] == ([0] if anchor.kind == "none" else [])


@pytest.mark.parametrize("scope", ["head", "layer", "lowrank"])
def test_the_switched_layers_free_their_history(scope):
    """semantics: Absorption: the switch."""
    model = TinyModel()
    spec = absorbed_spec(model, window=30, ratio=0.5, scope=scope, rank=2)
    _, rollout, _ = roll(model, spec, 33)
    report = rollout.absorber.report()
    layers = model.geometry.layers
    assert len(report["layers"]) == layers // 2 and report["phase"] == "switched"
    frame = 2 * rollout.cache.plan.frame_bytes * 1.5  # keys, values, and the un-rotated copy of the keys
    freed = (layers // 2) * (30 - 4) * frame
    assert report["kv_bytes_before"] - report["kv_bytes_after"] == freed
    plan = rollout.cache.plan
    assert rollout.cache.nbytes == report["kv_bytes_after"] == plan.held(plan.phases[-1]).kv_bytes
    assert report["kv_bytes_before"] == replace(spec, absorption=None).plan().kv_bytes > report["kv_bytes_peak"]
    assert report["kv_bytes_peak"] == spec.plan().kv_bytes
    assert report["freed_share"] == pytest.approx(freed / report["kv_bytes_before"], abs=1e-4)
    assert report["freed_share_at_peak"] < report["freed_share"] < 0.5, (
        "half of the layers are less than half of the cache"
    )
    assert 0 < report["correction_bytes"] <= spec.plan().phases[-1].absorption_bytes
    assert all(entry["after"] <= entry["before"] for entry in report["residuals"])


class Recorder:
    """Keeps what the absorber saw, and redoes it with one softmax."""

    def __init__(self, rollout: Rollout) -> None:
        self.rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        corrections, heads = rollout.absorber.corrections, rollout.spec.geometry.heads
        collect = corrections.collect

        def recorded(layer: int, q: torch.Tensor, frames: int) -> torch.Tensor:
            cache = rollout.cache.layers[layer]
            near = [cache.read_slots(s) for s in corrections.parts(cache, frames)[0]]
            local = self.attend(q, *(torch.cat(t, 1) for t in zip(*near, strict=True)), heads)
            full = self.attend(q, *cache.read(frames), heads)
            self.rows.setdefault(layer, []).append((local.flatten(0, 1), full.flatten(0, 1)))
            return collect(layer, q, frames)

        corrections.collect = recorded

    @staticmethod
    def attend(q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: a.kind)
def test_the_runs_correction_is_the_fit_on_what_its_layers_gave(anchor):
    """semantics: Absorption: what is collected."""
    model = TinyModel()
    spec = absorbed_spec(model, anchor, ratio=1.0, ridge=0.3)
    rollout = Rollout(model, spec, Settings(7, SCHEDULE))
    recorder = Recorder(rollout)
    for _ in rollout.chunks(15):
        pass
    absorber = rollout.absorber
    for layer, passes in recorder.rows.items():
        local, full = (torch.cat(t) for t in zip(*passes, strict=True))
        matrix, constant = direct_fit(local, full, model.geometry.heads, 0.3)
        found = absorber.solution.fits[layer].correction
        torch.testing.assert_close(found.matrix.double(), matrix, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.constant.double(), constant, atol=2e-3, rtol=2e-3)
    history_chunks = 12 // 3 - 2  # in the first two all frames of the past are local
    assert len(recorder.rows[0]) == history_chunks * (len(SCHEDULE.sigmas) + 1)


def test_a_correction_solved_anew_is_the_fit_on_all_that_was_collected(monkeypatch):
    model, added, fits = TinyModel(), [], []
    spec = absorbed_spec(model, ratio=1.0, ridge=0.3, monitor_layers=-1, monitor_chunks=6, refresh="always")
    rollout = Rollout(model, spec, Settings(7, SCHEDULE))
    add, refresh = Collector.add, Absorber._refresh

    def recorded(collector, layer, local, full):
        if layer == 0:
            added.append((rollout.generated, local.flatten(0, 1).clone(), full.flatten(0, 1).clone()))
        add(collector, layer, local, full)

    def better(self, layer, *rows):
        better = refresh(self, layer, *rows)
        if layer == 0:
            standing = self.solution.fits[layer].correction
            fits.append((better is not None, standing, standing if better is None else better.correction))
        return better

    monkeypatch.setattr(Collector, "add", recorded)
    monkeypatch.setattr(Absorber, "_refresh", better)
    for _ in rollout.chunks(12 + 6 * 3):
        pass
    chunks = sorted({chunk for chunk, _, _ in added})
    anew = [chunk for chunk in chunks if chunk >= 4]
    assert len(anew) == 4 and anew[-1] - anew[0] == 3 and len(chunks) > 4 and len(fits) == 1
    local, full = (torch.cat([entry[i] for entry in added]) for i in (1, 2))
    newest = [entry[1:] for entry in added if entry[0] == chunks[-1]]
    held_local, held_full = (torch.cat([entry[i] for entry in newest]).double() for i in (0, 1))
    seen_local, seen_full = (torch.cat([e[i] for e in added if e[0] != chunks[-1]]) for i in (1, 2))

    def error(matrix, constant):
        return (held_full - held_local - held_local @ matrix - constant).square().sum()

    [(taken, standing, now)] = fits
    assert rollout.absorber.solution.fits[0].correction is now
    heads = model.geometry.heads
    trial = direct_fit(seen_local, seen_full, heads, 0.3)
    old = error(torch.block_diag(*standing.whole().double()), standing.constant.double())
    assert taken == bool(error(torch.block_diag(*trial[0]), trial[1]) < old)
    expected = direct_fit(local, full, heads, 0.3) if taken else (standing.whole().double(), standing.constant.double())
    torch.testing.assert_close(now.whole().double(), expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(now.constant.double(), expected[1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: a.kind)
@pytest.mark.parametrize("stop", [6, 9, 12, 21])
def test_a_resumed_run_goes_on_bit_for_bit(anchor, stop, tmp_path):
    model = TinyModel()
    spec = absorbed_spec(model, anchor, window=18, monitor_layers=-1, monitor_chunks=2, refresh="always")
    straight, whole, _ = roll(model, spec, 33)
    first, rollout, _ = roll(model, spec, stop, keep=True)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "a.safetensors"))
    second, resumed, _ = roll(model, spec, 33, state=state)
    assert torch.equal(torch.cat([first, second], 2), straight)
    assert resumed.absorber.report()["monitor"] == whole.absorber.report()["monitor"] != []
    with pytest.raises(ValueError, match="absorption is"):
        Rollout(model, absorbed_spec(model, anchor, window=18, ratio=0.25), Settings(7, SCHEDULE), state=state)


def test_an_interrupted_chunk_leaves_no_trace_in_the_statistics():
    model = TinyModel()
    spec = absorbed_spec(model)
    straight, _, _ = roll(model, spec, 24)

    class Stop(Exception):
        pass

    def interrupt(chunk, step, steps, x0):
        if chunk == 3 and step == 2:
            raise Stop

    rollout = Rollout(model, spec, Settings(7, SCHEDULE), keep_latents=True, on_step=interrupt)
    with pytest.raises(Stop):
        list(rollout.chunks(24))
    _, resumed, _ = roll(model, spec, 24, state=rollout.snapshot(), keep=True)
    assert torch.equal(resumed.kept_latents, straight)


def test_watching_changes_nothing_and_refreshing_does():
    model = TinyModel()
    plain_run, _, _ = roll(model, absorbed_spec(model), 36)
    watched, rollout, _ = roll(model, absorbed_spec(model, monitor_layers=1, monitor_chunks=2), 36)
    assert torch.equal(watched, plain_run)
    entries = rollout.absorber.report()["monitor"]
    assert [e["frame"] for e in entries] == [18, 24, 30, 36] and not any(e["refreshed"] for e in entries)
    refreshed, again, _ = roll(model, absorbed_spec(model, monitor_layers=-1, monitor_chunks=2, refresh="always"), 36)
    assert torch.equal(refreshed[:, :, :18], plain_run[:, :, :18]) and not torch.equal(refreshed, plain_run)
    assert any(e["refreshed"] for e in again.absorber.report()["monitor"])
    assert again.absorber.report()["history_bytes_in_host_memory"] > 0


def test_what_the_monitor_remembers_is_bounded_and_its_newest_stay(monkeypatch):
    model = TinyModel()
    monkeypatch.setattr(absorber_module, "MOST_WATCHED", 6)
    _, rollout, _ = roll(model, absorbed_spec(model, ratio=1.0, monitor_layers=-1, monitor_chunks=1), 60)
    entries = rollout.absorber.report()["monitor"]
    layers = model.geometry.layers
    frames = [entry["frame"] for entry in entries]
    assert len(entries) <= 6 and frames == sorted(frames) and frames[-1] == 60
    assert all(frames.count(frame) == layers for frame in frames)


def test_the_monitors_full_attention_is_that_of_a_cache_that_forgot_nothing():
    """With an infinite ridge and a window that holds everything, local and host history together are all frames."""
    model = TinyModel()
    spec = absorbed_spec(model, ratio=1.0, monitor_layers=-1, monitor_chunks=1, ridge=math.inf)
    rollout = Rollout(model, spec, Settings(7, SCHEDULE))
    seen = []
    for _ in rollout.chunks(21):
        histories = rollout.absorber.histories
        if histories:
            layer = rollout.cache.layers[0]
            held = [s.frame for s in (layer.pinned | layer.window).values()] + [k.frame for k in histories[0]._frames]
            seen.append(sorted(held))
    assert seen[-1] == list(range(21))


def test_the_host_remembers_as_much_as_the_other_layers():
    model = TinyModel()
    spec = absorbed_spec(model, window=12, ratio=0.5, monitor_layers=-1)
    rollout = Rollout(model, spec, Settings(7, SCHEDULE))
    for _ in rollout.chunks(36):
        pass
    absorber = rollout.absorber
    (switched,), (kept,) = absorber.solution.chosen, {0, 1} - set(absorber.solution.chosen)
    small = rollout.cache.layers[switched]
    mine = [slot.frame for slot in small.window.values()] + [one.frame for one in absorber.histories[switched]._frames]
    others = sorted(slot.frame for slot in rollout.cache.layers[kept].window.values())
    assert sorted(mine) == others[1:], "one place is the pinned first frame's"


def test_a_saved_solution_gives_the_run_it_came_from_and_no_other_models(tmp_path):
    model = TinyModel()
    spec = absorbed_spec(model)
    straight, rollout, _ = roll(model, spec, 30)
    absorber: Absorber = rollout.absorber
    path = save_solution(absorber.solution, spec.absorption, {"model": "a", "seed": 7}, tmp_path / "b.safetensors")
    settings, belongs_to, state = load_solution(path)
    assert settings == spec.absorption and belongs_to == {"model": "a", "seed": 7}
    geometry = model.geometry
    width = geometry.heads * geometry.head_dim
    solution = solution_from(state, settings, geometry.layers, width, geometry.heads)
    again = Rollout(model, spec, Settings(7, SCHEDULE), solution=solution)
    latents = torch.cat([c.latents for c in again.chunks(30)], 2)
    # the warm-up is not taken apart this time, so it is equal but for rounding
    torch.testing.assert_close(latents, straight, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"fit.1.constant is float32 \[24\], not float32 \[48\]"):
        solution_from(state, settings, geometry.layers, 2 * width, geometry.heads)
    with pytest.raises(ValueError, match="chosen is .* not 4 of 8 layers"):
        solution_from(state, settings, 4 * geometry.layers, width, geometry.heads)
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="c.safetensors cannot be read as a saved absorption"):
        load_solution(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"warmup_frames": 0}, "warmup_frames is 0"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": math.nan}, "ridge is nan"),
        ({"scope": "all"}, "scope is 'all'"),
        ({"select": "luck"}, "select is 'luck'"),
        ({"refresh": "always"}, "needs layers that keep their history"),
        ({"monitor_chunks": 0}, "monitor_chunks is 0"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        AbsorptionSettings(**changes)


def test_settings_come_back_from_their_description():
    for settings in (
        AbsorptionSettings(),
        AbsorptionSettings(ridge=math.inf, scope="layer"),
        AbsorptionSettings(ridge=0.3),
    ):
        assert settings_from(settings.describe()) == settings


def test_a_14b_is_planned_to_the_byte():
    """832x480, bf16, 126 latent frames of keys: per-head statistics fit beside the cache, per-layer ones do not.

    Most is taken when the last layer gets its whole window, while its old buffers of the warm-up, of 26 frames, are still there.
    """
    heads, layers, width, tokens = 40, 40, 5120, 1560
    geometry = ModelGeometry(16, layers, heads, 128)
    for scope, blocks in (("head", heads), ("layer", 1), ("lowrank", 1)):
        settings = AbsorptionSettings(scope=scope)
        spec = RolloutSpec(
            geometry, 1, 60, 104, 3, 123, Anchor(), "absolute", torch.bfloat16, absorption=settings
        )  # fmt: skip
        plan, frame = spec.plan(), tokens * width * 2
        sizes, plain = plan.bytes(), replace(spec, absorption=None).plan()
        assert sizes["k"] == sizes["v"] == (layers // 2 * (123 + 6 + 1) + 26) * frame
        assert sizes["current"] == 2 * (layers + 1) * 3 * frame
        assert plan.plain == plain and plain.bytes()["k"] == layers * 123 * frame
        assert plan.kv_bytes <= 0.56 * plain.kv_bytes
        per_layer = 2 * width * (width // blocks) + 2 * width + 3
        assert plan.absorption_bytes == 4 * layers * per_layer * 4
        assert (plan.absorption_bytes < 2**30) == (scope == "head")
        warm = plan.held(plan.phases[0])
        assert warm.kv_bytes == 2 * layers * (26 + 3) * frame
        assert plan.total_bytes == sum(sizes.values()) > plan.kv_bytes + sizes["absorption"]
        assert plan.total_bytes >= max(warm.total_bytes, plan.kv_bytes + plan.phases[-1].absorption_bytes)
    assert plan.absorption_bytes > 20 * 2**30
