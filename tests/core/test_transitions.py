"""Prompts that change on the way: each transition against a slow loop, resumed, interrupted and failing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from slow_changes import Adaptive, Changes
from slow_systems import (
    InfinityRope,
    LongLive,
    MemRope,
    RewardForcing,
    RollingForcing,
    SelfForcing,
    TwoSteps,
)
from systems_fast import latents_of, rollout_of
from tiny_model import TinyModel

from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.states.state_file import load_state, save_state

LENGTH = 24


class ChunkAfterChunk(SelfForcing):
    """LongLive's sizes by the pack's own recache."""

    size, sink = 12, 3


ALONE = dict(restart_frames=0, overlap_frames=0)


class Infinite(LongLive):
    """A frame's position is its place in the cache."""

    read = InfinityRope.read


# what a rollout is made of, and its slow loop with the same sizes
LOOPS = {
    "full": ("self_forcing", {}, SelfForcing, {}),
    "window": ("self_forcing", dict(window_frames=6), SelfForcing, dict(size=9)),
    "longlive": ("longlive", {}, LongLive, {}),
    "longlive, larger": ("longlive", dict(window_frames=9, anchor=AnchorStatic(4)), LongLive, dict(size=16, sink=4)),
    "longlive, smaller": ("longlive", dict(window_frames=4, anchor=AnchorStatic(1)), LongLive, dict(size=8, sink=1)),
    "longlive, infinite": ("longlive", dict(positions="packed"), Infinite, {}),
    "longlive, no sink": ("longlive", dict(anchor=Anchor()), LongLive, dict(size=9, sink=0)),
    "longlive, chunk after chunk": ("longlive", dict(one_pass_recache=False), ChunkAfterChunk, {}),
    "infinity": ("infinity_rope", {}, InfinityRope, {}),
    "infinity, longer": ("infinity_rope", dict(window_frames=5), InfinityRope, dict(size=9)),
    "reward": ("reward_forcing", dict(anchor=AnchorEMA(3, 0.6)), RewardForcing, dict(decay=0.6)),
    "memrope": ("memrope", {}, MemRope, {}),
    "frame-wise": ("causal_forcing_frame_2step", dict(window_frames=4), TwoSteps, dict(size=5)),
    "rolling": ("rolling_forcing", dict(window_frames=3, shares_window=False), RollingForcing, {}),
    "adaptive": ("causvid", dict(anchor=AnchorAdaptive(1), window_frames=6, **ALONE), Adaptive, {}),
    "frozen": (
        "causvid", dict(anchor=AnchorAdaptive(1, freeze_frame=6), window_frames=6, **ALONE), Adaptive, dict(freeze_frame=6),
    ),
}  # fmt: skip
CASES = [
    ("full", "cut"), ("longlive", "cut"), ("frame-wise", "cut"), ("rolling", "cut"),
    ("window", "recache"), ("longlive", "recache"), ("infinity", "recache"), ("reward", "recache"),
    ("memrope", "recache"), ("adaptive", "recache"), ("frozen", "recache"),
    ("longlive, larger", "recache"), ("longlive, smaller", "recache"), ("longlive, no sink", "recache"),
    ("longlive, infinite", "recache"), ("longlive, chunk after chunk", "recache"),
    ("longlive", "flush"), ("infinity", "flush"), ("infinity, longer", "flush"), ("memrope", "flush"),
    ("infinity", "rope cut"), ("longlive", "rope cut"),
    ("full", "soft"), ("frame-wise", "soft"),
]  # fmt: skip


def text(number: int, tokens: int = 3) -> torch.Tensor:
    return torch.randn(1, tokens, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(number))


def rows_of(transition, chunks=2):
    """Changes inside a chunk before its middle (frame 10 of 9..11) and behind it (17 of 15..17, so from 18 on)."""
    return [(0, text(1), "cut", chunks), (10, text(2), transition, chunks), (17, text(3), transition, chunks)]


def plan_of(rows, frames):
    changes = [PromptChange(frame, context, transition, chunks) for frame, context, transition, chunks in rows]
    return PromptPlan(changes, frames)


