"""The rollout against its slow twin, and the invariants of docs/semantics.md."""

from __future__ import annotations

import itertools

import pytest
import torch
from slow_rollout import SlowAttention, slow_rollout
from tiny_model import TinyModel

from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_core.cache.rotated import RotatedSpec as LayerPlan
from adastate_core.rollout import NonFiniteError, Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state

H, W_PIXELS = 4, 6
SCHEDULE = Schedule.shifted(2, 5.0)


def spec_for(net, *, batch=1, F=3, W=3, anchor=None, positions="packed", dtype=torch.float32, **more):
    return RolloutSpec(
        geometry=net.geometry, batch=batch, height=H, width=W_PIXELS, chunk_frames=F, window_frames=W,
        anchor=anchor or Anchor(), positions=positions, dtype=dtype, **more,
    )  # fmt: skip


def roll(model, spec, length, *, seed=7, state=None, given=None, keep=False):
    rollout = Rollout(model, spec, Settings(seed, SCHEDULE), state=state, keep_latents=keep)
    chunks = list(rollout.chunks(length, given))
    return torch.cat([c.latents for c in chunks], 2), rollout, chunks


ANCHORS = {
    "none": Anchor(),
    "static1": AnchorStatic(1),
    "static3": AnchorStatic(3),
    "static4": AnchorStatic(4),
    "ema3": AnchorEMA(3, 0.6),
    "ema2": AnchorEMA(2, 0.9),
    "adaptive1": AnchorAdaptive(1),
    "adaptive2": AnchorAdaptive(2),
    "adaptive2behind": AnchorAdaptive(2, state_after_past=True),
}


def slow_numbers(anchor):
    kind = anchor.kind
    return {
        "anchor": kind,
        "A": anchor.frames,
        "S": anchor.state_frames,
        "decay": getattr(anchor, "decay", 0.999),
        "after_past": anchor.state_after_past,
    }


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS.keys())
@pytest.mark.parametrize("positions", ["packed", "fixed", "absolute"])
@pytest.mark.parametrize(("F", "W"), [(3, 3), (3, 6), (3, 7), (1, 2), (2, 0), (3, 1), (3, 100)])
@pytest.mark.sampled(2)
def test_equals_the_slow_rollout(anchor, positions, F, W):
    """semantics: Anchors."""
    if positions == "absolute" and anchor.relative_only:
        pytest.skip("refused: tested in test_refusals")
    model = TinyModel()
    spec = spec_for(model, batch=2, F=F, W=W, anchor=anchor, positions=positions)
    fast, _, chunks = roll(model, spec, 14)
    slow = slow_rollout(
        model, batch=2, h=H, w=W_PIXELS, F=F, W=W, seed=7, sigmas=SCHEDULE.sigmas, length=14, mode=positions,
        **slow_numbers(anchor),
    )  # fmt: skip
    torch.testing.assert_close(fast, slow["latents"][:, :, :14], atol=2e-5, rtol=2e-5)
    if anchor.state_frames:
        for chunk, hidden in zip(chunks, slow["hidden"], strict=True):
            torch.testing.assert_close(chunk.hidden, hidden, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS.keys())
