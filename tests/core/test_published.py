"""The presets against loops that are written from the published code (published_loops.py), frame by frame.

The published code itself was run beside the loops, outside of the repository; docs/systems.md says which.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from published_loops import (
    PUBLISHED,
    CausVid,
    DeepForcingCode,
    InfinityRope,
    KreaRealtime,
    LongLive,
    MemRope,
    Published,
    SelfForcing,
)
from rounded import error, held_as
from systems_fast import latents_of, rollout_of
from test_systems import in_pieces
from tiny_model import TinyModel

from adastate_core.anchors import AnchorDeep, AnchorMemory
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.weights.presets import PRESETS


def by_the_loop(loop, chunks, **numbers):
    return loop(TinyModel(), **numbers).roll(chunks)


def worst(ours, theirs, frames=3):
    """The largest difference of every chunk."""
    assert ours.shape == theirs.shape
    return [float((a - b).abs().max()) for a, b in zip(ours.split(frames, 2), theirs.split(frames, 2), strict=True)]


MISTAKES = [
    ("a past that is not forgotten", KreaRealtime, 4, dict(looks_back=True), 2),
    ("a past without its newest frame", KreaRealtime, 3, dict(stale=1), 1),
    ("a past that begins with the first frame", KreaRealtime, 4, dict(keep_first_frame=True), 2),
    ("a block without its last pass", KreaRealtime, 2, dict(levels=Published.levels), 0),
    ("a memory that begins one chunk early", MemRope, 5, dict(begins_early=True), 3),
    ("a memory of another rate", MemRope, 7, dict(rates=(0.01, 0.2)), 5),
    ("a sink one frame short", MemRope, 5, dict(sink=2, recent=5), 4),
    ("a sink one frame off", DeepForcingCode, 9, dict(sink_off=1), 7),
    ("a sink that stays", DeepForcingCode, 9, dict(shifts=False), 7),
    ("tokens chosen without end", DeepForcingCode, 12, dict(most=1), 9),
    ("levels that are not the table's", CausVid, 2, dict(levels=[(t / 1000, t) for t in (1000.0, 757.0, 522.0)]), 0),
]


@pytest.mark.parametrize(("loop", "chunks", "wrong", "first"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_shows(loop, chunks, wrong, first):
    """What these comparisons would notice, and from which chunk on."""
    differences = worst(by_the_loop(loop, chunks, **wrong), by_the_loop(loop, chunks))
    assert max(differences[:first], default=0.0) < 1e-6 and max(differences[first : first + 2]) > 1e-3, differences


def test_a_loop_of_two_videos_is_that_of_each():
    """Items of a batch do not mix."""
    both = by_the_loop(DeepForcingCode, 8, batch=2)
    assert not torch.equal(both[0], both[1])
    assert by_the_loop(LongLive, 4, batch=2).shape == (2, 4, 12, 4, 6)


def assert_equal(ours, theirs):
    """To 1e-4 in every chunk."""
    assert max(differences := worst(ours, theirs)) < 1e-4, differences


@pytest.mark.parametrize("seed", [7, 11])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_its_published_loop(name, seed, tmp_path):
    """Over as many chunks as its description says. One seed alone and in pieces, saved to a file and read again at every chunk; the
    other with two videos at once. semantics: Anchors."""
    loop, batch = PUBLISHED[name], 1 if seed == 7 else 2
    chunks, frames = PRESETS[name].compared_chunks, PUBLISHED[name].F
    theirs = by_the_loop(loop, chunks, seed=seed, batch=batch)

    def make(state=None):
        return rollout_of(name, TinyModel(), seed=seed, batch=batch, state=state)

    assert_equal(latents_of(make(), chunks * frames), theirs)
    if batch == 1:
        assert_equal(in_pieces(make, range(frames, chunks * frames + 1, frames), tmp_path), theirs)


def test_a_preset_says_that_it_is_compared_where_it_is():
    assert {name for name, preset in PRESETS.items() if preset.compared_chunks} >= set(PUBLISHED)
    for preset in PRESETS.values():
        said = f"over {preset.compared_chunks} chunks" in preset.describe()
        assert said == bool(preset.compared_chunks), preset.name


def words(number):
    return torch.randn(1, 5, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float32)


def with_new_words(name, loop, frames, transition, change, chunks=9, batch=1, wrong=None, **changed):
    """Latents of the preset and of the loop whose words change at each of `frames`; `wrong` are a loop's mistakes."""
    model = TinyModel()
    model.set_context(words(1))

    def before_chunk(one):
        if one.f in frames:
            one.model.set_context(words(2 + frames.index(one.f)).double())
            change(one)

    theirs = loop(model, before_chunk=before_chunk, batch=batch, **(wrong or {})).roll(chunks)
    return latents_of(rollout_with(name, loop, frames, transition, batch=batch, **changed), chunks * loop.F), theirs


def rollout_with(name, loop, frames, transition, **changed):
    later = [PromptChange(frame, words(2 + i), transition) for i, frame in enumerate(frames)]
    return rollout_of(name, TinyModel(), prompts=PromptPlan([PromptChange(0, words(1)), *later], loop.F), **changed)


CHANGES = [
    ("longlive", LongLive, "cut", lambda loop: None),
    ("self_forcing", SelfForcing, "cut", lambda loop: None),
    ("memrope", MemRope, "cut", lambda loop: None),
    ("infinity_rope", InfinityRope, "flush", lambda loop: None),  # it holds no more than a flush leaves
    ("infinity_rope", InfinityRope, "rope cut", lambda loop: setattr(loop, "cuts", (loop.f,))),
]


