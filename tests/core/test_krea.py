"""A past that is made anew before every chunk, against Krea Realtime's published loop (published_loops.py).

semantics: A past that is made anew.
"""

from __future__ import annotations

import pytest
import torch
from published_loops import KreaRealtime
from rounded import error, held_as
from systems_fast import latents_of, rollout_of, spec_of
from test_published import assert_equal, by_the_loop, words, worst
from test_systems import in_pieces
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import AnchorStatic
from adastate_core.geometry import ModelGeometry
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.remade import renewed_frames
from adastate_core.rollout import NonFiniteError, Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights.presets import PRESETS

LENGTH = 18


def encoded(latents, frame):
    """Stands for a VAE: any fixed function of the frame."""
    return torch.tanh(2 * latents[:, :, frame : frame + 1])


class Encoding(Rollout):
    """A rollout whose frames are encoded anew, of all latents that it has made; those of a state are given."""

    def __init__(self, *args, before=None, **more):
        super().__init__(*args, **more)
        self.every = [] if before is None else [before]
        self.asked = []
        self.renewed = self.encode

    def encode(self, frame):
        assert frame in self.renewed_frames
        self.asked.append(frame)
        return encoded(torch.cat(self.every, 2), frame)

    def chunks(self, length, given=None):
        for chunk in super().chunks(length, given):
            self.every.append(chunk.latents)
            yield chunk


def encoding(state=None, before=None, **changed):
    model = TinyModel()
    return Encoding(
        model, spec_of("krea_14b", model, **changed), Settings(7, PRESETS["krea_14b"].schedule), state, before=before
    )


