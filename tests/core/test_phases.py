"""A cache lives in phases: what is allocated is what the plan says, at every moment, and the bits are those of whole windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_cuda import fake_cuda
from faults.injector import INJECTED, InjectedMemory, at, watching
from faults.trial import difference, flat
from live_bytes import LiveBytes
from no_double_device import model_on
from test_rollout import SCHEDULE, spec_for
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import (
    Anchor,
    AnchorAdaptive,
    AnchorDeep,
    AnchorEMA,
    AnchorMemory,
    AnchorReplay,
    AnchorStatic,
)
from adastate_core.cache.byte_plan import HOST, KV_NAMES, CachePlan
from adastate_core.cache.kv_cache import KVCache
from adastate_core.cache.workspace import Store
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state

ONE_STEP = Schedule((1.0,))
STORES = [("model", "gpu"), ("int8", "gpu"), ("model", "host memory"), ("fp8", "host memory")]
ANCHORS = [Anchor(), AnchorStatic(2), AnchorEMA(2, 0.6), AnchorMemory(1), AnchorReplay(6), AnchorAdaptive(1)]
named = pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: a.kind)
placed = pytest.mark.parametrize("place", STORES, ids=" ".join)


def spec_of(model, anchor=Anchor(), place=STORES[0], window=12, **settings):  # noqa: B008
    spec = spec_for(model, anchor=anchor, W=window, cache_dtype=place[0], cache_device=place[1])
    warm = dict(warmup_frames=9, local_window_frames=2, sink_frames=1, ridge=0.3) | settings
    return replace(spec, absorption=AbsorptionSettings(**warm))


def rollout_of(spec, model=None, schedule=ONE_STEP, **how):
    return Rollout(model or TinyModel(spec.geometry.layers), spec, Settings(7, schedule), **how)


def latents_of(rollout, length, given=None):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given)], 2)


def held(cache: KVCache) -> int:
    """Bytes of the cache wherever they lie."""
    return sum(cache.bytes().values())


def buffers(cache: KVCache) -> Iterator[torch.Tensor]:
    """Every tensor that a cache holds."""
    holders: list[Any] = [*cache.layers]
    if cache.workspace is not None:
        holders += [cache.workspace, *(landing for landing in cache.workspace.landings)]
    holders += [value for one in holders for value in vars(one).values() if isinstance(value, Store)]
    for holder in holders:
        yield from (value for value in vars(holder).values() if isinstance(value, torch.Tensor))


def cache_bytes(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name in KV_NAMES or name.startswith(HOST))


@placed
@named
def test_the_switch_takes_what_the_plan_says_at_every_moment(anchor, place, monkeypatch):
    """semantics: Memory."""
    spec = spec_of(TinyModel(layers=4), anchor, place)
    rollout, counted = rollout_of(spec), []
    fit = KVCache.fit

    def measured(cache):
        live = LiveBytes()
        live.watch(buffers(cache))
        before = live.now["cpu"]
        with live:
            fit(cache)
        counted.append((before, live.peak["cpu"], live.now["cpu"]))

    monkeypatch.setattr(KVCache, "fit", measured)
    latents_of(rollout, 24)
    plan: CachePlan = rollout.cache.plan
    moments = [cache_bytes(sizes) for sizes in plan.moments()]
    warm, passing, end = moments[0], moments[1:-1], moments[-1]
    assert len(passing) == 4 and max(passing) < max(warm, end) + max(warm, end) / 4
    changed = [entry for entry in counted if len(set(entry)) > 1]
    assert changed == [(warm, max(warm, *passing, end), end)]
    assert held(rollout.cache) == end and end < cache_bytes(plan.plain.bytes())
    assert rollout.cache.peak_nbytes == plan.kv_bytes == spec.plan().kv_bytes
    assert rollout.cache.peak_host_nbytes == plan.host_bytes


@pytest.mark.parametrize(("place", "share"), [(STORES[0], 0.62), (STORES[1], 0.73)], ids=str)
def test_half_absorbed_at_window_120_takes_three_fifths_of_the_plain_cache(place, share):
    """Planned and counted. In 8 bits the scratch in float32, which all 6 layers share, is as large as 4 layers."""
    model = TinyModel(layers=6)
    spec = spec_of(model, place=place, window=120, warmup_frames=24, local_window_frames=3)
    plain = replace(spec, absorption=None)
    peaks = {}
    for name, one in (("absorbed", spec), ("plain", plain)):
        rollout, live = rollout_of(one, model), LiveBytes()
        most = 0
        for _ in rollout.chunks(30):
            live.watch(buffers(rollout.cache))
            most = max(most, live.now["cpu"])
        del live
        assert max(most, rollout.cache.peak_nbytes) == one.plan().kv_bytes, name
        peaks[name] = rollout.cache.peak_nbytes
    assert peaks["absorbed"] <= share * peaks["plain"]
    assert spec.plan().plain.kv_bytes == peaks["plain"]
    report = rollout_of(spec, model).absorber.report()
    assert report["kv_bytes_before"] == peaks["plain"]


@pytest.mark.parametrize(
    ("place", "layers"), [(STORES[0], 10), (STORES[0], 30), (STORES[1], 10)], ids=["model", "model, all layers", "int8"]
)
@pytest.mark.sampled(3)
def test_the_1_3b_at_window_120_without_a_gpu(place, layers):
    """Counted on fake CUDA tensors at 832x480 in bfloat16, chunk after chunk and in the switch: plan and peak are equal."""
    with fake_cuda() as (device, _):
        model = model_on(device, TinyModel(layers=layers, heads=12, head_dim=128))
        absorption = AbsorptionSettings(warmup_frames=24, local_window_frames=3, ridge=0.3)
        spec = RolloutSpec(
            model.geometry, 1, 60, 104, 3, 120, Anchor(), "packed", torch.bfloat16, absorption=absorption,
            cache_dtype=place[0], cache_device=place[1],
        )  # fmt: skip
        rollout, peak, warm = rollout_of(spec, model), 0, []
        fit = KVCache.fit

        def counting(cache):
            nonlocal peak
            live = LiveBytes()
            live.watch(buffers(cache))
            with live:
                fit(cache)
            peak = max(peak, live.peak["cuda"])
            warm.append(live.now["cuda"])

        with mock.patch.object(KVCache, "fit", counting):
            assert latents_of(rollout, 27, torch.zeros(1, 4, 24, 60, 104)).shape[2] == 27
    plan, plain = spec.plan(), replace(spec, absorption=None).plan()
    assert peak == plan.kv_bytes <= 0.62 * plain.kv_bytes
    assert warm[0] < warm[-1] <= peak and rollout.absorber.phase == "switched"


def states_until(spec, model, frames, **how):
    rollout = rollout_of(spec, model, **how)
    for _ in rollout.chunks(frames):
        pass
    return rollout.snapshot()


@placed
def test_a_resumed_run_allocates_only_what_its_phase_needs(place):
    model = TinyModel(layers=4)
    spec = spec_of(model, place=place)
    moments = [cache_bytes(sizes) for sizes in spec.plan().moments()]
    for frames, size in ((6, moments[0]), (12, moments[-1])):
        state = states_until(spec, model, frames)
        live = LiveBytes()
        with live:
            rollout = rollout_of(spec, model, state=state)
        assert held(rollout.cache) == size
        assert (
            live.peak["cpu"] < 2 * size
        )  # a snapshot's frames are on the device once more while they are copied there
        plan = spec.plan(resumed=state)
        assert (plan.kv_bytes, plan.host_bytes) == (max(plan.kv_bytes, rollout.cache.nbytes), plan.host_bytes)
        if frames == 12:
            assert (rollout.cache.peak_nbytes, rollout.cache.peak_host_nbytes) == (plan.kv_bytes, plan.host_bytes)


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.0}, {"warmup_frames": 2}, {"local_window_frames": 12}, {"local_window_frames": 6}],
    ids=["no layer", "short warm-up", "wide local window", "too close to say"],
)
def test_where_nothing_is_absorbed_every_layer_has_its_whole_window(settings):
    spec = spec_of(TinyModel(), **settings)
    rollout, plan = rollout_of(spec), spec.plan()
    plain = rollout_of(replace(spec, absorption=None))
    assert torch.equal(latents_of(rollout, 18), latents_of(plain, 18))
    assert rollout.absorber.phase == "nothing to absorb"
    assert rollout.cache.nbytes == plain.cache.nbytes == plan.plain.kv_bytes
    assert rollout.cache.peak_nbytes == plan.kv_bytes <= plan.plain.kv_bytes * 1.5
    resumed = rollout_of(spec, state=rollout.snapshot())
    assert resumed.cache.nbytes == resumed.cache.peak_nbytes == plain.cache.nbytes


@named
def test_a_solved_correction_starts_small_and_knows_its_layers(anchor):
    model = TinyModel(layers=4)
    spec = spec_of(model, anchor)
    rollout = rollout_of(spec, model)
    latents_of(rollout, 12)
    solution = rollout.absorber.solution
    plan, again = spec.plan(solution=solution), rollout_of(spec, model, solution=solution)
    assert plan.phases[-1].layers == rollout.cache.phase.layers
    assert plan.absorption_bytes < spec.plan().absorption_bytes
    latents_of(again, 21)
    assert again.cache.peak_nbytes == plan.kv_bytes and again.cache.phase.layers == plan.phases[-1].layers


@pytest.mark.parametrize(
    ("anchor", "place", "window"),
    [
        (Anchor(), STORES[0], 12), (AnchorReplay(6), STORES[0], 12), (AnchorEMA(2, 0.6), STORES[0], 5),
        (AnchorAdaptive(1), STORES[1], 12), (AnchorEMA(2, 0.6), STORES[2], 12), (AnchorStatic(2), STORES[3], 12),
    ],
    ids=lambda value: value.kind if isinstance(value, Anchor) else str(value),
)  # fmt: skip
def test_a_failure_at_any_moment_of_the_switch_loses_nothing(anchor, place, window, tmp_path):
    """Every operation of shrinking and growing fails once; the run itself and one from its state go on to the same bits."""
    model = TinyModel(layers=2)
    spec = spec_of(model, anchor, place, window, monitor_layers=-1, monitor_chunks=2)
    before = states_until(spec, model, 6)
    whole = rollout_of(spec, model, state=before)
    expected = latents_of(whole, 12)
    end = flat(whole.snapshot())

    def switching(injector=None):
        """A run that fails in the switch, and the operations of it."""
        rollout, latents, seen = rollout_of(spec, model, state=before), [], []
        fit = rollout.cache.fit

        def failing():
            if rollout.absorber.phase == "switched" and not seen:
                with injector or watching() as mode:
                    seen.append(mode)
                    fit()
            else:
                fit()

        rollout.cache.fit = failing
        try:
            for chunk in rollout.chunks(9):
                latents.append(chunk.latents)
        except INJECTED:
            pass
        return rollout, latents, seen[0]

    operations = switching()[2].operations
    places = [
        n for n, one in enumerate(operations) if one.writes is not None or "zeros" in one.name or "empty" in one.name
    ]
    assert len(places) > 8
    taken = set()
    for n, late in [(n, False) for n in places] + [(n, True) for n in places[::3]]:
        rollout, latents, injector = switching(at(n, InjectedMemory, late=late))
        assert injector.failed is not None
        specs = {(layer.layer, layer.room) for layer in rollout.cache.layers}
        assert len(specs) <= 3 and rollout.absorber.phase == "switched"
        state = rollout.snapshot()
        kept = tuple(sorted(flat(state).items(), key=str))
        if kept not in taken:
            taken.add(kept)
            loaded = load_state(save_state(state, tmp_path / f"{len(taken)}.safetensors"))
            resumed = rollout_of(spec, model, state=loaded)
            rest = latents_of(resumed, 12)
            assert torch.equal(torch.cat([*latents, rest], 2), expected)
            assert not difference(flat(resumed.snapshot()), end)
        rest = latents_of(rollout, 12)
        assert torch.equal(torch.cat([*latents, rest], 2), expected)
        assert not difference(flat(rollout.snapshot()), end)
    assert len(taken) == 1, "whatever failed, the state is the same"


def test_a_switch_that_fails_in_the_making_of_what_is_aside_is_not_there():
    model = TinyModel(layers=2)
    spec = spec_of(model, monitor_layers=-1)
    rollout = rollout_of(spec, model)
    list(rollout.chunks(6))
    on_device = rollout.absorber._on_device

    def fails(correction):
        rollout.absorber._on_device = on_device
        raise InjectedMemory("no room")

    rollout.absorber._on_device = fails
    with pytest.raises(InjectedMemory):
        list(rollout.chunks(12))
    assert rollout.absorber.phase == "warming" and rollout.snapshot().absorption["phase"] == "warming"
    expected = latents_of(rollout_of(spec, model), 18)
    assert torch.equal(latents_of(rollout_of(spec, model, state=rollout.snapshot()), 18), expected[:, :, 6:])
    assert torch.equal(latents_of(rollout, 18), expected[:, :, 6:])


DEEP = AnchorDeep(2, 4, 8)
SHORT = [(anchor, STORES[i % 4]) for i, anchor in enumerate(ANCHORS)] + [(DEEP, STORES[0]), (Anchor(), STORES[1])]


@pytest.mark.parametrize("absorbed", [False, True], ids=["plain", "absorbed"])
@pytest.mark.parametrize(("anchor", "place"), SHORT, ids=lambda v: v.kind if isinstance(v, Anchor) else " ".join(v))
def test_a_window_longer_than_the_video_is_not_allocated(anchor, place, absorbed):
    """semantics: Memory. The bits are those of the whole window; `chunks` for more makes room first."""
    if absorbed and anchor is DEEP:
        pytest.skip("refused")
    model = TinyModel()
    spec = spec_for(model, anchor=anchor, W=100, cache_dtype=place[0], cache_device=place[1])
    spec = spec_of(model, anchor, place, window=100) if absorbed else spec
    given = torch.randn(1, 4, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = latents_of(rollout_of(spec, model), 26, given)
    rollout = rollout_of(spec, model, length=13)
    assert torch.equal(latents_of(rollout, 13, given), expected[:, :, :13])
    plan = spec.plan(length=13)
    assert held(rollout.cache) <= cache_bytes(plan.bytes()) < 0.4 * cache_bytes(spec.plan().bytes())
    assert (rollout.cache.peak_nbytes, rollout.cache.peak_host_nbytes) == (plan.kv_bytes, plan.host_bytes)
    for state in (None, rollout.snapshot()):
        longer = rollout if state is None else rollout_of(spec, model, length=26, state=state)
        if state is not None:
            assert torch.equal(latents_of(longer, 26), expected[:, :, 13:])
        else:
            short = rollout_of(spec, model, length=13)
            first = latents_of(short, 13, given)
            assert torch.equal(torch.cat([first, latents_of(short, 26)], 2), expected)
            assert not difference(
                flat(short.snapshot()), flat(states_of(spec, model, given)), ".tensors.keys" if anchor is DEEP else None
            )
            assert held(short.cache) == cache_bytes(list(spec.plan(length=26).moments())[-1])


def states_of(spec, model, given):
    rollout = rollout_of(spec, model)
    latents_of(rollout, 26, given)
    return rollout.snapshot()


@pytest.mark.parametrize("transition", ["recache", "flush", "rope cut"])
@pytest.mark.parametrize("more", [{}, {"restart_frames": 9, "overlap_frames": 4}], ids=["", "restarts"])
def test_transitions_and_restarts_never_hold_more_than_was_made(transition, more):
    text = [torch.randn(1, 3, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def run(length):
        spec = replace(spec_for(TinyModel(), W=100), **more)
        prompts = PromptPlan([PromptChange(0, text[0]), PromptChange(10, text[1], transition)], 3)
        return latents_of(rollout_of(spec, TinyModel(), length=length, prompts=prompts), 20)

    assert torch.equal(run(20), run(None))


def test_chunks_denoised_together_hold_only_what_was_finished():
    spec = spec_for(TinyModel(), W=100, blocks=4)
    runs = [latents_of(rollout_of(spec, schedule=SCHEDULE.shifted(4, 5.0), length=length), 20) for length in (20, None)]
    assert torch.equal(*runs)


def test_a_failed_growth_is_made_up_for_before_the_next_chunk():
    model = TinyModel()
    spec = spec_for(model, W=30)
    expected = latents_of(rollout_of(spec, model), 18)
    rollout = rollout_of(spec, model, length=6)
    first = latents_of(rollout, 6)
    trial = rollout_of(spec, model, length=6, state=rollout.snapshot())
    trial.past.reach(18)
    with watching() as watched:
        trial.past.catch_up(None)
    with pytest.raises(InjectedMemory), at(len(watched.operations) * 3 // 4, InjectedMemory):
        rollout.past.reach(18)
        rollout.past.catch_up(None)
    assert len({layer.room for layer in rollout.cache}) == 2
    assert torch.equal(latents_of(rollout, 18), expected[:, :, 6:]) and first.shape[2] == 6


def test_a_state_of_another_rollout_is_not_looked_at():
    model = TinyModel()
    spec = spec_of(model)
    state = states_until(spec, model, 12)
    other = spec_of(model, window=20)
    assert other.plan(resumed=state) == other.plan()
    damaged = replace(state, absorption=state.absorption | {"solution.chosen": [7]})
    assert spec.plan(resumed=damaged).phases[-1] == spec.plan().phases[-1]
    with pytest.raises(ValueError, match="absorption is damaged"):
        rollout_of(spec, model, state=damaged)
    with pytest.raises(ValueError, match="another rollout"):
        rollout_of(other, model, state=state)


@pytest.mark.parametrize("window", [12, 40, 120, 10_000])
@pytest.mark.parametrize("length", [None, 20, 60])
def test_the_plan_of_a_smaller_window_is_the_plan_that_is_asked_for_with_it(window, length):
    model = TinyModel(layers=4)
    for absorption in (None, AbsorptionSettings(warmup_frames=9, local_window_frames=2)):
        spec = replace(spec_for(model, W=window), absorption=absorption)
        for smaller in (4, 9, 11, 39):
            cut, asked = (
                spec.plan(length=length).with_window(smaller),
                replace(spec, window_frames=min(smaller, window)),
            )
            assert cut.total_bytes >= asked.plan(length=length).total_bytes, smaller
            if absorption is None or smaller > 4:
                assert cut.total_bytes == asked.plan(length=length).total_bytes, smaller
