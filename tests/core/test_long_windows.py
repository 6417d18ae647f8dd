"""A window of any length is turned in blocks: the bits of one turn, the memory of one block, and tables that are found again."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes

from adastate_core.absorption.host_history import HostHistory
from adastate_core.anchors import AnchorAdaptive, AnchorDeep
from adastate_core.cache.byte_plan import CachePlan
from adastate_core.cache.host_copies import HostCopies
from adastate_core.cache.kv_cache import KVCache
from adastate_core.cache.slots import Slot, blocks
from adastate_core.cache.specs import layer_spec, stored
from adastate_core.rope import Layout, Rope, space_bytes

HEADS, HEAD_DIM, ROWS, COLUMNS, F = 2, 12, 4, 6, 3
TOKENS, WIDTH = ROWS * COLUMNS, HEADS * HEAD_DIM


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(window: int, cache_dtype: str = "model", layers: int = 2) -> KVCache:
    """A cache whose window is full, and whose ring begins in the middle."""
    spec = layer_spec(AnchorAdaptive(1), window, F, "packed")
    kind = stored(spec) if cache_dtype != "model" else spec
    plan = CachePlan(1, TOKENS, WIDTH, 1, F, torch.float32, (kind,) * layers, heads=HEADS, cache_dtype=cache_dtype)
    cache = KVCache(plan, HEADS)
    for number, layer in enumerate(cache):
        keys, values = (draw(window, 1, TOKENS, WIDTH, seed=2 * number + i) for i in range(2))
        for age in range(window):
            ring = (age + 3) % window
            layer.enter(ring, keys[ring], values[ring])
            layer.window[ring] = Slot(age)
    return cache


def layout_of(window: int, first: int | None = None) -> Layout:
    return Layout("packed", 1, window, 1, 0, window, window if first is None else first)


def rope_of(cache: KVCache, real: bool | None = None) -> Rope:
    rope = Rope(HEAD_DIM, ROWS, COLUMNS, real_pairs=real)
    rope.most_bytes = rope.bytes_of(cache.plan.table_frames)
    return rope


def place(cache: KVCache, rope: Rope, layout: Layout) -> None:
    for step in cache.turns(layout, rope):
        step.write()


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("window", [6, 24, 25])
def test_blocks_give_the_bits_of_a_single_turn(window, real):
    cache, layout = filled(window), layout_of(window)
    rope = rope_of(cache, real)
    place(cache, rope, layout)
    for layer in cache:
        rings = range(window)
        to = [layout.window(layer.window[ring].frame) for ring in rings]
        raw = layer.raw.flatten(1, 2).unflatten(-1, (HEADS, -1))
        whole = rope.rotate(raw, Rope(HEAD_DIM, ROWS, COLUMNS, real_pairs=real).turn(None, to))
        assert torch.equal(layer.k[:, layer.window_start :], whole.reshape(layer.raw.shape))


def peak_of(what) -> int:
    with LiveBytes() as live:
        what()
        return live.peak["cpu"]


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_what_a_window_takes_to_be_turned_does_not_grow_with_it(cache_dtype):
    taken = []
    for window in (6, 24, 96):
        cache = filled(window, cache_dtype)
        rope = rope_of(cache)

        def turned(cache=cache, rope=rope, window=window):
            place(cache, rope, layout_of(window))
            cache.begin()
            for layer in range(2):
                cache.open(layer)

        turned()  # now the tables are there
        for layer in cache:
            for slot in layer.window.values():
                slot.position = None
        taken.append(peak_of(turned))
    frame = TOKENS * WIDTH * 4
    assert taken[0] == taken[1] == taken[2] <= 4.5 * F * frame, [one / frame for one in taken]


def test_what_a_history_takes_to_be_read_is_what_it_gives_and_one_block():
    taken = []
    for frames in (6, 48):
        history, rope = HostHistory(frames, HostCopies(torch.device("cpu"), 0)), Rope(HEAD_DIM, ROWS, COLUMNS)
        for i in range(frames):
            key, value = draw(2, 1, TOKENS, WIDTH, seed=i)
            history.push(i, None if i % 2 else i - 1.0, key, value)()
        whole = rope.turn(
            [kept.position for kept in history.mark()], [layout_of(frames).window(i) for i in range(frames)]
        )
        keys, values = history.read(layout_of(frames), rope, HEADS, torch.device("cpu"), F)
        raw = torch.cat([kept.key for kept in history.mark()], 1)
        torch.testing.assert_close(keys, rope.rotate(raw.unflatten(-1, (HEADS, -1)), whole).flatten(2))
        assert torch.equal(values, torch.cat([kept.value for kept in history.mark()], 1))
        out = peak_of(lambda: history.read(layout_of(frames), rope, HEADS, torch.device("cpu"), F))  # noqa: B023
        taken.append(out - keys.nbytes - values.nbytes)
    assert taken[0] == taken[1]


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("window", [3, 6, 18])
def test_every_chunk_finds_its_tables_within_their_bound(window, cache_dtype, monkeypatch):
    """From the second turn of the ring on nothing is made any more, in a window that slides by a chunk."""
    cache, made = filled(window, cache_dtype), []
    rope = rope_of(cache)
    make = Rope._from_raw
    monkeypatch.setattr(Rope, "_from_raw", lambda self, to: made.append(to) or make(self, to))
    for chunk in range(2 * window // F + 2):
        if chunk == window // F + 1:
            made.clear()
        place(cache, rope, layout_of(window, window + F * chunk))
        rope.turn(None, layout_of(window).current(F))
        cache.begin()
        for index in range(2):
            cache.open(index)
        for layer in cache:
            for _ in range(F):
                ring, oldest = layer.window.popitem(last=False)
                layer.window[ring] = Slot(oldest.frame + window)
    assert not made
    assert rope.nbytes <= cache.plan.rope_bytes(real_pairs=False)


def test_blocks_begin_where_time_does():
    assert blocks([4, 5, 6, 7, 8, 9], [5, 6, 7, 1, 2, 3], 2) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
    assert blocks([3, 4], [2, 1], 3) == [slice(0, 2)] and blocks([], [], 3) == []
    assert space_bytes(12, 6, True) == 2 * space_bytes(12, 6, False) == 6 * 8 * 8


def test_chosen_tokens_are_turned_in_blocks(monkeypatch):
    """Deep Forcing's: never more tokens at once than a block has."""
    from systems_fast import latents_of, rollout_of
    from tiny_model import TinyModel

    sizes, real = [], Rope.turn_tokens
    monkeypatch.setattr(Rope, "turn_tokens", lambda *given: sizes.append(given[3].shape[-1]) or real(*given))
    changed = dict(anchor=AnchorDeep(2, 4, 20, shift_selected=False), window_frames=18)
    rollout = rollout_of("deep_forcing", TinyModel(), **changed)
    latents_of(rollout, 30)
    most = rollout.cache.plan.block_frames * rollout.cache.plan.tokens
    assert max(sizes) == most and rollout.cache.layers[0].picked.shape[1] > most
