"""Rollouts of S2V models against the slow loops (slow_liveavatar.py): LiveAvatar's way and the plain one, in every mode.

The model is the slow one on both sides (slow_talking.py); tests/host/test_liveavatar.py has the host's. LiveAvatar's published
code was run beside the loop, outside of the repository; docs/systems.md says which.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from rounded import error, held_as
from slow_liveavatar import LiveAvatar, Plain, levels_of
from slow_s2v import SlowS2V
from slow_talking import TalkingS2V
from test_kv_storage import STORED
from tiny_s2v import features, tiny_s2v

from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.audio.driving import DrivingSound
from adastate_core.audio.track import AudioTrack
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.reference import ReferenceRule
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state

H, W, SEED = 8, 8, 5
LEVELS = (1.0, 0.8)
ROLLS = 12


@cache
def slow_model(size: tuple[int, int] = (128, 1)) -> SlowS2V:
    return SlowS2V(tiny_s2v(*size))


@cache
def ear(seconds: float = 4.0) -> tuple[torch.Tensor, ...]:
    return features(seconds)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(seed=2):
    return drawn(seed, 1, 5, 4096)


def picture(h=H, w=W):
    return drawn(3, 1, 16, 1, h, w)


def by_the_loop(kind=LiveAvatar, *, seconds=4.0, silent=False, shown=True, **numbers):
    """`silent`: a sound that is not there is nothing but zeros, as what is beyond a sound's end."""
    model = slow_model()
    heard = torch.zeros(200, 1024) if silent else model.folded(ear(seconds))
    numbers = {"seed": SEED, "h": H, "w": W} | numbers
    return kind(
        model, words(), heard=heard, reference=picture(numbers["h"], numbers["w"]) if shown else None, **numbers
    )


def started(
    *,
    plain=False,
    batch=1,
    steps=4,
    state=None,
    seconds=4.0,
    silent=False,
    shown=True,
    prompts=None,
    offset=0.0,
    **changed,
):
    """The rollout that a loop is held to, before its first chunk or from a state."""
    model = TalkingS2V(slow_model(), words())
    track = None if silent else AudioTrack(None, ear(seconds), offset=offset)
    sound = DrivingSound(track, 16.0 if plain else 25.0, "host" if plain else "chunk")
    numbers = {"window_frames": 3, "positions": "packed", "reference": ReferenceRule()} if plain else {
        "window_frames": 9, "positions": "absolute", "history": "own level", "windows": steps,
        "reference": ReferenceRule(ROLLS, drawn=True),
    }  # fmt: skip
    numbers |= {} if shown else {"reference": None}
    schedule = Schedule(LEVELS) if plain else Schedule(tuple(levels_of(steps)[:-1]), sampler="euler")
    spec = RolloutSpec(
        geometry=model.geometry, batch=batch, chunk_frames=3, dtype=torch.float32,
        **({"anchor": Anchor(), "height": H, "width": W} | numbers | changed),
    )  # fmt: skip
    reference = picture(spec.height, spec.width).expand(batch, -1, -1, -1, -1) if shown else None
    return Rollout(
        model, spec, Settings(SEED, schedule, sound=sound), state=state, prompts=prompts, reference=reference
    )


def latents_of(rollout, length, *given):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, *given)], 2)


def worst(ours, theirs):
    assert ours.shape == theirs.shape
    return max(float((a - b).abs().max()) for a, b in zip(ours.split(3, 2), theirs.split(3, 2), strict=True))


