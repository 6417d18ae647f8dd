"""Every preset rolls out as its system's own loop does, is a prefix of itself, goes on from files, and holds its bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from slow_changes import Adaptive
from slow_rollout import gaussian, rotate
from slow_systems import (
    SYSTEMS,
    InfinityRope,
    LongLive,
    MemRope,
    RewardForcing,
    RollingForcing,
    RollingSink,
    SelfForcing,
    Turner,
)
from systems_fast import latents_of, rollout_of, spec_of
from tiny_model import TinyModel
from tiny_talking import TinyTalking

from adastate_core.anchors import AnchorAdaptive, AnchorEMA, AnchorReplay
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights.presets import PRESETS

# latent frames, well past what the cache holds; a second restart of CausVid, a second turn of Rolling Sink
# Rolling Forcing as states of before have it
BEFORE = dict(window_frames=3, shares_window=False)
LENGTHS = {
    "longlive2_5b": 48,
    "longlive2_5b_2step": 48,
    "causvid": 42,
    "rolling_sink": 48,
    "self_forcing": 30,
    "causal_forcing": 27,
    "krea_14b": 27,
}
NEAR = dict(atol=1e-4, rtol=1e-4)


@cache
def fast(name):
    return latents_of(rollout_of(name, TinyTalking()), LENGTHS.get(name, 24))


def slow(loop, length, **numbers):
    loop = loop(TinyModel(), **numbers)
    return loop.roll(-(-length // loop.frames))


def assert_frames_equal(ours, theirs):
    assert ours.shape == theirs.shape
    for frame in range(ours.shape[2]):
        torch.testing.assert_close(ours[:, :, frame], theirs[:, :, frame], msg=lambda m, f=frame: f"{f}: {m}", **NEAR)


def test_the_slow_rotation_is_the_other_slow_rotation():
    x = torch.randn(1, 6, 2, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Turner(12, 2, 3)(x, [37]).float(), rotate(x, 37, 2, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in ("krea_14b", "rolling_forcing")])
def test_a_preset_is_its_systems_loop(name):
    """semantics: Anchors. semantics: Chunks denoised together. semantics: Restarts."""
    ours = fast(name)
    loop = SYSTEMS[name]
    assert_frames_equal(ours, slow(loop, ours.shape[2]))


SMALLER = [
    ("self_forcing", SelfForcing, dict(window_frames=6), dict(size=9)),
    ("longlive", LongLive, dict(window_frames=3), dict(size=9)),
    ("reward_forcing", RewardForcing, dict(window_frames=6, anchor=AnchorEMA(3, 0.4)), dict(size=12, decay=0.4)),
    ("memrope", MemRope, dict(window_frames=3), dict(size=9)),
    ("infinity_rope", InfinityRope, dict(window_frames=5), dict(size=9)),
    ("longlive", LongLive, dict(chunk_frames=1, window_frames=2), dict(frames=1, size=6)),
    ("reward_forcing", RewardForcing, dict(chunk_frames=1), dict(frames=1, size=7)),
    ("memrope", MemRope, dict(chunk_frames=1), dict(frames=1, size=8)),
    ("infinity_rope", InfinityRope, dict(chunk_frames=1), dict(frames=1, size=4)),
]


@pytest.mark.parametrize(("name", "loop", "changed", "numbers"), SMALLER, ids=[row[0] for row in SMALLER])
def test_other_windows_are_that_loop_with_other_sizes(name, loop, changed, numbers):
    length = 8 * numbers.get("frames", 3)
    ours = latents_of(rollout_of(name, TinyModel(), batch=2, **changed), length)
    assert_frames_equal(ours, slow(loop, length, batch=2, **numbers))


ADAPTIVE = {
    "strength": dict(strength=0.3),
    "freeze": dict(freeze_frame=7),
    "reset": dict(reset_frames=6),
    "reset inside a chunk": dict(reset_frames=7),
    "all": dict(strength=0.6, freeze_frame=13, reset_frames=10),
    "frozen after a reset": dict(freeze_frame=6, reset_frames=12),
}


@pytest.mark.parametrize(("F", "positions"), [(3, "packed"), (1, "fixed")])
@pytest.mark.parametrize("numbers", ADAPTIVE.values(), ids=ADAPTIVE)
def test_the_adaptive_anchors_numbers(numbers, F, positions, tmp_path):
    """A state that moves part of the way, is frozen, is emptied: against its rule, and from a file at every chunk."""
    S, W = 2, 2 * F
    changed = dict(chunk_frames=F, window_frames=W, anchor=AnchorAdaptive(S, **numbers), positions=positions)
    length = 21 if F == 3 else 15
    whole = latents_of(rollout_of("causvid", TinyModel(), restart_frames=0, overlap_frames=0, **changed), length)
    theirs = slow(Adaptive, length, frames=F, S=S, W=W, fixed=positions == "fixed", **numbers)
    assert_frames_equal(whole, theirs)

    def make(state):
        return rollout_of("causvid", TinyModel(), state=state, restart_frames=0, overlap_frames=0, **changed)

    assert torch.equal(in_pieces(make, [3, *range(6, length + 1, F)], tmp_path), whole)


@pytest.mark.parametrize("length", [9, 24])
def test_chunks_that_read_a_small_window_whole(length):
    """As states of before go on: every pass reads anchor and window. Shorter than the window of 5 blocks, and longer."""
    model = TinyModel()
    ours = latents_of(rollout_of("rolling_forcing", model, ending="as published", **BEFORE), length)
    assert model.calls == length // 3 + 4 + length // 3
    assert_frames_equal(ours, slow(RollingForcing, length))
    ours = latents_of(rollout_of("rolling_forcing", TinyModel(), **BEFORE), length)
    assert_frames_equal(ours, slow(RollingForcing, length + 12)[:, :, :length])


def in_pieces(make, lengths, folder):
    """Latents of a rollout that is saved to a file, read and gone on with at every one of `lengths`."""
    state, parts = None, []
    for length in lengths:
        rollout = make(state)
        parts.append(latents_of(rollout, length))
        state = load_state(save_state(rollout.snapshot(), folder / "state.safetensors"))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_on_from_files_bit_for_bit(name, tmp_path):
    """At chunk boundaries and with latents pending: every piece is an exact prefix of the uninterrupted rollout."""
    whole = fast(name)
    lengths = [3, 7, 9, 12, 15, 16, 18, 21, 22, *range(24, whole.shape[2] + 1, 3)]
    pieces = in_pieces(lambda state: rollout_of(name, TinyTalking(), state=state), lengths, tmp_path)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_the_bytes_that_were_planned(name):
    model = TinyTalking()
    spec = spec_of(name, model, batch=2, dtype=torch.bfloat16)
    plan = spec.plan()
    rollout = rollout_of(name, model, batch=2, dtype=torch.bfloat16)
    others = ("text_kv", "absorption", "vae_cache", "rope_tables", "working")
    planned = {key: size for key, size in plan.bytes().items() if key not in others}
    allocated = dict.fromkeys(planned, 0)
    caches, reference = rollout.past.caches, rollout.past.reference
    for layer in (layer for one in caches for layer in one.layers):
        for key, size in layer.bytes().items():
            allocated[key] += size
    if reference is not None:
        allocated["reference"] = reference.nbytes
    assert allocated == planned
    layers = (layer for one in caches for layer in one)
    tensors = {id(t): t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)}
    assert sum(tensors.values()) == plan.kv_bytes == sum(one.nbytes for one in caches)


def test_rolling_sink_of_two_videos_and_short_windows_and_given_frames(tmp_path):
    """B = 2 with a smaller store and window, after one given frame, against the rule written on indices of the video."""
    given = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    changed = dict(batch=2, window_frames=6, anchor=AnchorReplay(9), chunk_frames=1)

    class OneFrame(RollingSink):
        frames, size = 1, 7

        def attend(self, layer, q, k, v):
            out = SelfForcing.attend(self, layer, q, k, v)
            if self.clean and self.start < 9:
                self.original[layer] += self.cache[layer][-1:]
            elif self.clean:
                sweep, place = divmod(self.start - 9, 8)
                source = self.original[layer][place if sweep % 2 else 7 - place]
                self.cache[layer][-2] = replace(source, index=self.start - 1)
            return out

    loop = OneFrame(TinyModel(), batch=2)
    loop.clean_pass(given)
    loop.out, loop.start = [given], 1
    theirs = loop.roll(28)
    rollout = rollout_of("rolling_sink", TinyModel(), **changed)
    ours = latents_of(rollout, 14, given)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    rest = latents_of(rollout_of("rolling_sink", TinyModel(), state=state, **changed), 29)
    assert_frames_equal(torch.cat([ours, rest], 2), theirs)


@pytest.mark.parametrize("name", ["memrope", "rolling_forcing", "causvid"])
def test_given_frames_come_first(name, tmp_path):
    """Clean passes of 3 frames, whatever follows; saved while given frames are still pending."""
    given = torch.randn(1, 4, 6, 4, 6, generator=torch.Generator().manual_seed(3))
    rollout = rollout_of(name, TinyModel())
    ours = latents_of(rollout, 24, given)
    assert torch.equal(ours[:, :, :6], given)
    loop = SYSTEMS[name](TinyModel())
    for part in given.split(3, 2):
        loop.clean_pass(part)
        loop.out.append(part)
        loop.start += 3
    if name != "rolling_forcing":
        assert_frames_equal(ours, loop.roll(6))
    first = rollout_of(name, TinyModel())
    kept = [next(first.chunks(24, given)).latents]
    state = load_state(save_state(first.snapshot(), tmp_path / "state.safetensors"))
    kept.append(latents_of(rollout_of(name, TinyModel(), state=state), 24))
    assert torch.equal(torch.cat(kept, 2), ours)


def shifted(state, frames, sink):
    """The state as if everything behind its first `sink` frames had come `frames` later; keys stay rotated where they are."""
    layers = tuple(
        replace(layer, frames=tuple(f if f < sink else f + frames for f in layer.frames)) for layer in state.cache
    )
    return replace(state, next_frame=state.next_frame + frames, emitted=state.emitted + frames, cache=layers)


@pytest.mark.parametrize(
    ("name", "loop", "changed", "numbers"),
    [
        ("longlive", LongLive, {}, {}),
        ("self_forcing", SelfForcing, dict(chunk_frames=1, window_frames=1), dict(frames=1, size=2)),
    ],
)
def test_absolute_positions_far_into_a_video(name, loop, changed, numbers):
    """Latent frames beyond 1024, where published tables of angles end: rotation in float64 at the frame's own index."""
    far, begin = 4000, 12
    rollout = rollout_of(name, TinyModel(), **changed)
    latents_of(rollout, begin)
    ours = rollout_of(name, TinyModel(), state=shifted(rollout.snapshot(), far, 3), **changed)
    theirs = loop(TinyModel(), **numbers)
    theirs.roll(begin // theirs.frames)
    for layer in theirs.cache:
        for held in layer:
            held.index += far if held.index >= 3 else 0
    theirs.start, theirs.end = begin + far, [begin + far] * 2
    ours = latents_of(ours, begin + far + 9)
    assert_frames_equal(ours, theirs.roll(9 // theirs.frames)[:, :, begin:])
    if name == "longlive":  # its sink is left behind
        assert not torch.allclose(ours, latents_of(rollout, begin + 9), atol=1e-3)


def test_noise_is_the_packs():
    """The slow loops start from what the first pass of the rollout really sees."""
    seen = []

    class Watching(TinyModel):
        def velocity(self, x, timestep, attention):
            seen.append((x, timestep))
            return super().velocity(x, timestep, attention)

    latents_of(rollout_of("causvid", Watching()), 3)
    assert torch.equal(seen[0][0], gaussian(7, 0, 0, (1, 4, 3, 4, 6)))
    assert [timestep for _, timestep in seen] == [1000.0, 757.0, 522.0, 0.0]