@pytest.mark.parametrize("frames", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("positions", ["packed", "fixed"])
@pytest.mark.sampled(2)
def test_given_frames_equal_the_slow_rollout(anchor, frames, positions):
    model = TinyModel()
    given = torch.randn(1, 4, frames, H, W_PIXELS, generator=torch.Generator().manual_seed(3))
    for W in (3, 5):
        spec = spec_for(model, anchor=anchor, W=W, positions=positions)
        fast, rollout, _ = roll(model, spec, frames + 7, given=given)
        slow = slow_rollout(
            model, batch=1, h=H, w=W_PIXELS, F=3, W=W, seed=7, sigmas=SCHEDULE.sigmas, length=frames + 7, given=given,
            mode=positions, **slow_numbers(anchor),
        )  # fmt: skip
        torch.testing.assert_close(fast, slow["latents"][:, :, : frames + 7], atol=2e-5, rtol=2e-5)
        assert torch.equal(fast[:, :, :frames], given)
        assert [slot.frame for slot in rollout.cache.layers[0].window.values()] == slow["window"]


class MaskedAttention(SlowAttention):
    """One pass over all frames: frame i sees frame j if j's chunk is not later."""

    def __init__(self, heads, rows, columns, frames, chunk):
        super().__init__(heads, rows, columns)
        self.positions = [float(i) for i in range(frames)]
        block = (torch.arange(frames) // chunk).repeat_interleave(rows * columns)
        self.mask = block[:, None] >= block[None, :]

    def attend(self, layer, q, k, v):
        q, k = self._turn(q, self.positions), self._turn(k, self.positions)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.mask, float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.unflatten(-1, (self.heads, -1))).flatten(2)


@pytest.mark.quick
@pytest.mark.parametrize("positions", ["packed", "absolute"])
def test_a_window_over_everything_is_one_masked_pass(positions):
    """With W >= T and no anchor the clean passes are one block-causal pass over the whole video."""
    model = TinyModel()
    outputs = []

    class Recorder(TinyModel):
        def velocity(self, x, timestep, attention):
            v = super().velocity(x, timestep, attention)
            if timestep == 0.0:
                outputs.append(v)
            return v

    spec = spec_for(model, W=12, positions=positions)
    latents, _, _ = roll(Recorder(), spec, 12)
    whole = model.velocity(latents, 0.0, MaskedAttention(2, H // 2, W_PIXELS // 2, 12, 3))
    torch.testing.assert_close(torch.cat(outputs, 2), whole, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.sampled(2)
def test_going_on_from_a_file_gives_the_same_bits(anchor, dtype, tmp_path):
    """semantics: Going on from a state."""
    model = TinyModel()
    for F, W in ((3, 3), (3, 7), (2, 1)):
        spec = spec_for(model, F=F, W=W, anchor=anchor, dtype=dtype)
        whole, _, _ = roll(model, spec, 25)
        for cut in (1, 5, 6, 13):
            first, rollout, _ = roll(model, spec, cut)
            state = rollout.snapshot()
            path = save_state(state, tmp_path / f"{F}-{cut}.safetensors")
            rest, _, _ = roll(model, spec, 25, state=load_state(path))
            assert torch.equal(torch.cat([first, rest], 2), whole), (F, W, cut)


def test_going_on_leaves_the_state_as_it_was():
    model = TinyModel()
    spec = spec_for(model, W=6, anchor=AnchorEMA(3, 0.5))
    _, rollout, _ = roll(model, spec, 13)
    state = rollout.snapshot()
    before = [t.clone() for layer in state.cache for t in layer.tensors.values()] + [state.pending.clone()]
    first, _, _ = roll(model, spec, 30, state=state)
    second, _, _ = roll(model, spec, 30, state=state)
    after = [t for layer in state.cache for t in layer.tensors.values()] + [state.pending]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(first, second)


def test_a_shorter_video_is_a_prefix():
    """semantics: Lengths."""
    model = TinyModel()
    spec = spec_for(model, anchor=AnchorAdaptive(1))
    long, _, _ = roll(model, spec, 13)
    for length in range(1, 13):
        short, rollout, _ = roll(model, spec, length)
        assert short.shape[2] == length
        assert torch.equal(short, long[:, :, :length])
        assert rollout.snapshot().pending.shape[2] == -length % 3


def test_kept_latents_are_all_since_frame_0():
    model = TinyModel()
    spec = spec_for(model)
    first, rollout, _ = roll(model, spec, 7, keep=True)
    state = rollout.snapshot()
    rest, rollout, _ = roll(model, spec, 12, state=state, keep=True)
    assert torch.equal(rollout.kept_latents, torch.cat([first, rest], 2))


@pytest.mark.parametrize("kind", [Exception, BaseException])  # hosts interrupt with either
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("anchor", [ANCHORS["none"], ANCHORS["adaptive1"], ANCHORS["ema3"]], ids=lambda a: a.kind)
def test_an_interrupt_at_any_step_leaves_the_last_whole_chunk(step, anchor, kind, tmp_path):
    """semantics: What an interrupt leaves."""
    model = TinyModel()
    spec = spec_for(model, anchor=anchor)
    whole, _, _ = roll(model, spec, 15)

    class Interrupt(kind):
        pass

    def stop(chunk, now, steps, x0):
        if (chunk, now) == (3, step):
            raise Interrupt

    rollout = Rollout(model, spec, Settings(7, SCHEDULE), on_step=stop)
    kept = []
    with pytest.raises(Interrupt):
        for chunk in rollout.chunks(15):
            kept.append(chunk.latents)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    rest, _, _ = roll(model, spec, 15, state=state)
    assert torch.equal(torch.cat([*kept, rest], 2), whole)


@pytest.mark.quick
@pytest.mark.parametrize("bad", ["noisy", "clean"])
def test_nan_ends_the_rollout_and_keeps_what_came_before(bad):
    class Broken(TinyModel):
        def velocity(self, x, timestep, attention):
            v = super().velocity(x, timestep, attention)
            broken = self.calls > 7 and (timestep == 0.0) == (bad == "clean")
            return v * float("nan") if broken else v

    healthy, _, _ = roll(TinyModel(), spec_for(TinyModel()), 12)
    model = Broken()
    rollout = Rollout(model, spec_for(model), Settings(7, SCHEDULE))
    kept = []
    with pytest.raises(NonFiniteError, match="chunk 2"):
        for chunk in rollout.chunks(12):
            kept.append(chunk.latents)
    kept = torch.cat(kept, 2)
    assert torch.equal(kept, healthy[:, :, :6])
    state = rollout.snapshot()
    rest, _, _ = roll(TinyModel(), spec_for(TinyModel()), 12, state=state)
    assert torch.equal(torch.cat([kept, rest], 2), healthy)


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS.keys())
@pytest.mark.parametrize(("F", "W"), [(3, 3), (3, 9), (1, 0)])
def test_bytes_are_what_the_plan_said(anchor, F, W):
    """semantics: Memory."""
    model = TinyModel()
    spec = spec_for(model, batch=2, F=F, W=W, anchor=anchor, dtype=torch.bfloat16)
    planned = spec.plan()
    rollout = Rollout(model, spec, Settings(0, SCHEDULE))
    pointers = [layer.k.data_ptr() for layer in rollout.cache]
    sizes = [rollout.cache.nbytes for _ in rollout.chunks(20)]
    assert set(sizes) == {planned.kv_bytes}
    assert pointers == [layer.k.data_ptr() for layer in rollout.cache]
    frame = 2 * 6 * 24 * 2
    assert planned.bytes()["current"] == 2 * 2 * (anchor.state_frames + F) * frame
    assert planned.bytes()["k"] == planned.bytes()["v"] == 2 * (anchor.frames + W) * frame


def test_the_plan_of_the_1_3b_holds_at_most_8_frames():
    """semantics: Memory."""
    model = TinyModel(layers=30, heads=1)
    geometry = model.geometry.__class__(channels=16, layers=30, heads=12, head_dim=128)
    spec = RolloutSpec(geometry, 1, 60, 104, 3, 3, AnchorAdaptive(1), "packed", torch.bfloat16)
    frame = 2 * 1560 * 1536 * 30 * 2
    assert abs(frame / 2**20 - 274.2) < 0.1
    assert spec.plan().kv_bytes == 8 * frame


@pytest.mark.quick
def test_layers_may_have_plans_of_their_own():
    """A layer with a shorter window sees fewer frames, at the positions they have in the full layers."""
    model = TinyModel()
    full, short = LayerPlan.of(Anchor(), 6, 3, "packed"), LayerPlan.of(Anchor(), 2, 3, "packed")
    same, _, _ = roll(model, spec_for(model, W=6, layers=(full, full)), 12)
    plain, _, _ = roll(model, spec_for(model, W=6), 12)
    assert torch.equal(same, plain)
    spec = spec_for(model, W=6, layers=(full, short))
    mixed, rollout, _ = roll(model, spec, 12)
    assert [len(layer.window) for layer in rollout.cache] == [6, 2]
    assert rollout.cache.nbytes == spec.plan().kv_bytes
    positions = [{slot.frame: slot.position for slot in layer.window.values()} for layer in rollout.cache]
    assert len(positions[1]) == 2 and positions[1].items() <= positions[0].items()
    assert not torch.equal(mixed, plain)
    more, _, _ = roll(model, spec, 15, state=rollout.snapshot())
    whole, _, _ = roll(model, spec, 15)
    assert torch.equal(torch.cat([mixed, more], 2), whole)


def test_noise_depends_on_seed_chunk_and_step_only():
    model = TinyModel()
    a, _, _ = roll(model, spec_for(model), 6)
    b, _, _ = roll(model, spec_for(model, anchor=AnchorStatic(3)), 6)
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    c, _, _ = roll(model, spec_for(model), 6, seed=8)
    assert not torch.equal(a, c)


def test_far_frames_stay_apart_in_bfloat16():
    """Absolute positions beyond 256: ids made in bfloat16 would rotate frames 300 and 301 alike."""
    from adastate_core.rope import Rope

    rope = Rope(12, 2, 3)
    x = torch.ones(1, 12, 2, 12, dtype=torch.bfloat16)
    turned = rope.rotate(x, rope.turn(None, [300, 301]))
    assert not torch.equal(turned[:, :6], turned[:, 6:])


def test_relative_positions_do_not_see_the_offset():
    model = TinyModel()
    packed, _, _ = roll(model, spec_for(model, W=6), 18)
    absolute, _, _ = roll(model, spec_for(model, W=6, positions="absolute"), 18)
    torch.testing.assert_close(packed, absolute, atol=1e-4, rtol=1e-4)


REFUSALS = [
    ({"F": 0}, "chunk_frames is 0"),
    ({"W": -1}, "window_frames is -1"),
    ({"batch": 0}, "batch is 0"),
    ({"positions": "nowhere"}, "positions is 'nowhere'"),
    ({"positions": "absolute", "anchor": AnchorAdaptive(1)}, "adaptive anchor"),
    ({"positions": "absolute", "anchor": AnchorEMA(3)}, "ema anchor"),
]


@pytest.mark.parametrize(("numbers", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(numbers, message):
    with pytest.raises(ValueError, match=message):
        spec_for(TinyModel(), **numbers)


def test_lengths_and_start_latents_are_checked():
    model = TinyModel()
    _, rollout, _ = roll(model, spec_for(model), 7)
    state = rollout.snapshot()
    with pytest.raises(ValueError, match="holds 7 latent frames and 7 were asked for"):
        roll(model, spec_for(model), 7, state=state)
    with pytest.raises(ValueError, match="takes no start latents"):
        roll(model, spec_for(model), 12, state=state, given=torch.zeros(1, 4, 1, H, W_PIXELS))
    with pytest.raises(ValueError, match="hold 6 latent frames of 6"):
        roll(model, spec_for(model), 6, given=torch.zeros(1, 4, 6, H, W_PIXELS))
    with pytest.raises(ValueError, match="start latents are"):
        roll(model, spec_for(model), 6, given=torch.zeros(1, 3, 1, H, W_PIXELS))


def test_a_state_of_another_rollout_is_refused_naming_each_difference():
    """semantics: Going on from a state."""
    model = TinyModel()
    _, rollout, _ = roll(model, spec_for(model), 6)
    state = rollout.snapshot()
    other = spec_for(model, F=2, W=4, anchor=AnchorStatic(1), positions="fixed", model="another")
    with pytest.raises(ValueError) as refusal:
        roll(model, other, 9, state=state)
    for name in ("chunk_frames", "window_frames", "anchor", "positions", "model"):
        assert name in str(refusal.value)
    assert "batch" not in str(refusal.value)


def test_bad_state_files_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\x00" * 100)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    newer = tmp_path / "newer.safetensors"
    save_file({"x": torch.zeros(1)}, newer, metadata={"format": "adastate.rollout", "version": "99", "state": "{}"})
    empty = tmp_path / "empty.safetensors"
    save_file({"x": torch.zeros(1)}, empty, metadata={"format": "adastate.rollout", "version": "1", "state": "{}"})
    for path, message in [(garbage, "cannot be read"), (foreign, "not a rollout state"), (newer, "format 99")]:
        with pytest.raises(ValueError, match=message):
            load_state(path)
    for path, message in ((empty, "damaged: spec is missing"), (tmp_path / "missing.safetensors", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            load_state(path)


def test_a_damaged_cache_is_refused():
    from dataclasses import replace

    model = TinyModel()
    _, rollout, _ = roll(model, spec_for(model, W=6), 9)
    state = rollout.snapshot()
    layer = state.cache[0]
    damaged = [
        replace(layer, ring_slots=(*layer.ring_slots[:-1], 99)),
        replace(layer, frames=layer.frames[:-1]),
        replace(layer, tensors=layer.tensors | {"keys": layer.tensors["keys"][:, :, :1]}),
        replace(layer, tensors={name: t for name, t in layer.tensors.items() if name != "raw"}),
        replace(layer, anchor_slots=(0,), ring_slots=layer.ring_slots[:-1]),
    ]
    for bad in damaged:
        with pytest.raises(ValueError, match="damaged"):
            roll(model, spec_for(model, W=6), 12, state=replace(state, cache=(bad, *state.cache[1:])))
    with pytest.raises(ValueError, match="holds 1 layers"):
        roll(model, spec_for(model, W=6), 12, state=replace(state, cache=state.cache[:1]))


def test_schedules():
    assert [round(s, 6) for s in Schedule.shifted(4, 5.0).sigmas] == [1.0, 0.9375, 0.833333, 0.625]
    assert Schedule.from_sigmas([1.0, 0.5, 0.0]).sigmas == (1.0, 0.5)
    for bad in ([], [0.0], [0.5, 0.7], [1.2, 0.5], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        with pytest.raises(ValueError):
            Schedule.from_sigmas(bad)
    for steps, shift in itertools.product((0, -1), (5.0,)):
        with pytest.raises(ValueError, match="steps"):
            Schedule.shifted(steps, shift)


@pytest.mark.parametrize("given", [0, 1, 5])
def test_passes_foretell_every_step(given):
    model, seen = TinyModel(), []
    spec = spec_for(model)
    rollout = Rollout(model, spec, Settings(7, SCHEDULE), on_step=lambda *step: seen.append(step))
    expected = rollout.passes(14, given)
    list(rollout.chunks(14, torch.zeros(1, 4, given, H, W_PIXELS) if given else None))
    assert len(seen) == expected
    assert rollout.passes(14) == 0
