"""LongLive 2.0's presets against a loop that is written from its published code (slow_longlive2.py), in every one of its modes.

The published pipeline itself was run beside the loop, outside of the repository; docs/systems.md says which.
"""

from __future__ import annotations

import pytest
import torch
from rounded import error, held_as
from slow_longlive2 import LONGLIVE2, LongLive2
from systems_fast import rollout_of
from test_published import assert_equal, words, worst
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import AnchorStatic
from adastate_core.given import BEFORE, INSIDE
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights.presets import PRESETS

# (frame, whether a shot begins) where the words change. Far enough from each other that a pinned chunk stays alone; and close
SHOTS = ((24, True), (40, False), (48, True))
CLOSE = ((8, True), (16, True), (56, True))


def pictures(frames, batch=1):
    return torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(3))


def plan_of(changes, F=8):
    rows = [
        PromptChange(frame, words(2 + i), "shot" if shot else "cut", opening=words(12 + i) if shot else None)
        for i, (frame, shot) in enumerate(changes)
    ]
    return PromptPlan([PromptChange(0, words(1)), *rows], F)


def spoken(changes):
    """The same words to a loop: those of a shot's first chunk are its own."""

    def before_chunk(loop):
        begun = [(0, False), *changes]
        i, (frame, shot) = max((i, one) for i, one in enumerate(begun) if one[0] <= loop.f)
        loop.model.set_context(words(1 + i + 10 * (shot and frame == loop.f)).double())

    return before_chunk


def by_the_loop(name, chunks, *, changes=(), **numbers):
    cuts = tuple(frame for frame, shot in changes if shot)
    return LONGLIVE2[name](TinyModel(), cuts=cuts, before_chunk=spoken(changes), **numbers).roll(chunks)


def started(name, *, changes=(), state=None, F=8, **changed):
    return rollout_of(name, TinyModel(), prompts=plan_of(changes, F), state=state, **({"chunk_frames": F} | changed))


def latents_of(rollout, length, given=None, start=BEFORE):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given, start)], 2)


# what is asked of the rollout, what of the loop, the frames that are given and where
MODES = {
    "one prompt": ({}, {}, None, BEFORE),
    "shots": ({"changes": SHOTS}, {}, None, BEFORE),
    "shots close to each other, relative positions": (
        {"changes": CLOSE, "positions": "packed"}, {"packed": True}, None, BEFORE,
    ),
    "a picture inside": ({}, {}, 1, INSIDE),
    "a picture inside and shots": ({"changes": CLOSE}, {}, 1, INSIDE),
    "relative positions, a picture": ({"positions": "packed"}, {"packed": True}, 1, INSIDE),
    "frames before and shots": ({"changes": SHOTS}, {}, 16, BEFORE),
}  # fmt: skip


def modes_of(mode, batch):
    """Keywords of rollout and loop, and what `chunks` takes beside the length."""
    changed, numbers, frames, start = MODES[mode]
    given = None if frames is None else pictures(frames, batch)
    told = {} if given is None else {"picture" if start == INSIDE else "given": given}
    return (
        changed | {"batch": batch},
        numbers | told | {"changes": changed.get("changes", ()), "batch": batch},
        (given, start),
    )


CASES = [("longlive2_5b", mode) for mode in MODES]
CASES += [("longlive2_5b_2step", mode) for mode in ("shots", "a picture inside and shots")]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_preset_is_its_loop(name, mode, tmp_path):
    """Over as many chunks as its description says, two videos at once; and the same saved to a file and read again in the middle of
    shots and of chunks, where it goes on bit for bit. semantics: A change of the prompt. semantics: Given frames."""
    changed, numbers, given = modes_of(mode, 2)
    theirs = by_the_loop(name, PRESETS[name].compared_chunks, **numbers)
    ours = latents_of(started(name, **changed), theirs.shape[2], *given)
    assert_equal(ours, theirs)
    rollout = started(name, **changed)
    parts = [latents_of(rollout, 32, *given)]
    for length in (53, 64, theirs.shape[2]):
        state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
        rollout = started(name, state=state, **changed)
        parts.append(latents_of(rollout, length))
    assert torch.equal(torch.cat(parts, 2), ours)


# chunk, sink, window, the frames where shots begin
SIZES = [(3, 2, 7, (9, 18, 21)), (2, 4, 3, (6,)), (4, 1, 8, (4, 20))]


