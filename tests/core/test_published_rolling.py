"""The preset rolling_forcing is Rolling Forcing's own inference, end included: against whole histories in float64."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from faults.injector import INJECTED, InjectedMemory, at
from published_rolling import MISTAKES, PublishedRolling
from rounded import error, held_as
from systems_fast import latents_of, rollout_of, spec_of
from tiny_model import TinyModel

from adastate_core.anchors import AnchorEMA
from adastate_core.cache.byte_plan import HELD
from adastate_core.rollout import ModelGeometry, UnfinishedError
from adastate_core.states.state_file import load_state, save_state

BLOCKS = 13  # past the 21 frames that a pass has room for, the last four in a window that shrinks
END = "as published"


@cache
def published(seed=7, batch=1, blocks=BLOCKS):
    return PublishedRolling(TinyModel(), seed=seed, batch=batch).roll(blocks)


def rolling(state=None, ending=END, **changed):
    return rollout_of("rolling_forcing", TinyModel(), state=state, ending=ending, **changed)


def by_block(ours, theirs):
    """The largest difference in every block of 3 frames."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs).abs().unflatten(2, (-1, 3)).amax((0, 1, 3, 4, 5)).tolist()


def from_file(state, folder):
    return load_state(save_state(state, folder / "state.safetensors"))


@pytest.mark.parametrize("mistaken", MISTAKES)
def test_a_mistake_in_one_rule_shows(mistaken):
    assert max(by_block(mistaken(TinyModel()).roll(BLOCKS), published())) > 1e-3


@pytest.mark.parametrize("cache_device", ["gpu", "host memory"])
@pytest.mark.parametrize(("seed", "batch"), [(7, 1), (11, 2)])
def test_the_preset_is_the_published_loop(seed, batch, cache_device):
    """semantics: Chunks denoised together."""
    ours = latents_of(rolling(seed=seed, batch=batch, cache_device=cache_device), 3 * BLOCKS)
    assert max(by_block(ours, published(seed, batch))) < 1e-4


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 6, 9])
def test_short_videos_end_alike(blocks):
    """Fewer blocks than the window has too, which the published loop never finishes: it grows, then shrinks."""
    model = TinyModel()
    rollout = rollout_of("rolling_forcing", model, ending=END)
    passes = rollout.passes(3 * blocks)
    ours = latents_of(rollout, 3 * blocks)
    assert model.calls == passes == blocks + 4 + blocks
    assert max(by_block(ours, published(blocks=blocks))) < 1e-4


@pytest.mark.parametrize("length", [37, 38])
def test_a_last_chunk_of_which_less_is_wanted_is_made_whole(length):
    assert torch.equal(latents_of(rolling(), length), latents_of(rolling(), 39)[:, :, :length])


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_in_8_bits_it_is_the_loop_that_rounds(cache_dtype):
    """The bound of test_kv_storage: one item at least is equal, none is off by half of what rounding does."""
    ours = latents_of(rolling(batch=4, cache_dtype=cache_dtype), 3 * BLOCKS)
    rounded = PublishedRolling(TinyModel(), batch=4, hold=lambda x: held_as(cache_dtype)(x.float()).double()).roll(
        BLOCKS
    )
    errors = sorted(error(one, other) for one, other in zip(ours, rounded, strict=True))
    off = error(published(batch=4), rounded)
    assert errors[0] < 1e-4 and errors[-1] < off / 2, (errors, off)
    assert off > 2e-4


def test_the_plan_says_what_is_cached_and_what_is_held(tmp_path):
    """18 frames of window and 3 of the first block, nothing twice; and the cache as it was before the window shrank."""
    rollout = rolling(batch=2, dtype=torch.bfloat16)
    plan = spec_of("rolling_forcing", TinyModel(), batch=2, dtype=torch.bfloat16, ending=END).plan()
    planned, frame = plan.bytes(), 2 * plan.frame_bytes
    assert planned["k"] + planned["v"] == 2 * 21 * frame and planned["rotated_copy"] == 0
    assert planned["current"] == 2 * 15 * frame
    assert rollout.cache.nbytes == plan.kv_bytes and plan.host_bytes == 0
    latents_of(rollout, 3 * BLOCKS)
    state = rollout.snapshot()
    assert sum(layer.nbytes for layer in state.cache) == planned[HELD] == plan.held_bytes == 2 * 21 * frame
    assert HELD not in spec_of("rolling_forcing", TinyModel()).plan().bytes()


