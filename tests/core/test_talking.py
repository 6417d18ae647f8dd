"""Rollouts that are driven by sound and show a reference: histories without a clean pass, on the tests' own small model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_talking import EAR_LAYERS, SOUND, TinyTalking, spoken

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import Anchor, AnchorAdaptive
from adastate_core.audio.driving import CHUNK, HOST, DrivingSound
from adastate_core.geometry import ModelGeometry
from adastate_core.history import CLEAN, LAST_LEVEL, OWN_LEVEL
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.reference import FARTHEST, NEAREST, ReferenceRule, reference_tokens, times, token_places
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights.preset_file import preset_from
from adastate_core.weights.presets import PRESETS

GIB = 2**30
STORES = [("model", "gpu"), ("int8", "gpu"), ("fp8", "host memory")]


class TinyTalker(TinyTalking):
    """Counts how often it was shown a reference."""

    shown = 0

    def refer(self, *given):
        self.shown += 1
        super().refer(*given)


def sound_of(seconds, alignment=CHUNK):
    return spoken(seconds, fps=25.0, alignment=alignment)


def picture_of(batch=1, seed=6):
    return torch.randn(batch, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def spec_of(model=None, batch=1, history=OWN_LEVEL, **changed):
    numbers = dict(
        batch=batch, height=8, width=8, chunk_frames=3, window_frames=9, anchor=Anchor(), positions="absolute",
        dtype=torch.float32, history=history, windows=3 if history == OWN_LEVEL else 1, reference=ReferenceRule(12, True),
    )  # fmt: skip
    return RolloutSpec((model or TinyTalker()).geometry, **numbers | changed)


def rollout_of(model=None, state=None, sound=None, batch=1, prompts=None, on_step=None, picture=None, **changed):
    model = model or TinyTalker()
    schedule = replace(Schedule.shifted(3, 5.0), sampler="euler")
    settings = Settings(7, schedule, sound=sound or sound_of(2.2))
    spec = spec_of(model, batch, **changed)
    shown = None if state is not None else picture_of(batch) if picture is None else picture
    return Rollout(
        model, spec, settings, state=state, prompts=prompts, on_step=on_step, reference=shown, keep_latents=True
    )


def rolled(rollout, length):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length)], 2)


@pytest.mark.parametrize("history", [OWN_LEVEL, LAST_LEVEL, CLEAN])
@pytest.mark.parametrize(("dtype", "device"), STORES)
def test_bytes_are_what_was_planned(history, dtype, device):
    rollout = rollout_of(history=history, cache_dtype=dtype, cache_device=device)
    plan = rollout.spec.plan()
    rolled(rollout, 15)
    assert rollout.past.peak_nbytes == (plan.kv_bytes, plan.host_bytes)
    assert rollout.past.reference.nbytes == plan.bytes()["reference"]


def test_what_liveavatar_takes_on_the_14b():
    """825 MiB a frame of 704x384 in bf16; 12 frames for each of four steps, and 2.5 of the reference."""
    frame = 2 * 40 * 1056 * 5120 * 2
    spec = RolloutSpec(
        ModelGeometry(16, 40, 40, 128), 1, 48, 88, 3, 9, Anchor(), "absolute", torch.bfloat16, history=OWN_LEVEL, windows=4,
        reference=ReferenceRule(12, True),
    )  # fmt: skip
    plan = spec.plan(512)
    assert frame == 825 * 2**20 and plan.kv_bytes == 48 * frame and round(plan.kv_bytes / GIB, 1) == 38.7
    assert plan.bytes()["reference"] == 2.5 * frame
    one = replace(spec, history=LAST_LEVEL, windows=1).plan(512)
    assert one.kv_bytes == 12 * frame
    host = replace(spec, cache_device="host memory").plan(512)
    assert host.host_bytes == 48 * frame and host.total_bytes < 5 * GIB


def test_the_reference_goes_through_the_model_once_and_once_more_where_it_rolls():
    model = TinyTalker()
    rollout = rollout_of(model)
    rolled(rollout, 12)
    assert model.shown == 1
    rolled(rollout, 21)
    assert model.shown == 2
    assert torch.equal(rollout.snapshot().first, rollout.kept_latents[:, :, :1])
    never = TinyTalker()
    rolled(rollout_of(never, reference=ReferenceRule()), 21)
    assert never.shown == 1


def test_another_picture_or_sound_is_another_video_and_a_chunk_hears_only_itself():
    whole = rolled(rollout_of(), 9)
    other = picture_of(seed=9)
    assert not torch.allclose(rolled(rollout_of(picture=other), 9), whole)
    track = sound_of(2.2).track
    later = tuple(torch.cat([layer[:, :24], layer[:, 24:].flip(1)], 1) for layer in track.layers)  # 12 pictures, 0.48 s
    changed = DrivingSound(replace(track, layers=later), 25.0, CHUNK)
    found = rolled(rollout_of(sound=changed), 9)
    assert torch.equal(found[:, :, :3], whole[:, :, :3]) and not torch.allclose(found[:, :, 3:], whole[:, :, 3:])


@pytest.mark.parametrize("alignment", [HOST, CHUNK])
def test_what_is_heard_does_not_depend_on_where_a_pass_begins(alignment):
    """Latent frame f hears 4f - 8 .. 4f of all the sound; or each pass its own frames alone."""
    model, sound = TinyTalker(), sound_of(2.2, alignment)
    model.hear(sound, 0, 12, 0)
    whole = model._heard[1]
    model.hear(sound, 6, 3, 1)
    part = model._heard[1]
    assert len(part) == 4 and torch.equal(part[0], part[1])
    assert torch.allclose(part[1:], whole[6:9], atol=1e-6) == (alignment == HOST)
    silent = DrivingSound(None, 25.0, alignment).of(torch.ones(EAR_LAYERS), 0, 3, SOUND)
    assert not silent.features.any()


def test_a_reference_that_fails_is_made_again():
    model = TinyTalker()
    rollout = rollout_of(model)
    rolled(rollout, 12)
    refer, failing = model.refer, [True]

    def once(picture, motion, making):
        if failing.pop() if failing else False:
            making.attend(0, *(torch.ones(1, 40, 24) for _ in range(3)))
            raise MemoryError
        refer(picture, motion, making)

    model.refer = once
    with pytest.raises(MemoryError):
        rolled(rollout, 15)
    assert rollout.past.reference.made_of is None
    assert torch.equal(rolled(rollout, 15), rolled(rollout_of(), 15)[:, :, 12:])


def test_a_chunk_is_made_again_and_an_interrupted_one_too():
    whole, steps = rolled(rollout_of(), 18), []

    def stop(chunk, step, count, x0):
        steps.append((chunk, step, count))
        if len(steps) == 8:
            raise InterruptedError

    rollout = rollout_of(on_step=stop)
    with pytest.raises(InterruptedError):
        rolled(rollout, 18)
    assert steps[-1] == (2, 1, 3) and rollout.emitted == 6
    state = rollout.snapshot()
    assert torch.equal(rolled(rollout, 18), whole[:, :, 6:])
    rollout.go_back(state)
    assert torch.equal(rolled(rollout, 18), whole[:, :, 6:])
    assert rollout_of().passes(18) == 6 * 3


def test_where_the_reference_stands():
    rule = ReferenceRule(12, True)
    drawn = [rule.distance(7, chunk, step) for chunk in range(400) for step in range(4)]
    assert set(drawn) == set(range(NEAREST, FARTHEST + 1)) and drawn[:400] == [
        rule.distance(7, chunk, step) for chunk in range(100) for step in range(4)
    ]
    assert ReferenceRule().distance(7, 3, 2) == NEAREST
    assert times(0, 4)[0] == 30 and times(200, 11)[0] == 211 and times(200, 11)[1:] == times(0, 4)[1:]
    which, places = token_places(24, 44)
    assert len(which) == len(places) == reference_tokens(24, 44) == 2.5 * 24 * 44
    largest = places[which == 3].view(6, 11)  # every fourth row and column, the first and the last among them
    assert [int(row) // 44 for row in largest[:, 0]] == [0, 4, 9, 13, 18, 23] and int(largest[0, -1]) == 43


REFUSED = {
    "absorption": (dict(absorption=AbsorptionSettings()), "does not go with absorption, which follows one window"),
    "a hidden state": (dict(anchor=AnchorAdaptive(1), positions="packed"), "the adaptive anchor, whose state a clean pass caches"),
    "chunks together": (dict(blocks=3, windows=3), "3 chunks denoised together"),
    "restarts": (dict(restart_frames=9, overlap_frames=3, positions="packed"), "restarts, which cache frames again"),
    "a past made anew": (dict(remade="newest", positions="packed", window_frames=3), "a past that is made anew"),
    "several windows of one": (dict(history=LAST_LEVEL, windows=2), "only own level has more than one"),
    "a strange history": (dict(history="newest"), "history is 'newest'; it must be one of clean, own level, last level"),
    "small pictures": (dict(height=4, width=4), "with a reference both sides must be at least 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_by_name(name):
    changed, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        spec_of(**changed)


def test_what_a_run_cannot_have_is_refused():
    texts = [torch.randn(1, 3, TinyTalker.TEXT_WIDTH) for _ in range(2)]
    with pytest.raises(ValueError, match="a recache makes the window again by clean passes"):
        rollout_of(prompts=PromptPlan([PromptChange(0, texts[0]), PromptChange(6, texts[1])], 3))
    with pytest.raises(ValueError, match="give the picture as reference"):
        list(rollout_of().chunks(12, torch.zeros(1, 4, 1, 8, 8)))
    with pytest.raises(ValueError, match="needs the latent of a reference"):
        rollout_of(picture=torch.zeros(1, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="there are 2 windows, one for each step, and the schedule has 3 steps"):
        rollout_of(windows=2)
    state = rollout_of().snapshot()
    with pytest.raises(ValueError, match="history is own level in the state and clean here"):
        rollout_of(state=state, history=CLEAN)
    with pytest.raises(ValueError, match="there is a reference in the state and no reference here"):
        rollout_of(state=state, reference=None)
    with pytest.raises(ValueError, match="audio is 'ahead'; it must be one of host, chunk"):
        sound_of(1.0, "ahead")


def test_a_damaged_state_is_told(tmp_path):
    rollout = rollout_of()
    rolled(rollout, 6)
    state = rollout.snapshot()
    for damaged, words in (
        (replace(state, reference=None), "reference"),
        (replace(state, reference=state.reference[:, :, :0]), "reference"),
        (replace(state, cache=state.cache[:-2]), "cache has 4 layers"),
        (replace(state, spec=state.spec | {"windows": 2000}), "windows"),
        (replace(state, spec=state.spec | {"reference": {"rolls_at": -1, "drawn": True}}), "rolls_at"),
    ):
        with pytest.raises(ValueError, match=words):
            load_state(save_state(damaged, tmp_path / "a.safetensors"))


def test_a_preset_of_the_users_own_may_say_what_it_hears():
    table = {
        "name": "mine",
        "driven_by_sound": True,
        "history": LAST_LEVEL,
        "audio": CHUNK,
        "reference_rolls": 6,
        "fps": 24.0,
    }
    one = preset_from(table)
    assert (one.history, one.audio, one.reference_rolls, one.driven_by_sound) == (LAST_LEVEL, CHUNK, 6, True)
    for name, value in (("history", "none"), ("audio", "loud"), ("reference_rolls", -1)):
        with pytest.raises(ValueError, match=f"{name} is "):
            preset_from(table | {name: value})


def test_liveavatars_levels_are_its_schedulers():
    """As diffusers' FlowMatchEulerDiscreteScheduler printed them for 4 steps and shift 3."""
    levels = PRESETS["liveavatar"].schedule.sigmas
    assert levels == pytest.approx((1.0, 0.857692322, 0.602150574, 0.008928572), abs=1e-7)