def model_of(kind):
    """Of 4 layers where a state is seen while it is made again: with fewer, three passes later nothing tells."""
    return TinyModel(layers=4 if kind == "adaptive" else 2)


def make(kind, transition, model=None, state=None, on_step=None):
    name, changed, loop, numbers = LOOPS[kind]
    plan = plan_of(rows_of(transition), numbers.get("frames", loop.frames))
    return rollout_of(name, model or model_of(kind), state=state, prompts=plan, on_step=on_step, **changed)


@cache
def whole(kind, transition):
    return latents_of(make(kind, transition), LENGTH)


def slow(kind, transition, length=LENGTH):
    _, _, loop, numbers = LOOPS[kind]
    if kind == "rolling":
        length += 12  # its ramp at the end is left out
    running = loop(
        model_of(kind), prompts=Changes(rows_of(transition)), **({"W": 6} if loop is Adaptive else {}), **numbers
    )
    return running.roll(length // running.frames)[:, :, :LENGTH]


@pytest.mark.parametrize(("kind", "transition"), CASES)
def test_a_transition_is_its_slow_loop(kind, transition):
    """semantics: A change of the prompt."""
    torch.testing.assert_close(whole(kind, transition), slow(kind, transition), atol=1e-4, rtol=1e-4)


def test_transitions_are_told_apart():
    """Up to the change all are alike; from it on no two are."""
    every = [whole("longlive", transition) for transition in ("cut", "recache", "flush", "rope cut")]
    for i, one in enumerate(every):
        for other in every[:i]:
            assert torch.equal(one[:, :, :9], other[:, :, :9])
            assert not torch.allclose(one[:, :, 9:12], other[:, :, 9:12], atol=1e-3)


RESUMED = [
    ("longlive", "recache"), ("memrope", "recache"), ("infinity, longer", "flush"), ("infinity", "rope cut"),
    ("frame-wise", "soft"), ("rolling", "cut"), ("adaptive", "recache"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "transition"), RESUMED)
def test_going_on_from_files_changes_where_the_uninterrupted_one_does(kind, transition, tmp_path):
    state, parts = None, []
    for length in range(3, LENGTH + 1, 3):
        rollout = make(kind, transition, state=state)
        parts.append(latents_of(rollout, length))
        state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat(parts, 2), whole(kind, transition))


@pytest.mark.parametrize("same", [True, False], ids=["the same rollout", "from a file"])
@pytest.mark.parametrize(
    ("kind", "transition"),
    [("longlive", "recache"), ("adaptive", "recache"), ("infinity, longer", "flush"), ("infinity", "rope cut")],
)
@pytest.mark.parametrize("base", [Exception, BaseException])  # hosts interrupt with either
def test_an_interrupt_in_the_chunk_of_a_transition(kind, transition, same, base, tmp_path):
    class Interrupt(base):
        pass

    def stop(chunk, step, steps, x0):
        if (chunk, step) in stops:
            stops.remove((chunk, step))
            raise Interrupt

    stops = {(3, 0), (6, 2)}
    rollout = make(kind, transition, on_step=stop)
    for emitted in (9, 18):
        with pytest.raises(Interrupt):
            latents_of(rollout, LENGTH)
        assert rollout.emitted == emitted
        if not same:
            state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
            rollout = make(kind, transition, state=state, on_step=stop)
    assert torch.equal(latents_of(rollout, LENGTH), whole(kind, transition)[:, :, 18:])