def test_the_help_page_has_the_bytes_of_the_1_3b():
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / "AdaStateModelPreset.md").read_text()
    text = " ".join(page.split())
    size = dict(geometry=ModelGeometry(16, 30, 12, 128), height=60, width=104, dtype=torch.bfloat16)
    plan = replace(spec_of("rolling_forcing", TinyModel(), ending=END), **size).plan()
    before = replace(spec_of("rolling_forcing", TinyModel(), window_frames=3, shares_window=False), **size).plan()
    assert f"1.3B model at 832x480 in bf16 {plan.kv_bytes / 2**30:.2f} GiB" in text
    assert f"A published end takes {plan.held_bytes / 2**30:.2f} GiB of host memory" in text
    assert f"A window of 3 takes {before.kv_bytes / 2**30:.2f} GiB" in text


def test_an_anchor_that_never_moves_is_a_static_one_also_where_it_is_blended():
    ours = latents_of(rolling(anchor=AnchorEMA(3, 1.0)), 39)
    torch.testing.assert_close(ours, latents_of(rolling(), 39), atol=1e-5, rtol=1e-5)


def test_an_open_end_is_an_exact_prefix():
    """semantics: Chunks denoised together."""
    whole = latents_of(rolling(ending="open"), 45)
    rollout = rolling(ending="open")
    assert torch.equal(latents_of(rollout, 27), whole[:, :, :27])
    assert rollout.snapshot().after == 0
    assert torch.equal(latents_of(rollout, 45), whole[:, :, 27:])
    assert max(by_block(whole[:, :, :33], published(blocks=15)[:, :, :33])) < 1e-4
    assert min(by_block(whole[:, :, 33:], published(blocks=15)[:, :, 33:])) > 1e-2