@pytest.mark.parametrize(("name", "loop", "transition", "change"), CHANGES, ids=[f"{c[0]} {c[2]}" for c in CHANGES])
def test_words_that_change(name, loop, transition, change):
    """semantics: A change of the prompt."""
    assert_equal(*with_new_words(name, loop, (12,), transition, change))


# frames at which the words change: while the sink is among those that are made again, afterwards, one chunk after another, both
RECACHED = [(3,), (9,), (12,), (15,), (24,), (6, 9), (12, 15, 18), (9, 21)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", RECACHED, ids=str)
def test_longlives_recache_is_its_one_pass(frames, batch, tmp_path):
    """Alone also in pieces, saved to a file and read again at every chunk. semantics: A change of the prompt."""
    ours, theirs = with_new_words("longlive", LongLive, frames, "recache", LongLive.recache, batch=batch)
    assert max(differences := worst(ours, theirs)) < 5e-6, differences
    if batch == 1:
        pieces = in_pieces(
            lambda state: rollout_with("longlive", LongLive, frames, "recache", state=state), range(3, 28, 3), tmp_path
        )
        assert torch.equal(pieces, ours)


WRONG_RECACHES = [
    ("a sink that stays", 12, dict(keeps_sink=True), {}),
    ("a chunk too few", 15, dict(again=9), {}),
    ("a frame too many", 18, dict(again=13), {}),
    ("chunk after chunk", 12, {}, dict(one_pass_recache=False)),
    ("chunk after chunk, the sink gone by", 15, {}, dict(one_pass_recache=False)),
]


@pytest.mark.parametrize(
    ("frame", "wrong", "changed"), [m[1:] for m in WRONG_RECACHES], ids=[m[0] for m in WRONG_RECACHES]
)
def test_a_recache_with_a_mistake_shows(frame, wrong, changed):
    differences = worst(
        *with_new_words("longlive", LongLive, (frame,), "recache", LongLive.recache, wrong=wrong, **changed)
    )
    assert max(differences[: frame // 3]) < 5e-6 and differences[frame // 3] > 1e-3, differences


def test_the_page_of_systems_has_the_same_numbers():
    page = (Path(__file__).resolve().parents[2] / "docs" / "systems.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][2:]
    told = {
        name: int(chunks)
        for names, chunks in table
        for name in re.findall(r"[a-z_0-9]+", names.replace(" _", ""))
        if name in PRESETS and name != "deep_forcing"
    }
    assert told and all(PRESETS[name].compared_chunks == chunks for name, chunks in told.items()), told


# other numbers: a preset, its loop, how many chunks, what is changed of the preset, and of the loop
OTHERS = {
    "deep forcing, the authors' code": (
        "deep_forcing", DeepForcingCode, 14, dict(anchor=AnchorDeep(shift_selected=False)), {},
    ),
    "deep forcing, other sizes": (
        "deep_forcing", DeepForcingCode, 14, dict(window_frames=4, anchor=AnchorDeep(3, 4, 9, False, most_choices=2)),
        dict(sink=3, budget=9, room=10, most=2),
    ),
    "memrope, other sizes": (
        "memrope", MemRope, 9,
        dict(window_frames=5, anchor=AnchorMemory(2, 0.2, 0.5)), dict(sink=2, recent=5, rates=(0.2, 0.5)),
    ),
    "memrope, frame by frame": ("memrope", MemRope, 14, dict(chunk_frames=1), dict(F=1)),
    "memrope, nothing but memories": ("memrope", MemRope, 8, dict(window_frames=0), dict(recent=0)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "loop", "chunks", "changed", "numbers"), OTHERS.values(), ids=OTHERS)
def test_other_numbers_are_the_loop_with_them(name, loop, chunks, changed, numbers, tmp_path):
    """Two videos at once, and one in pieces."""
    whole = by_the_loop(loop, chunks, batch=2, **numbers)
    assert_equal(latents_of(rollout_of(name, TinyModel(), batch=2, **changed), whole.shape[2]), whole)
    alone, frames = by_the_loop(loop, chunks, **numbers), whole.shape[2] // chunks
    lengths = range(frames, whole.shape[2] + 1, frames)
    assert_equal(
        in_pieces(lambda state: rollout_of(name, TinyModel(), state=state, **changed), lengths, tmp_path), alone
    )


@pytest.mark.parametrize("frame", [9, 15])
@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_longlives_recache_in_8_bits_is_the_loop_that_rounds(cache_dtype, frame):
    """By the bound of test_kv_storage.py, as below."""

    def made(**wrong):
        how = dict(chunks=7, batch=4, wrong=wrong, cache_dtype=cache_dtype)
        return with_new_words("longlive", LongLive, (frame,), "recache", LongLive.recache, **how)

    (ours, theirs), (_, exact) = made(hold=held_as(cache_dtype)), made()
    errors = sorted(error(one, other) for one, other in zip(ours, theirs, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, theirs) / 2, errors
    assert error(exact, theirs) > 2e-4


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_memrope_in_8_bits_is_the_loop_that_rounds(cache_dtype):
    """By the bound of test_kv_storage.py: not all items of a batch have to agree, for the reason that is given there."""
    theirs = by_the_loop(MemRope, 9, batch=4, hold=held_as(cache_dtype))
    exact = by_the_loop(MemRope, 9, batch=4)
    ours = latents_of(rollout_of("memrope", TinyModel(), batch=4, cache_dtype=cache_dtype), 27)
    errors = sorted(error(one, other) for one, other in zip(ours, theirs, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, theirs) / 2, errors
    assert error(exact, theirs) > 2e-4
