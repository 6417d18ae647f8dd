"""Shots: where frames stand in time, which of them stay in the window, and every way to stop and go on between."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from faults.trial import difference, flat
from rounded import error, held_as
from slow_rollout import rotate
from slow_shots import SlowShots
from test_rollout import SCHEDULE, W_PIXELS, H, spec_for
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
from adastate_core.cache.rotated import RotatedSpec
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import NonFiniteError, Rollout, Settings
from adastate_core.rope import Layout
from adastate_core.shots import pinned_by, staying, time_of
from adastate_core.states.state_file import load_state, save_state

F, LENGTH = 3, 30
WORDS = torch.randn(1, 3, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


def plan(changes: dict[int, str]) -> PromptPlan:
    """The same words throughout: only what the transition does to the cache is seen."""
    named = {frame: "recache" if change == "one pass" else change for frame, change in changes.items()}
    return PromptPlan([PromptChange(0, WORDS), *(PromptChange(f, WORDS, one) for f, one in named.items())], F)


def rollout_of(spec, changes, model=None, **more) -> Rollout:
    return Rollout(model or TinyModel(), spec, Settings(7, SCHEDULE), prompts=plan(changes), **more)


def rolled(rollout: Rollout, length: int = LENGTH, given=None) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given)], 2)


def held(rollout: Rollout) -> list[list[int]]:
    return [[slot.frame for slot in layer.window.values()] for layer in rollout.cache.layers]


def slow_of(spec, changes, hold=lambda x: x) -> SlowShots:
    anchor, model = spec.anchor, TinyModel()
    model.set_context(WORDS)
    return SlowShots(
        model, F, spec.window_frames, 7, SCHEDULE.sigmas, spec.positions, changes, anchor.kind, anchor.frames,
        anchor.state_frames, getattr(anchor, "decay", 0.9), replayed=anchor.replay_frames, hold=hold,
        size=(spec.batch, H, W_PIXELS),
    )  # fmt: skip


def shots(*frames: int) -> dict[int, str]:
    return dict.fromkeys(frames, "shot")


# name: (anchor, positions, window, changes, given frames)
CASES = {
    "LongLive 2.0's": (AnchorStatic(3), "absolute", 6, shots(6, 18), 0),
    "three in a row": (AnchorStatic(3), "absolute", 12, shots(3, 6, 9), 0),
    "in a row, relative": (AnchorStatic(3), "packed", 9, shots(9, 12, 15), 0),
    "fixed": (AnchorStatic(2), "fixed", 6, shots(6), 0),
    "no anchor, a frame more than the chunk": (Anchor(), "absolute", 4, shots(3, 12), 0),
    "a sink that takes a part of the shot": (AnchorStatic(5), "absolute", 7, shots(3, 15), 0),
    "behind given frames": (AnchorStatic(1), "packed", 5, shots(4, 16), 4),
    "ema": (AnchorEMA(2, 0.6), "packed", 7, shots(6, 15), 0),
    "memory, which first loses frames on both sides": (AnchorMemory(3), "packed", 5, shots(6, 18), 0),
    "replay": (AnchorReplay(6), "absolute", 9, shots(12), 0),
    "adaptive": (AnchorAdaptive(2), "packed", 6, shots(3, 6, 21), 0),
    "recache in its reach": (AnchorStatic(3), "absolute", 6, {9: "shot", 15: "recache", 21: "shot"}, 0),
    "recache out of its reach": (AnchorEMA(2, 0.6), "packed", 6, {6: "shot", 21: "recache"}, 0),
    "recache with a state": (AnchorAdaptive(1), "fixed", 6, {9: "shot", 18: "recache"}, 0),
    "one pass over all": (AnchorStatic(3), "absolute", 6, {3: "shot", 9: "one pass", 12: "shot"}, 0),
    "one pass over the newest": (AnchorStatic(3), "absolute", 7, {12: "shot", 21: "one pass", 27: "shot"}, 0),
    "one pass, relative": (AnchorStatic(3), "packed", 6, {12: "shot", 21: "one pass"}, 0),
    "flush and rope cut": (AnchorStatic(3), "absolute", 6, {6: "shot", 15: "flush", 18: "shot", 24: "rope cut"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(2)
def test_equals_the_slow_loop(name):
    """semantics: Shots."""
    anchor, positions, W, changes, frames = CASES[name]
    at_once = "one pass" in changes.values()
    spec = spec_for(TinyModel(), batch=2, W=W, anchor=anchor, positions=positions, one_pass_recache=at_once)
    given = torch.randn(2, 4, frames, H, W_PIXELS, generator=torch.Generator().manual_seed(3)) if frames else None
    slow, rollout = slow_of(spec, changes), rollout_of(spec, changes)
    torch.testing.assert_close(rolled(rollout, LENGTH, given), slow.roll(LENGTH, given), atol=3e-5, rtol=3e-5)
    assert all(frames == [one.frame for one in slow.window] for frames in held(rollout))
    assert rollout.past.now.shots == tuple(frame for frame, change in changes.items() if change == "shot")
    assert (
        rollout.cache.nbytes == spec.plan().kv_bytes
    )  # whatever is pinned, the cache has the size that it was planned with


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_eight_bits_equal_the_slow_loop_that_rounds(cache_dtype):
    """By the bound of test_kv_storage."""
    anchor, positions, W, changes, _ = CASES["LongLive 2.0's"]
    spec = spec_for(TinyModel(), batch=4, W=W, anchor=anchor, positions=positions)
    fast = rolled(rollout_of(replace(spec, cache_dtype=cache_dtype), changes))
    slow = slow_of(spec, changes, held_as(cache_dtype)).roll(LENGTH)
    exact = rolled(rollout_of(spec, changes))
    errors = sorted(error(one, other) for one, other in zip(fast, slow, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, slow) / 2 and error(exact, slow) > 2e-4, errors
    assert torch.equal(rolled(rollout_of(replace(spec, cache_device="host memory"), changes)), exact)


def test_what_the_window_holds_is_what_the_published_code_keeps():
    """By hand, of its rolling buffer: chunks of 3, a sink of 3, 6 frames beside it, shots with chunks 2, 5 and 6."""
    rollout, seen = rollout_of(spec_for(TinyModel(), W=6, anchor=AnchorStatic(3)), shots(6, 15, 18)), []
    for _ in rollout.chunks(LENGTH):
        seen.append([frame // F for frame in held(rollout)[0][::F]])
    assert seen == [[], [1], [1, 2], [2, 3], [2, 4], [4, 5], [5, 6], [6, 7], [6, 8], [6, 9]]


@pytest.mark.parametrize(
    "name", ["LongLive 2.0's", "memory, which first loses frames on both sides", "recache in its reach"]
)
@pytest.mark.sampled(2)
@pytest.mark.parametrize("storage", [{}, {"cache_dtype": "int8", "cache_device": "host memory"}], ids=["plain", "int8"])
def test_going_on_from_a_file_after_every_chunk_gives_the_same_bits(name, storage, tmp_path):
    anchor, positions, W, changes, _ = CASES[name]
    spec = replace(spec_for(TinyModel(), batch=2, W=W, anchor=anchor, positions=positions), **storage)
    whole = rollout_of(spec, changes)
    expected, state, parts = rolled(whole), None, []
    for length in range(F, LENGTH + 1, F):
        rollout = rollout_of(spec, changes, state=state)
        parts.append(rolled(rollout, length))
        state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
        assert state.shots == tuple(f for f, one in changes.items() if one == "shot" and f < length)
    assert torch.equal(torch.cat(parts, 2), expected)
    assert not difference(flat(state), flat(whole.snapshot()))


class Breaks(TinyModel):
    """Gives NaN in the pass with which `left` reaches 0."""

    left = -1

    def velocity(self, x, timestep, attention):
        self.left -= 1
        v = super().velocity(x, timestep, attention)
        return v * float("nan") if self.left == 0 else v


@pytest.mark.parametrize("at", [1, 3], ids=["first pass", "clean pass"])
def test_a_shot_whose_chunk_failed_has_not_begun(at):
    """The words may be others when it is tried again: then nothing is left of the shot."""
    spec, model = spec_for(TinyModel(), W=6, anchor=AnchorStatic(3), positions="absolute"), Breaks()
    rollout = rollout_of(spec, shots(12), model)
    rolled(rollout, 12)
    before, model.left = flat(rollout.snapshot()), at
    with pytest.raises(NonFiniteError):
        rolled(rollout, LENGTH)
    place = difference(
        {k: v for k, v in flat(rollout.snapshot()).items() if "keys" not in k and "positions" not in k}, before
    )
    assert not place or place.endswith(("keys", "positions")), place
    assert rollout.snapshot().shots == () and rollout.past.layout().shots == ()
    rollout.steer(plan({12: "cut"}))
    assert torch.equal(rolled(rollout), rolled(rollout_of(spec, {12: "cut"}))[:, :, 12:])


def test_a_shot_that_is_asked_for_and_taken_back_while_the_video_is_made():
    spec = spec_for(TinyModel(), W=6, anchor=AnchorStatic(3), positions="absolute")
    rollout = rollout_of(spec, shots(6))
    start = rolled(rollout, 9)
    assert rollout.past.shots == (6,)  # the chunk to come begins none
    start, kept = torch.cat([start, rolled(rollout, 15)], 2), rollout.snapshot()
    rollout.steer(plan(shots(6, 15)))
    rest = rolled(rollout, 27)
    assert torch.equal(torch.cat([start, rest], 2), rolled(rollout_of(spec, shots(6, 15)), 27))
    assert rollout.past.now.shots == (6, 15) and held(rollout)[0] == [15, 16, 17, 24, 25, 26]
    rollout.go_back(kept)
    rollout.steer(plan(shots(6)))
    assert torch.equal(torch.cat([start, rolled(rollout, 27)], 2), rolled(rollout_of(spec, shots(6)), 27))
    assert rollout.past.now.shots == (6,) and held(rollout)[0] == [6, 7, 8, 24, 25, 26]


def test_a_longer_video_begins_with_the_shorter_one_and_its_opening_words_are_for_one_chunk():
    spec = spec_for(TinyModel(), W=6, anchor=AnchorStatic(3), positions="absolute")
    other = PromptChange(9, WORDS, "shot", opening=2 * WORDS)
    whole = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), prompts=PromptPlan([PromptChange(0, WORDS), other], F))
    expected = rolled(whole, LENGTH)
    plain = rolled(rollout_of(spec, shots(9)), LENGTH)
    assert torch.equal(expected[:, :, :9], plain[:, :, :9]) and not torch.equal(expected[:, :, 9:12], plain[:, :, 9:12])
    begun = Rollout(TinyModel(), spec, Settings(7, SCHEDULE), prompts=whole.prompts, length=10)
    parts = [rolled(begun, 10)]
    parts.append(rolled(begun, LENGTH))
    assert torch.equal(torch.cat(parts, 2), expected)


@pytest.mark.parametrize(
    ("first", "positions"), [(3, "packed"), (15, "absolute")], ids=["before the switch", "after it"]
)
def test_layers_that_have_lost_their_history_keep_their_newest_frames(first, positions):
    """The others pin the shot's first chunk; what is watched of the small ones is what those others still hold."""
    settings = AbsorptionSettings(
        warmup_frames=12, local_window_frames=4, sink_frames=1, ratio=0.5, monitor_layers=-1, monitor_chunks=2,
        refresh="always",
    )  # fmt: skip
    spec = spec_for(TinyModel(), W=9, anchor=AnchorStatic(3), positions=positions, absorption=settings)
    whole = rollout_of(spec, shots(first))
    expected = rolled(whole, 33)
    (small,) = whole.absorber.solution.chosen
    windows = held(whole)
    pinned = [first, first + 1, first + 2]
    assert windows[1 - small] == [*pinned, *range(27, 33)] and windows[small] == [29, 30, 31, 32]
    history = whole.absorber.histories[small]
    assert [kept.frame for kept in history.mark()] == [*pinned, 27, 28]
    # at the places in time that the other layer has them at
    whole.past.place(layout := whole.past.layout())
    at = {slot.frame: slot.position for slot in whole.cache.layers[1 - small].window.values()}
    keys = history.read(layout, whole.past.rope, 2, torch.device("cpu"))[0].unflatten(1, (5, -1))
    for i, kept in enumerate(history.mark() if positions == "packed" else ()):
        turned = rotate(kept.key.unflatten(-1, (2, -1)), at[kept.frame], H // 2, W_PIXELS // 2).flatten(2)
        torch.testing.assert_close(keys[:, i], turned, atol=1e-5, rtol=1e-5)
    assert whole.cache.nbytes < spec.plan().kv_bytes and whole.cache.peak_nbytes == spec.plan().kv_bytes
    for cut in (12, 18, 24):
        begun = rollout_of(spec, shots(first))
        parts = [rolled(begun, cut)]
        resumed = rollout_of(spec, shots(first), state=begun.snapshot())
        assert torch.equal(torch.cat([*parts, rolled(resumed, 33)], 2), expected)
        assert resumed.absorber.watched == whole.absorber.watched


def test_a_pinned_chunk_is_none_of_the_first_frames_that_an_absorption_keeps():
    """Where these have left the window, the switched layers are as small as they were planned."""
    settings = AbsorptionSettings(warmup_frames=15, local_window_frames=2, sink_frames=4, ratio=0.5, ridge=0.3)
    spec = spec_for(TinyModel(), W=6, positions="absolute", absorption=settings)
    rollout = rollout_of(spec, shots(3))
    rolled(rollout, 21)
    assert sorted(map(len, held(rollout))) == [2, 6] and held(rollout)[1 - rollout.absorber.solution.chosen[0]][0] == 3
    assert rollout.cache.peak_nbytes == spec.plan().kv_bytes


def test_where_frames_stand_and_which_stay():
    """semantics: Shots."""
    assert [time_of(frame, (3, 9)) for frame in (0, 2, 3, 8, 9, 100)] == [0, 2, 11, 16, 25, 116]
    assert [pinned_by((3, 9), end, 3) for end in (3, 6, 9, 11, 30)] == [
        range(0), range(3, 6), range(3, 6), range(9, 11), range(9, 12)]  # fmt: skip
    assert staying(range(20), 6, range(4, 7)) == [4, 5, 6, 17, 18, 19] and staying(range(3), 6, range(1)) == [0, 1, 2]
    numbers = dict(anchor_capacity=3, window_capacity=6, state_frames=0, anchor_present=3, window_present=6)
    packed = Layout("packed", **numbers, first_frame=30, shots=(6, 30), pin=range(6, 9))
    assert packed.ring([6, 7, 8, 27, 28, 29]) == [3, 4, 5, 6, 7, 8] and packed.current(3) == [9, 10, 11]
    absolute = replace(packed, mode="absolute")
    assert absolute.ring([6, 7, 8, 29]) == [14, 15, 16, 37] and absolute.current(3) == [46, 47, 48]
    assert replace(absolute, first_frame=5).current(3) == [5, 14, 15]  # made again from a frame of the shot before
    assert replace(absolute, jump=100).current(2) == [146, 147]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(W=3), "window_frames is 3, and a shot keeps its first chunk of 3 .* set window_frames to 4 or more"),
        (dict(W=6, layers=(RotatedSpec(0, 6), RotatedSpec(0, 2))), "window_frames is 2"),
        (dict(W=6, anchor=AnchorDeep(2, 4, 8)), "the deep anchor"),
        (dict(W=6, blocks=2), "2 chunks denoised together"),
        (dict(W=6, remade="first"), "a past that is made anew"),
        (dict(W=6, restart_frames=12, overlap_frames=3), "restarts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(name for name in reversed(value)),
)
def test_where_there_can_be_none_it_is_said_before_anything_is_made(more, words):
    spec = spec_for(TinyModel(), **more)
    with pytest.raises(ValueError, match=words) as caught:
        rollout_of(spec, shots(6))
    assert "\n" not in str(caught.value) and re.search("choose another transition", str(caught.value))
    rollout = rollout_of(spec, {}) if spec.blocks == 1 else None
    if rollout is not None:  # steered, it goes on as it was
        before = rollout.prompts
        with pytest.raises(ValueError, match=words):
            rollout.steer(plan(shots(6)))
        assert rollout.prompts is before


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ([12, 6], "in their order"), ([6, 6], "in their order"), ([-3], "whole number of at least 1"), ([0], "at least 1"),
        ([18], "from 3 to 14"), ([15], "from 3 to 14"), ([7], "with which a chunk begins"), ([], "no frames at all"),
        ("6", "not a list"), ([6.0], "not a whole number"), ([True], "not a whole number"), ([*range(1, 200)], "from 3 to 14"),
        ([2**70], "at most"),
    ],
    ids=str,
)  # fmt: skip
def test_what_are_no_shots_of_a_state_is_refused(there, words, tmp_path, monkeypatch):
    spec = spec_for(TinyModel(), W=6, anchor=AnchorStatic(3))
    given = torch.zeros(1, 4, 3, H, W_PIXELS)
    rollout = rollout_of(spec, shots(6))
    rolled(rollout, 15, given)
    state = rollout.snapshot()
    path = save_state(state, tmp_path / "a.state.safetensors")
    assert load_state(path).shots == (6,)
    save_state(replace(state, shots=there), path) if there else _without(state, path, monkeypatch)
    with pytest.raises(ValueError, match=f"a.state.safetensors.*shots.*{words}"):
        load_state(path)
    if isinstance(there, list) and all(type(one) is int and one > 0 for one in there) and there:
        with pytest.raises(ValueError, match="the state's shots are .*it is damaged"):
            rollout_of(spec, shots(6), state=replace(state, shots=tuple(there)))


def _without(state, path, monkeypatch):
    """A file that says that there are shots, and names none."""
    from adastate_core.states import state_file

    contents = state_file._contents(state)
    monkeypatch.setattr(state_file, "_contents", lambda _: (contents[0], _emptied(contents[1])))
    save_state(state, path)


def _emptied(texts):
    return texts | {"state": texts["state"].replace('"shots": [6]', '"shots": []')}


def test_shots_of_a_state_whose_settings_allow_none_are_refused(tmp_path):
    rollout = rollout_of(spec_for(TinyModel(), W=3), {})
    rolled(rollout, 15)
    path = save_state(replace(rollout.snapshot(), shots=(6,)), tmp_path / "a.state.safetensors")
    with pytest.raises(ValueError, match="shots are .6., there although its settings allow none"):
        load_state(path)