# what is asked of the rollout, what of the loop
MODES = {
    "one video": ({}, {}),
    "two videos": ({"batch": 2}, {"batch": 2}),
    "no sound": ({"silent": True}, {"silent": True}),
    "no picture": ({"shown": False}, {"shown": False}),
    "a picture that stays": ({"reference": ReferenceRule(0, drawn=True)}, {"rolls_at": None}),
    "a picture at its nearest": ({"reference": ReferenceRule(ROLLS)}, {"distance": lambda chunk, step: 4}),
    "a sound that ends": ({"seconds": 1.3}, {"seconds": 1.3}),
    "two steps": ({"steps": 2}, {"steps": 2}),
    "the last level for all": ({"history": "last level", "windows": 1}, {"one_history": True}),
    "a sink": ({"anchor": AnchorStatic(3), "window_frames": 6}, {"sink": 3, "ring": 9}),
    "a longer window": ({"window_frames": 12}, {"ring": 15}),
    "host memory": ({"cache_device": "host memory"}, {}),
    "sides of no whole number of larger patches": ({"height": 12, "width": 10}, {"h": 12, "w": 10}),
    "packed positions": ({"positions": "packed"}, {"packed": True}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled(3)
def test_liveavatar_is_its_loop(mode, tmp_path):
    """Until the ring has rolled over and the picture has been replaced; and the same in pieces, each gone on with from a file."""
    asked, numbers = MODES[mode]
    theirs = by_the_loop(**numbers).roll(6)
    ours = latents_of(started(**asked), 18)
    assert worst(ours, theirs) < 1e-4
    rollout, parts = started(**asked), []
    for length in (5, 12, 14, 18):
        parts.append(latents_of(rollout, length))
        rollout = started(state=load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors")), **asked)
    assert torch.equal(torch.cat(parts, 2), ours)


class Stop(Exception):
    pass


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chunk", [0, 4, 5])
@pytest.mark.parametrize("step", [0, 3])
def test_a_chunk_that_is_stopped_is_made_again_to_the_bit(chunk, step):
    """The first, the one from which on the picture is another, and one of a full ring: in this run, and in one from its state."""
    whole = latents_of(started(), 18)

    def stop(at, passed, steps, x0):
        if (at, passed) == (chunk, step):
            raise Stop

    rollout, made = started(), []
    rollout._passes.on_step = stop
    with pytest.raises(Stop):
        for one in rollout.chunks(18):
            made.append(one.latents)
    rollout._passes.on_step = None
    for other in (started(state=rollout.snapshot()), rollout):
        assert torch.equal(torch.cat([*made, latents_of(other, 18)], 2), whole)


def test_words_that_change_and_the_words_of_the_picture():
    """The picture's tokens have read the words of the first chunk that sees them."""
    plan = PromptPlan(
        [PromptChange(0, words(2)), PromptChange(6, words(7), "cut"), PromptChange(15, words(8), "cut")], 3
    )

    def before_chunk(loop):
        loop.context = words(8 if loop.f >= 15 else 7 if loop.f >= 6 else 2)

    theirs = by_the_loop(before_chunk=before_chunk).roll(6)
    assert worst(latents_of(started(prompts=plan), 18), theirs) < 1e-4
    parts, rollout = [], started(prompts=plan)
    for length in (9, 14, 18):
        parts.append(latents_of(rollout, length))
        rollout = started(prompts=plan, state=rollout.snapshot())
    assert worst(torch.cat(parts, 2), theirs) < 1e-4


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("cache_dtype", "cache_device"), [("fp8", "gpu"), ("int8", "host memory")])
def test_eight_bits_are_the_loop_that_rounds(cache_dtype, cache_device):
    """By the bound of test_kv_storage.py: not all of the videos have to agree, since a last bit decides between two codes."""
    assert (cache_dtype, cache_device) in [*STORED, ("fp8", "gpu")]
    hold = held_as(cache_dtype, 1)
    fast = latents_of(started(batch=3, cache_dtype=cache_dtype, cache_device=cache_device), 18)
    exact, slow = by_the_loop(batch=3).roll(6).float(), by_the_loop(batch=3, hold=hold).roll(6).float()
    errors = sorted(error(one, other) for one, other in zip(fast, slow, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, slow) / 2, errors
    assert error(exact, slow) > 2e-4


# what is asked of the rollout and of the loop in the plain way, and how long it is
ANCHORS = {"none": (Anchor(), {}), "static": (AnchorStatic(2), {"anchor": "static", "A": 2}),
           "ema": (AnchorEMA(2, 0.9), {"anchor": "ema", "A": 2, "decay": 0.9}),
           "adaptive": (AnchorAdaptive(1), {"anchor": "adaptive", "A": 1})}  # fmt: skip
PLAIN = [
    ("none", "packed", 3, 1),
    ("static", "absolute", 3, 2),
    ("ema", "fixed", 4, 1),
    ("adaptive", "packed", 3, 2),
    ("none", "absolute", 33, 1),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("anchor", "positions", "window", "batch"), PLAIN, ids=[" ".join(map(str, c)) for c in PLAIN])
def test_the_plain_way_is_its_loop(anchor, positions, window, batch, tmp_path):
    """With sound and a picture; behind a long past the picture stands further than 30 away."""
    policy, numbers = ANCHORS[anchor]
    length = 36 if window > 30 else 15
    asked = {"plain": True, "batch": batch, "anchor": policy, "positions": positions, "window_frames": window}
    loop = by_the_loop(Plain, batch=batch, states=policy.state_frames)
    theirs = loop.roll(length, LEVELS, W=window, mode=positions, **numbers)["latents"]
    ours = latents_of(started(**asked), length)
    assert worst(ours, theirs) < 1e-4
    first = started(**asked)
    parts = [latents_of(first, 7)]
    state = load_state(save_state(first.snapshot(), tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([*parts, latents_of(started(state=state, **asked), length)], 2), ours)


def test_far_into_a_video_the_picture_is_as_near_as_ever():
    """Latent frames beyond 1024 and beyond the end of the sound: everything but the frames before the video has moved on."""
    far, begin, silent = 40_000, 12, {"silent": True}
    rollout = started(**silent)
    latents_of(rollout, begin)
    state = rollout.snapshot()
    layers = [replace(layer, frames=tuple(frame + far for frame in layer.frames)) for layer in state.cache]
    later = replace(state, next_frame=begin + far, emitted=begin + far, cache=tuple(layers))
    loop = by_the_loop(**silent)
    loop.roll(begin // 3)
    loop.far = far
    theirs = loop.roll(3)[:, :, begin:]
    assert worst(latents_of(started(state=later, **silent), begin + far + 9), theirs) < 1e-4
    assert worst(latents_of(rollout, begin + 9), theirs) > 1e-2


def test_in_the_plain_way_the_first_frame_may_stand_for_the_picture_too():
    theirs = by_the_loop(Plain, rolls_at=6).roll(12, LEVELS, W=3)["latents"]
    assert worst(latents_of(started(plain=True, reference=ReferenceRule(6)), 12), theirs) < 1e-4
    assert worst(latents_of(started(plain=True), 12), theirs) > 1e-2


def test_given_frames_are_heard_and_shown_the_picture():
    given = drawn(9, 1, 16, 4, H, W)
    theirs = by_the_loop(Plain).roll(16, LEVELS, W=3, given=given)["latents"][:, :, :16]
    assert worst(latents_of(started(plain=True), 16, given), theirs) < 1e-4


def test_an_offset_is_a_sound_that_begins_later():
    """Half a second of it passes before the first picture: 15 of the 30 steps of a second that pictures choose from."""
    model, rate = slow_model(), 25
    late = started(offset=0.52)  # 13 pictures
    theirs = by_the_loop()
    theirs.first_picture = 13
    assert rate * 0.52 == 13 and worst(latents_of(late, 9), theirs.roll(3)) < 1e-4
    assert model.layers == 1