@pytest.mark.parametrize(("F", "sink", "window", "cuts"), SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_other_sizes_are_the_loop_with_them(packed, F, sink, window, cuts):
    changes, more = tuple((cut, True) for cut in cuts), dict(F=F, sink=sink, window=window, packed=packed)
    theirs = by_the_loop("longlive2_5b", 10, changes=changes, picture=pictures(1), **more)
    sizes = dict(F=F, anchor=AnchorStatic(sink), window_frames=window, positions="packed" if packed else "absolute")
    assert_equal(latents_of(started("longlive2_5b", changes=changes, **sizes), 10 * F, pictures(1), INSIDE), theirs)


def test_chunks_that_are_made_again_are_those_of_the_loop():
    """Back to before a shot's chunk: the same once more, bit for bit; and under a plan in which it begins none."""
    rollout = started("longlive2_5b", changes=SHOTS)
    latents_of(rollout, 48)
    before = rollout.snapshot()
    after = latents_of(rollout, 72)
    rollout.go_back(before)
    assert torch.equal(latents_of(rollout, 72), after)
    assert_equal(after, by_the_loop("longlive2_5b", 9, changes=SHOTS)[:, :, 48:])
    rollout.go_back(before)
    another = (*SHOTS[:2], (48, False), (56, True))
    rollout.steer(plan_of(another))
    assert_equal(latents_of(rollout, 80), by_the_loop("longlive2_5b", 10, changes=another)[:, :, 48:])


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_8_bits_are_the_loop_that_rounds(cache_dtype):
    """By the bound of test_kv_storage.py: not all items of a batch have to agree, for the reason that is given there."""
    how = dict(chunks=7, changes=SHOTS, batch=4)
    theirs, exact = (by_the_loop("longlive2_5b", **how, **held) for held in (dict(hold=held_as(cache_dtype)), {}))
    ours = latents_of(started("longlive2_5b", changes=SHOTS, batch=4, cache_dtype=cache_dtype), 56)
    errors = sorted(error(one, other) for one, other in zip(ours, theirs, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, theirs) / 2, errors
    assert error(exact, theirs) > 2e-4


def test_an_absorption_is_the_loop_with_its_correction():
    """The layer that is switched reads the sink and the newest chunk, and no pinned one."""
    settings = AbsorptionSettings(warmup_frames=40, local_window_frames=8, sink_frames=1, ratio=0.5, ridge=0.1)
    rollout = started("longlive2_5b", changes=SHOTS, absorption=settings)
    ours = latents_of(rollout, 80)
    solution = rollout.absorber.solution
    fits = {layer: solution.fits[layer].correction for layer in solution.chosen}
    corrected = {layer: (torch.block_diag(*fit.whole().double()), fit.constant.double()) for layer, fit in fits.items()}
    assert len(corrected) == 1
    how = dict(chunks=10, changes=SHOTS, switch=40, local=8)
    assert_equal(ours, by_the_loop("longlive2_5b", **how, corrected=corrected))
    nothing = {layer: (0 * matrix, 0 * constant) for layer, (matrix, constant) in corrected.items()}
    differences = worst(ours, by_the_loop("longlive2_5b", **how, corrected=nothing), 8)
    assert max(differences[:5]) < 1e-4 < 1e-3 < differences[5], differences


SMALL = dict(F=2, sink=2, window=4)
# what is wrong, and the first of 8 chunks of a video with shots at chunk 3 and 6 that shows it
MISTAKES = {
    "nothing is pinned": (dict(pins=False), 6),
    "the old pin ends with the next shot's first chunk": (dict(pins_early=True), 6),
    "shots do not move in time": (dict(offset=0), 3),
    "a solver of the first order": (dict(order=1), 0),
    "fresh noise": (dict(renoised=True), 0),
    "the model is told 1000 sigma": (dict(exact_times=True), 0),
    "the picture is told what the rest is": (dict(picture_told=True), 0),
    "the picture is put in at the end alone": (dict(picture_shown=False), 0),
}


def of_small(**wrong):
    return LongLive2(TinyModel(), cuts=(6, 12), picture=pictures(1), **SMALL, **wrong).roll(8)


@pytest.fixture(scope="module")
def right():
    return of_small()


@pytest.mark.parametrize(("wrong", "first"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_shows(wrong, first, right):
    """What these comparisons would notice, and from which chunk on."""
    differences = worst(of_small(**wrong), right, 2)
    assert max(differences[:first], default=0.0) < 1e-6 and differences[first] > 3e-4, differences