@pytest.mark.parametrize("length", [39, 51])
@pytest.mark.parametrize("changed", [{}, dict(cache_dtype="int8", cache_device="host memory")])
def test_a_state_of_a_published_end_goes_on_from_before_the_window_shrank(length, changed, tmp_path):
    """The last four chunks are made again: the same in a video as long, those of the longer one's loop in a longer one."""
    rollout = rolling(**changed)
    first = latents_of(rollout, 39)
    state = from_file(rollout.snapshot(), tmp_path)
    assert (state.emitted, state.next_chunk, state.after, state.spec["ending"]) == (27, 9, 12, END)
    assert "12 latents more, in a window that shrank, are made again" in repr(state)
    again = latents_of(rolling(state, **changed), length)
    whole = torch.cat([first[:, :, :27], again], 2)
    assert torch.equal(whole, latents_of(rolling(**changed), length))
    if not changed:
        assert max(by_block(whole, published(blocks=length // 3))) < 1e-4


@pytest.mark.parametrize("chunks", [1, 4, 9])
def test_a_run_that_is_stopped_before_its_window_shrinks_ends_open(chunks, tmp_path):
    rollout = rolling()
    first = torch.cat([chunk.latents for chunk in islice(rollout.chunks(39), chunks)], 2)
    state = rollout.snapshot()
    assert (state.after, state.emitted) == (0, 3 * chunks) and not rollout.ends
    rest = latents_of(rolling(from_file(state, tmp_path), ending="open"), 39)
    assert torch.equal(torch.cat([first, rest], 2), latents_of(rolling(ending="open"), 39))


def test_a_run_that_is_stopped_while_its_window_shrinks_goes_on():
    """The same rollout to its end, another one from before the end."""
    whole, rollout = latents_of(rolling(), 39), rolling()
    chunks = rollout.chunks(39)
    first = torch.cat([chunk.latents for chunk in islice(chunks, 11)], 2)
    chunks.close()
    state = rollout.snapshot()
    assert rollout.ends and (state.emitted, state.after) == (27, 6)
    assert torch.equal(torch.cat([first, latents_of(rollout, 39)], 2), whole)
    assert torch.equal(latents_of(rolling(state), 39), whole[:, :, 27:])
    with pytest.raises(ValueError, match="shrinks towards 39 latent frames and 42 were asked for"):
        latents_of(rollout, 42)


@pytest.mark.parametrize("length", [30, 33, 36])
def test_chunks_under_way_beyond_the_length_stay(length):
    """A state whose chunks under way begin beyond a length cannot end there as published: nothing of them is lost."""
    rollout = rolling(ending="open")
    first = latents_of(rollout, 27)
    ours = rolling(rollout.snapshot())
    assert torch.equal(torch.cat([first, latents_of(ours, length)], 2), latents_of(rolling(ending="open"), length))
    assert not ours.ends and ours.snapshot().after == 0


def test_states_of_before_are_open_and_read_as_they_did():
    """They name neither the ending, which may change, nor the sharing of the window, which may not."""
    before = dict(window_frames=3, shares_window=False)
    rollout = rolling(ending="open", **before)
    latents_of(rollout, 9)
    state = rollout.snapshot()
    assert not {"ending", "shares_window"} & set(state.spec)
    assert spec_of("rolling_forcing", TinyModel(), ending=END, **before).differences(state.spec) == []
    told = spec_of("rolling_forcing", TinyModel()).differences(state.spec)
    assert any("the chunks under way do not share the window's room in the state" in phrase for phrase in told)


def test_where_the_state_cannot_be_held_the_video_still_ends(monkeypatch):
    whole, rollout = latents_of(rolling(), 39), rolling()

    def full(stream=None):
        raise MemoryError("no room")

    monkeypatch.setattr(rollout.past, "snapshot", full)
    assert torch.equal(latents_of(rollout, 39), whole)
    with pytest.raises(UnfinishedError, match="could not be held .no room.*open ending"):
        rollout.snapshot()


@pytest.mark.parametrize("after", [-3, 0, 16, "3", 1.5])
def test_a_file_that_says_an_impossible_end_is_refused(after, tmp_path):
    rollout = rolling()
    latents_of(rollout, 15)
    state = rollout.snapshot()
    if after == 0:
        assert "after" not in state.spec and load_state(save_state(replace(state, after=0), tmp_path / "a")).after == 0
        return
    with pytest.raises(ValueError, match="after"):
        load_state(save_state(replace(state, after=after), tmp_path / "a"))


def test_several_chunks_ask_for_what_goes_with_them():
    model = TinyModel()
    with pytest.raises(ValueError, match="need at least 15"):
        spec_of("rolling_forcing", model, window_frames=14)
    with pytest.raises(ValueError, match="never start afresh"):
        spec_of("rolling_forcing", model, restart_frames=9, overlap_frames=3)
    with pytest.raises(ValueError, match="ending is 'late'; it must be one of as published, open"):
        spec_of("rolling_forcing", model, ending="late")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chunk", [9, 10, 12])
def test_an_operation_that_fails_while_the_window_shrinks_loses_nothing(chunk, late):
    """The state stays that of before, the same rollout finishes, and so does a new one from the state."""
    whole = latents_of(rolling(), 39)
    for n in random.Random(f"{chunk}/{late}").sample(range(400), 6):
        rollout = rolling()
        chunks = rollout.chunks(39)
        parts = [one.latents for one in islice(chunks, chunk)]
        chunks.close()
        with contextlib.suppress(INJECTED), at(n, InjectedMemory, late=late) as injector:
            parts.append(next(rollout.chunks(39)).latents)
        assert injector.failed is not None, n
        state = rollout.snapshot()
        assert (state.emitted, state.after) == (27, rollout.emitted - 27)
        rest = [one.latents for one in rollout.chunks(39)] if rollout.emitted < 39 else []
        assert torch.equal(torch.cat([*parts, *rest], 2), whole), n
        assert torch.equal(latents_of(rolling(state), 39), whole[:, :, 27:]), n
