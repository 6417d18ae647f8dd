"""Wan 2.2 S2V through the nodes, on files of the exact format, against the loops of tests/core/slow_liveavatar.py."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorStatic
from adastate_pack.nodes.host import model as adapter
from conftest import HostNode
from slow_liveavatar import LiveAvatar
from slow_s2v import SlowS2V
from test_models import AUTO, latents_of, models, report_of, written  # noqa: F401
from tiny_s2v import SIZES, features, tiny_s2v

SIDE, H, SEED = 64, 8, 5
CHUNKS, SECONDS = 6, 2.4  # the sound ends in the last chunk


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def state():
    return tiny_s2v(*SIZES["one block"])


@pytest.fixture(scope="module")
def talker(state):
    """A MODEL as Load Diffusion Model gives it."""
    return comfy.sd.load_diffusion_model_state_dict(dict(state))


def track(seconds=SECONDS, audio=None, **more):
    layers = features(seconds)
    encoded = {"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": int(16000 * seconds)}
    return HostNode("AdaStateAudio")(encoded=encoded, audio=audio, **more).args[0]


def latent():
    """What somebody's picture is as a LATENT."""
    return {"samples": drawn(3, 1, 16, 1, H, H)}


@pytest.fixture
def made(talker, positive, node):
    """The rollout node on the tiny S2V model, with everything at auto; `preset` "" leaves Model Preset out."""

    def call(length=4 * 3 * CHUNKS - 3, preset="liveavatar", **inputs):
        model = inputs.pop("model", talker)
        model = node("AdaStateModelPreset")(model=model, preset=preset).args[0] if preset else model
        given = {
            "model": model, "positive": positive, "width": SIDE, "height": SIDE, "length": length, "batch_size": 1, "seed": SEED,
            **AUTO, "audio": track(), "reference": latent(),
        }  # fmt: skip
        return node("AdaStateRollout")(**(given | inputs))

    return call


def by_the_loop(state, model, positive, kind=LiveAvatar, seconds=SECONDS, **numbers):
    slow = SlowS2V(state)
    reference = adapter.to_model_space(model, latent()["samples"])
    given = {"heard": slow.folded(features(seconds)), "reference": reference, "seed": SEED, "h": H, "w": H}
    return kind(slow, positive[0][0], **(given | numbers))


def rolled(talker, loop, chunks=CHUNKS):
    return adapter.to_vae_space(talker, loop.roll(chunks).float())


def worst(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


# what is asked of the node, what of the loop
MODES = {
    "one": ({}, {}),
    "two": ({"batch_size": 2}, {"batch": 2}),
    "one window": ({"preset": "liveavatar_one_window"}, {"one_history": True}),
    "another seed, a sink, a longer window": (
        {"seed": 11, "anchor": AnchorStatic(3), "window_frames": 12}, {"seed": 11, "sink": 3, "ring": 15},
    ),
    "later in the sound": ({"audio_offset": 0.52}, {"first_picture": 13}),
    "host memory": ({"cache_device": "host memory"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_preset_through_the_nodes_is_its_loop(made, state, talker, positive, mode):
    """Until the ring has rolled over and the picture has been replaced; in one go, and stopped and gone on with twice."""
    asked, numbers = MODES[mode]
    asked = dict(asked)
    asked["audio"] = track(offset=asked.pop("audio_offset", 0.0))
    out = made(**asked)
    ours, report = latents_of(out), report_of(out)
    with torch.inference_mode():
        theirs = rolled(talker, by_the_loop(state, talker, positive, **numbers))
    assert worst(ours, theirs) < 1e-4
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] and report["video_fps"] == 25.0
    first = made(length=29, **asked)
    second = made(length=53, resume=first.args[1], **(asked | {"reference": None}))
    rest = made(resume=second.args[1], **(asked | {"reference": None}))
    assert torch.equal(latents_of(rest), ours)
    again = made(length=53, resume=first.args[1], **(asked | {"reference": None}))
    assert torch.equal(latents_of(again), latents_of(second))
