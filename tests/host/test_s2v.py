"""Wan 2.2 S2V through the pack: the host's own model by the standard loader, against loops that share no code with it."""
# ruff: noqa: F811  fixtures that are imported

from __future__ import annotations

import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic
from adastate_pack.adastate_core.audio.driving import CHUNK, DrivingSound
from adastate_pack.adastate_core.audio.track import AudioTrack
from adastate_pack.adastate_core.history import CLEAN, LAST_LEVEL, OWN_LEVEL
from adastate_pack.adastate_core.reference import ReferenceRule
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.adastate_core.states.state_file import load_state, save_state
from adastate_pack.nodes.host.speech_model import SpeechModel, model_for
from slow_liveavatar import LiveAvatar, Plain
from slow_s2v import SlowS2V
from talkers import drawn, state, talker  # noqa: F401  fixtures
from tiny_s2v import features

H = W = 8
SEED = 7
LIVE = Schedule((1.0, 0.8576923, 0.60215056, 0.00892857), sampler="euler")


CONTEXT, PICTURE, HEARD = drawn(2, 1, 7, 4096), drawn(3, 1, 16, 1, H, W), features(1.6)


def spec_of(host, batch=1, window=9, anchor=None, positions="absolute", **more):
    more = {"reference": ReferenceRule(12, True), "history": OWN_LEVEL, "windows": 4} | more
    return RolloutSpec(host.geometry, batch, H, W, 3, window, anchor or Anchor(), positions, host.dtype, **more)


def rollout_of(talker, spec=None, batch=1, schedule=LIVE, sound=None, state=None, picture=PICTURE, **more):
    host = model_for(talker, CONTEXT, batch)
    assert isinstance(host, SpeechModel)
    spec = spec or spec_of(host, batch, **more)
    host.load(spec.plan(7))
    sound = sound or DrivingSound(AudioTrack(None, HEARD), 25.0, CHUNK)
    settings = Settings(SEED, schedule, sound=sound)
    reference = None if state is not None or spec.reference is None else picture.expand(batch, -1, -1, -1, -1)
    return Rollout(host, spec, settings, state=state, text_tokens=7, keep_latents=True, reference=reference)


def rolled(rollout, length):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length)], 2)


def slow_of(state, kind, **more):
    slow = SlowS2V(state)
    return kind(slow, CONTEXT, seed=SEED, h=H, w=W, reference=PICTURE, heard=slow.folded(HEARD), **more)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_liveavatar_is_the_slow_loop(talker, state, batch):
    """Beyond the end of the sound, of the window, and of the picture's own time."""
    ours = rolled(rollout_of(talker, batch=batch), 18)
    theirs = slow_of(state, LiveAvatar, batch=batch).roll(6)
    assert float((ours - theirs).abs().max()) < 1e-4


@torch.no_grad()
def test_one_window_for_all_steps_is_the_slow_loops(talker, state):
    ours = rolled(rollout_of(talker, history=LAST_LEVEL, windows=1), 15)
    theirs = slow_of(state, LiveAvatar, one_history=True).roll(5)
    assert float((ours - theirs).abs().max()) < 1e-4


PLAIN = {
    "packed": ("packed", 3, None, {}),
    "absolute": ("absolute", 3, AnchorStatic(3), {"anchor": "static", "A": 3}),
    "a state": ("fixed", 3, AnchorAdaptive(1), {"anchor": "adaptive", "A": 1, "states": 1}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_way_is_the_slow_one(talker, state, name):
    positions, window, anchor, told = PLAIN[name]
    schedule = Schedule.shifted(2, 5.0)
    sound = DrivingSound(AudioTrack(None, HEARD), 16.0)
    more = dict(positions=positions, window=window, anchor=anchor, history=CLEAN, windows=1, reference=ReferenceRule())
    ours = rolled(rollout_of(talker, schedule=schedule, sound=sound, **more), 12)
    told = dict(told)
    slow = slow_of(state, Plain, states=told.pop("states", 0))
    theirs = slow.roll(12, schedule.sigmas, W=window, mode=positions, **told)["latents"]
    assert float((ours - theirs[:, :, :12]).abs().max()) < 1e-4


@torch.no_grad()
def test_a_state_goes_on_to_the_bit(talker, tmp_path):
    """Before the picture rolls, and after it has."""
    whole = rolled(rollout_of(talker), 21)
    for cut in (9, 18):
        first = rollout_of(talker)
        rolled(first, cut)
        state = load_state(save_state(first.snapshot(), tmp_path / f"{cut}.safetensors"))
        second = rollout_of(talker, first.spec, state=state)
        assert torch.equal(rolled(second, 21), whole[:, :, cut:])


@torch.no_grad()
def test_a_chunk_is_made_again_to_the_bit(talker):
    rollout = rollout_of(talker)
    rolled(rollout, 9)
    before = rollout.snapshot()
    first = rolled(rollout, 15)
    rollout.go_back(before)
    assert torch.equal(rolled(rollout, 15), first)


@torch.no_grad()
@pytest.mark.parametrize("device", ["gpu", "host memory"])
@pytest.mark.parametrize("dtype", ["model", "int8"])
def test_what_windows_take_is_what_the_plan_says(talker, dtype, device):
    rollout = rollout_of(talker, cache_dtype=dtype, cache_device=device)
    plan = rollout.spec.plan(7)
    rolled(rollout, 12)
    assert rollout.past.peak_nbytes == (plan.kv_bytes, plan.host_bytes)
    assert rollout.past.reference.nbytes == plan.bytes()["reference"]