@pytest.mark.parametrize("kind", ["longlive", "memrope", "adaptive"])
@pytest.mark.parametrize("call", [0, 1])
def test_a_failure_inside_the_recache_leaves_an_empty_window_to_be_made_again(kind, call):
    """semantics: A change of the prompt. The anchor is as it was."""

    class Failing(TinyModel):
        """Fails once, in the `call`-th pass of the recache, told by its text and by t=0 as the first pass."""

        left, armed = call, True

        def velocity(self, x, timestep, attention):
            if self.armed and timestep == 0.0 and torch.equal(self.context, text(2)):
                self.left -= 1
                if self.left < 0:
                    self.armed = False
                    raise RuntimeError("out of memory")
            return super().velocity(x, timestep, attention)

    def anchors(layer, name):
        return layer.tensors[name][:, : len(layer.anchor_slots)]

    rollout = make(kind, "recache", model=Failing(layers=model_of(kind).geometry.layers))
    latents_of(rollout, 9)
    before = rollout.snapshot()
    with pytest.raises(RuntimeError, match="out of memory"):
        latents_of(rollout, 12)
    after = rollout.snapshot()
    for kept, found in zip(before.cache, after.cache, strict=True):
        assert kept.anchor_slots == found.anchor_slots and found.ring_slots == ()
        assert kept.frames[: len(kept.anchor_slots)] == found.frames
        assert torch.equal(anchors(kept, "values"), anchors(found, "values"))
    assert (after.next_frame, after.next_chunk, after.emitted, after.again) == (9, 3, 9, 9)
    assert torch.equal(latents_of(make(kind, "recache", state=after), LENGTH), whole(kind, "recache")[:, :, 9:])
    rest = latents_of(rollout, LENGTH)
    assert torch.equal(rest, whole(kind, "recache")[:, :, 9:])


class Masked(SelfForcing):
    """A recache as one pass over all frames under a block-causal mask, where no frame has left and none is a sink."""

    def recache(self):
        self.whole, back = True, self.start
        self.start = 0
        self.clean_pass(torch.cat(self.out, 2))
        self.whole, self.start = False, back

    whole = False

    def attend(self, layer, q, k, v):
        if not self.whole:
            return super().attend(layer, q, k, v)
        frames = self.split(k, v)
        self.cache[layer] = frames
        out = []
        for end in range(self.frames, len(frames) + 1, self.frames):
            query = q[:, (end - self.frames) * self.tokens : end * self.tokens]
            out.append(self.attention(query, list(range(end - self.frames, end)), frames[:end], list(range(end))))
        return torch.cat(out, 1)


def test_a_recache_of_everything_chunk_after_chunk_is_one_masked_pass():
    loop = Masked(TinyModel(), prompts=Changes(rows_of("recache")))
    torch.testing.assert_close(whole("full", "recache"), loop.roll(LENGTH // 3)[:, :, :LENGTH], atol=1e-4, rtol=1e-4)


def test_the_prompt_of_a_chunk_is_that_of_its_middle():
    """semantics: A change of the prompt."""
    seen = []

    class Watching(TinyModel):
        def velocity(self, x, timestep, attention):
            seen.append(self.context)
            return super().velocity(x, timestep, attention)

    latents_of(make("infinity", "cut", model=Watching()), LENGTH)
    prompts = [seen[5 * chunk + step] for chunk in range(8) for step in range(5)]
    expected = [text(1)] * 15 + [text(2)] * 15 + [text(3)] * 10
    assert all(torch.equal(a, b) for a, b in zip(prompts, expected, strict=True))


@pytest.mark.parametrize("transition", ["recache", "flush"])
def test_a_change_among_given_frames_comes_with_the_first_chunk_after_them(transition, tmp_path):
    """Saved while given frames are still pending, it still comes."""
    given = torch.randn(1, 4, 9, 4, 6, generator=torch.Generator().manual_seed(3))
    rows = [(0, text(1), "cut", 2), (4, text(2), transition, 2)]

    def start(state=None):
        return rollout_of("infinity_rope", TinyModel(), state=state, prompts=plan_of(rows, 3), window_frames=5)

    ours = latents_of(start(), 18, given)
    loop = InfinityRope(TinyModel(), size=9)
    loop.model.set_context(text(1))
    for part in given.split(3, 2):
        loop.clean_pass(part)
        loop.out.append(part)
        loop.start += 3
    loop.prompts = Changes(rows)
    torch.testing.assert_close(ours, loop.roll(3), atol=1e-4, rtol=1e-4)
    first = start()
    kept = [next(first.chunks(18, given)).latents]
    state = load_state(save_state(first.snapshot(), tmp_path / "state.safetensors"))
    kept.append(latents_of(start(state), 18))
    assert torch.equal(torch.cat(kept, 2), ours)