@pytest.mark.parametrize("changed", [dict(), dict(batch=2), dict(window_frames=6), dict(window_frames=4)], ids=str)
def test_a_frame_that_is_encoded_anew(changed):
    rollout = encoding(**changed)
    window, batch = changed.get("window_frames", 3), changed.get("batch", 1)
    ours = latents_of(rollout, LENGTH)
    assert_equal(ours, by_the_loop(KreaRealtime, LENGTH // 3, batch=batch, past=window, encoded=encoded))
    first = {3: 6, 4: 9, 6: 9}[window]
    assert rollout.asked == [frame - window for frame in range(first, LENGTH, 3)]
    assert max(worst(ours, by_the_loop(KreaRealtime, LENGTH // 3, batch=batch, past=window))) > 1e-3


def test_states_go_on_with_frames_that_are_encoded_anew(tmp_path):
    """Also with latents pending: the frame that is asked for left before the stop."""
    whole, state, parts = latents_of(encoding(), LENGTH), None, []
    for length in (3, 5, 6, 9, 11, LENGTH):
        before = torch.cat(parts, 2) if parts else None
        rollout = encoding(state, before)
        parts.append(latents_of(rollout, length))
        state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat(parts, 2), whole)


NUMBERS = {
    "the first frame kept": (dict(remade="first"), dict(keep_first_frame=True)),
    "the first frame alone": (dict(remade="first", window_frames=1), dict(keep_first_frame=True, past=1)),
    "a longer past": (dict(window_frames=6), dict(past=6)),
    "a past that is no whole number of chunks": (dict(window_frames=4), dict(past=4)),
    "frame by frame": (dict(chunk_frames=1, window_frames=2), dict(F=1, past=2)),
}


@pytest.mark.parametrize(("changed", "numbers"), NUMBERS.values(), ids=NUMBERS)
def test_other_numbers_are_the_loop_with_them(changed, numbers, tmp_path):
    frames = numbers.get("F", 3)
    theirs = by_the_loop(KreaRealtime, LENGTH // frames, batch=2, **numbers)
    assert_equal(latents_of(rollout_of("krea_14b", TinyModel(), batch=2, **changed), LENGTH), theirs)
    pieces = in_pieces(
        lambda state: rollout_of("krea_14b", TinyModel(), batch=2, state=state, **changed),
        range(frames, LENGTH + 1, frames),
        tmp_path,
    )
    assert_equal(pieces, theirs)


@pytest.mark.parametrize("frames", [1, 3, 4, 7])
@pytest.mark.parametrize("remade", ["newest", "first"])
def test_given_frames(frames, remade, tmp_path):
    """They take no pass of their own; the first block behind them begins with the first of them, as the server's does."""
    given = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(3))
    theirs = by_the_loop(KreaRealtime, 4, start=given, keep_first_frame=remade == "first")
    ours = rollout_of("krea_14b", TinyModel(), remade=remade)
    assert float((latents_of(ours, frames + 12, given) - theirs).abs().max()) < 1e-4
    first = rollout_of("krea_14b", TinyModel(), remade=remade)
    parts = [next(first.chunks(frames + 12, given)).latents]
    state = load_state(save_state(first.snapshot(), tmp_path / "state.safetensors"))
    parts.append(latents_of(rollout_of("krea_14b", TinyModel(), state=state, remade=remade), frames + 12))
    assert float((torch.cat(parts, 2) - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("transition", ["cut", "recache", "soft"])
def test_words_that_change_behind_the_past(transition):
    """The server passes the past under the words of the block before. A recache passes it under the new ones."""
    plan = PromptPlan([PromptChange(0, words(1)), PromptChange(9, words(2), transition, chunks=2)], 3)
    said = tuple((frame, plan.context(frame)) for frame in range(0, LENGTH, 3))

    def loop(words_first):
        model = TinyModel()
        model.set_context(words(1))
        return KreaRealtime(model, words=said, words_first=words_first).roll(LENGTH // 3)

    ours = latents_of(rollout_of("krea_14b", TinyModel(), prompts=plan), LENGTH)
    assert_equal(ours, loop(transition == "recache"))
    assert max(worst(ours, loop(transition != "recache"))[3:]) > 1e-3


@pytest.mark.parametrize("transition", ["flush", "rope cut"])
def test_other_changes_of_the_words_go_on_from_files(transition, tmp_path):
    def make(state=None):
        plan = PromptPlan([PromptChange(0, words(1)), PromptChange(9, words(2), transition)], 3)
        return rollout_of("krea_14b", TinyModel(), prompts=plan, state=state)

    whole = latents_of(make(), LENGTH)
    assert torch.equal(in_pieces(make, range(3, LENGTH + 1, 3), tmp_path), whole)
    cut = PromptPlan([PromptChange(0, words(1)), PromptChange(9, words(2), "cut")], 3)
    plain = worst(whole, latents_of(rollout_of("krea_14b", TinyModel(), prompts=cut), LENGTH))
    assert max(plain[:3]) == 0 and plain[3] > 1e-3


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_in_8_bits_it_is_the_loop_that_rounds(cache_dtype):
    """By the bound of test_kv_storage.py: not all items of a batch have to agree, for the reason that is given there."""
    theirs = by_the_loop(KreaRealtime, 6, batch=4, hold=held_as(cache_dtype))
    exact = by_the_loop(KreaRealtime, 6, batch=4)
    ours = latents_of(rollout_of("krea_14b", TinyModel(), batch=4, cache_dtype=cache_dtype), LENGTH)
    errors = sorted(error(one, other) for one, other in zip(ours, theirs, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, theirs) / 2, errors
    assert error(exact, theirs) > 2e-4


def test_in_host_memory_it_is_the_same():
    ours = latents_of(rollout_of("krea_14b", TinyModel(), cache_device="host memory"), LENGTH)
    assert torch.equal(ours, latents_of(rollout_of("krea_14b", TinyModel()), LENGTH))


def told(length, given=None, state=None, **changed):
    """(how many passes there were, of which model, what `passes` said)."""
    model, calls = TinyModel(), []
    rollout = rollout_of("krea_14b", model, state=state, on_step=lambda *step: calls.append(step), **changed)
    expected = rollout.passes(length, 0 if given is None else given.shape[2])
    latents_of(rollout, length, given)
    assert len(calls) == model.calls == expected
    assert all(step < steps for _, step, steps, _ in calls)
    return rollout, calls


def test_a_chunk_costs_its_five_passes_and_one_over_the_past():
    rollout, calls = told(12)
    assert [(chunk, step, steps) for chunk, step, steps, _ in calls] == [
        (chunk, step, steps) for chunk, steps in ((0, 5), (1, 6), (2, 6), (3, 6)) for step in range(steps)
    ]
    told(21, state=rollout.snapshot())
    told(21, given=torch.randn(1, 4, 4, 4, 6))
    told(24, window_frames=7)
    told(6, window_frames=0)


@pytest.mark.parametrize("step", range(6))
def test_an_interrupt_at_any_pass_loses_nothing(step, tmp_path):
    """The state is that after the chunk before, whose window is empty; the rollout itself goes on, too."""
    whole = latents_of(rollout_of("krea_14b", TinyModel()), LENGTH)
    at = {"chunk": 3}

    def stop(chunk, now, steps, x0):
        if chunk == at["chunk"] and now == step:
            at["chunk"] = None
            raise KeyboardInterrupt

    rollout, parts = rollout_of("krea_14b", TinyModel(), on_step=stop), []
    with pytest.raises(KeyboardInterrupt):
        for chunk in rollout.chunks(LENGTH):
            parts.append(chunk.latents)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    assert state.next_frame == 9 and state.again == 3 and not any(layer.nbytes for layer in state.cache)
    before = torch.cat(parts, 2)
    for one in (rollout, rollout_of("krea_14b", TinyModel(), state=state)):
        assert torch.equal(torch.cat([before, latents_of(one, LENGTH)], 2), whole)


@pytest.mark.parametrize("step", range(6))
def test_a_model_that_breaks_down_at_any_pass(step):
    class Breaking(TinyModel):
        def velocity(self, x, timestep, attention):
            out = super().velocity(x, timestep, attention)
            return out * float("nan") if self.calls == 5 + 6 + step + 1 else out

    rollout = rollout_of("krea_14b", Breaking())
    with pytest.raises(NonFiniteError, match="chunk 2"):
        latents_of(rollout, LENGTH)
    assert rollout.snapshot().next_frame == 6


def test_an_encoder_that_fails_is_asked_again():
    whole, rollout = latents_of(encoding(), LENGTH), encoding()
    encode, failed = rollout.encode, []

    def failing(frame):
        if frame == 6 and not failed:
            failed.append(frame)
            raise RuntimeError("no memory")
        return encode(frame)

    rollout.renewed = failing
    parts = []
    with pytest.raises(RuntimeError, match="no memory"):
        for chunk in rollout.chunks(LENGTH):
            parts.append(chunk.latents)
    assert torch.equal(torch.cat([*parts, latents_of(rollout, LENGTH)], 2), whole) and failed == [6]


def test_which_frames_will_be_wanted():
    spec = spec_of("krea_14b", TinyModel())
    assert [renewed_frames(spec, 3 * chunk, chunk) for chunk in range(4)] == [(), (), (3,), (6,)]
    longer = spec_of("krea_14b", TinyModel(), window_frames=6)
    assert [renewed_frames(longer, 3 * chunk, chunk) for chunk in range(5)] == [(), (), (3,), (3, 6), (6, 9)]
    assert renewed_frames(spec_of("krea_14b", TinyModel(), remade="first"), 9, 3) == ()


REFUSED = {
    "blocks": (dict(blocks=5), "chunks denoised together"),
    "restarts": (dict(restart_frames=6, overlap_frames=3), "restarts"),
    "an anchor": (dict(anchor=AnchorStatic(3)), "the static anchor"),
    "absorption": (dict(absorption=AbsorptionSettings(warmup_frames=12)), "absorption"),
    "absolute positions": (dict(positions="absolute"), "absolute positions"),
}


@pytest.mark.parametrize(("changed", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it(changed, said):
    with pytest.raises(
        ValueError, match=f"made anew before every chunk does not go with {said}; remove one of the two"
    ):
        spec_of("krea_14b", TinyModel(), **changed)


def test_steps_with_a_past_of_their_own_do_not_go_with_it():
    model = TinyModel()
    with pytest.raises(ValueError, match="steps with a past of their own do not go with a past that is made anew"):
        Rollout(model, spec_of("krea_14b", model), Settings(7, Schedule((1.0, 0.5), kept=(1,))))


def test_states_of_another_rule_are_refused():
    cached = rollout_of("krea_14b", TinyModel(), remade="")
    latents_of(cached, 6)
    with pytest.raises(
        ValueError, match="is cached from chunk to chunk in the state, and the past is made anew before every"
    ):
        rollout_of("krea_14b", TinyModel(), state=cached.snapshot())
    anew = rollout_of("krea_14b", TinyModel())
    latents_of(anew, 6)
    with pytest.raises(
        ValueError, match="made anew before every chunk in the state, and the past is cached from chunk"
    ):
        rollout_of("krea_14b", TinyModel(), state=anew.snapshot(), remade="")


def test_14b_takes_7_gib_of_cache_at_832x480():
    one = PRESETS["krea_14b"]
    spec = RolloutSpec(
        ModelGeometry(16, 40, 40, 128), 1, 60, 104, one.chunk_frames, one.window_frames, one.anchor, one.positions,
        torch.bfloat16, remade=one.remade,
    )  # fmt: skip
    frame = 2 * 2 * 40 * 5120 * 30 * 52  # keys and values in bf16
    assert spec.plan().kv_bytes == 6 * frame and 7.1 < 6 * frame / 2**30 < 7.2
    assert spec.plan(length=1000).kv_bytes == 6 * frame
