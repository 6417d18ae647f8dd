"""The anchor nodes: the core's policies by their own numbers, their refusals, and times in seconds of video."""

from __future__ import annotations

import json

import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from conftest import NODES


def test_the_anchor_nodes_are_the_cores_policies(node):
    expected = {
        "AdaStateAnchorNone": ({}, {"kind": "none"}),
        "AdaStateAnchorStatic": ({"sink_frames": 2}, {"kind": "static", "sink_frames": 2}),
        "AdaStateAnchorEMA": ({"sink_frames": 2, "decay": 0.5}, {"kind": "ema", "sink_frames": 2, "decay": 0.5}),
        "AdaStateAnchorMemory": (
            {"sink_frames": 2, "long_rate": 0.02, "short_rate": 0.3},
            {"kind": "memory", "sink_frames": 2, "long_rate": 0.02, "short_rate": 0.3},
        ),
        "AdaStateAnchorReplay": ({"first_frames": 9}, {"kind": "replay", "first_frames": 9}),
        "AdaStateAnchorAdaptive": (
            {"state_frames": 2, "state_after_past": True, "strength": 0.5, "freeze_seconds": 2.5, "reset_seconds": 0.1},
            {
                "kind": "adaptive", "state_frames": 2, "state_after_past": True, "strength": 0.5, "freeze_frame": 10,
                "reset_frames": 1,
            },
        ),
    }  # fmt: skip
    assert set(expected) <= {name for name in NODES if name.startswith("AdaStateAnchor")}
    for name, (inputs, description) in expected.items():
        assert node(name)(**inputs).args[0].describe() == description
    assert node("AdaStateAnchorAdaptive")(state_frames=1).args[0] == AnchorAdaptive(1)
    assert node("AdaStateAnchorMemory")(sink_frames=3).args[0].describe()["long_rate"] == 0.01


def test_an_adaptive_anchor_frozen_and_reset_in_a_rollout(node, rollout):
    """What the state does at a time shows from the next chunk on, and not before."""
    adaptive = node("AdaStateAnchorAdaptive")
    plain = rollout(anchor=adaptive(state_frames=1).args[0], length=57).args[0]["samples"]
    frozen = rollout(anchor=adaptive(state_frames=1, freeze_seconds=1.5).args[0], length=57).args[0]["samples"]
    reset = rollout(anchor=adaptive(state_frames=1, reset_seconds=2.0).args[0], length=57).args[0]["samples"]
    for other, first in ((frozen, 9), (reset, 9)):  # 1.5 s: latent frame 6; 2 s: frame 8; chunks of 3
        assert torch.equal(plain[:, :, :first], other[:, :, :first])
        assert not torch.equal(plain[:, :, first : first + 3], other[:, :, first : first + 3])


def test_bad_numbers(node):
    assert "short_rate is 2.0" in node("AdaStateAnchorMemory").validate(sink_frames=3, short_rate=2.0)
    assert "first_frames is 0" in node("AdaStateAnchorReplay").validate(first_frames=0)
    adaptive = node("AdaStateAnchorAdaptive").validate
    assert "strength is 0" in adaptive(state_frames=1, strength=0)
    assert "freeze_seconds is -1.0; it must be between 0 and 86400" in adaptive(state_frames=1, freeze_seconds=-1.0)
    assert "reset_seconds is nan; it must be a number between 0 and 86400" in adaptive(
        state_frames=1, reset_seconds=float("nan")
    )
    assert adaptive(state_frames=None, strength=None, freeze_seconds=None, reset_seconds=None) is True
    assert adaptive(state_frames=1) is True


@pytest.fixture
def stream(vae, node):
    settings = {"filename_prefix": "a/v", "codec": "h264", "quality": 30, "preview": False}
    return lambda fps: node("AdaStateStreamOutput")(vae=vae, fps=fps, **settings).args[0]


@pytest.mark.parametrize(
    ("fps", "freeze", "reset"), [(16.0, 6, 8), (24.0, 9, 12), (8.0, 3, 4), (29.97, 11, 15), (1.0, 1, 1)]
)
def test_seconds_are_those_of_the_stream(node, rollout, stream, fps, freeze, reset):
    """As a prompt timeline's: seconds x fps / 4 latent frames, at least one."""
    timed = node("AdaStateAnchorAdaptive")(state_frames=1, freeze_seconds=1.5, reset_seconds=2.0).args[0]
    report = json.loads(rollout(anchor=timed, stream=stream(fps), length=13).args[2])
    assert report["settings"]["anchor"] == AnchorAdaptive(1, False, 1.0, freeze, reset).describe()
    assert not [warning for warning in report["warnings"] if "anchor's seconds" in warning]


def test_seconds_act_where_the_prompts_of_that_second_do(node, rollout, stream):
    """At 24 frames a second 1.5 s are latent frame 9, and the bits are those of a state frozen there."""
    timed = node("AdaStateAnchorAdaptive")(state_frames=1, freeze_seconds=1.5).args[0]
    for fps, frame in ((24.0, 9), (16.0, 6)):
        frozen = rollout(anchor=AnchorAdaptive(1, freeze_frame=frame), length=57).args[0]["samples"]
        assert torch.equal(rollout(anchor=timed, stream=stream(fps), length=57).args[0]["samples"], frozen)
    assert torch.equal(rollout(anchor=timed, length=57).args[0]["samples"], frozen)


def test_a_state_of_before_goes_on_with_its_frames(node, rollout, stream):
    """A pack before counted 16 frames a second whatever the stream's fps."""
    timed = node("AdaStateAnchorAdaptive")(state_frames=1, freeze_seconds=1.5).args[0]
    old = AnchorAdaptive(1, freeze_frame=6)
    state = rollout(anchor=old, length=33).args[1]
    expected = rollout(anchor=old, length=57, resume=state).args[0]["samples"]
    out = rollout(anchor=timed, stream=stream(24.0), length=57, resume=state)
    assert torch.equal(out.args[0]["samples"], expected)
    told = "the state counts its anchor's seconds at 16 fps, not at this video's 24, and goes on so"
    assert told in json.loads(out.args[2])["warnings"]
    now = rollout(anchor=timed, stream=stream(24.0), length=33).args[1]
    out = rollout(anchor=timed, stream=stream(24.0), length=57, resume=now)
    assert told not in json.loads(out.args[2])["warnings"]
    with pytest.raises(ValueError, match="this state belongs to another rollout: anchor is"):
        rollout(anchor=AnchorAdaptive(1, freeze_frame=7), stream=stream(24.0), length=57, resume=now)
