"""A VAE that gives NaN or infinity: it ends a run before a frame is written, and nothing of it gets into a state."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import av
import comfy.sd
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.decode.wan_vae import NonFinitePicturesError
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes import job
from adastate_pack.nodes.host import live_runs as live
from conftest import random_vae

SENTENCE = "the VAE, which runs in float32, gave NaN or infinite values for {}; run it in float32 or bfloat16, or load .*fp32-vae"
FILE = {"filename_prefix": "take", "fps": 16.0, "codec": "h264", "quality": 18}


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


@pytest.fixture
def fresh_vae():
    return comfy.sd.VAE(sd=random_vae())


@pytest.fixture
def stream(fresh_vae, node):
    def make(**inputs):
        return node("AdaStateStreamOutput")(**(FILE | {"vae": fresh_vae, "preview": True} | inputs)).args[0]

    return make


def spoilt(value: torch.Tensor | list[torch.Tensor], by: float) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(value, list):  # newer hosts' decoders give their pictures in pieces
        return [*value[:-1], spoilt(value[-1], by)]
    value = value.clone(memory_format=torch.contiguous_format)
    value.view(-1)[value.numel() // 2] = by
    return value


@contextmanager
def broken(vae, what: str, at: int, by: float = float("nan")):
    """From decoder call `at` on, one value of the pictures, of an inner layer or of what is carried is `by`."""
    decoder, calls = vae.first_stage_model.decoder, []

    def count(*_: object) -> None:
        calls.append(1)

    def layer(_module, _inputs, output):
        return spoilt(output, by) if len(calls) > at else output

    def whole(_module, _inputs, keywords, output):
        if len(calls) <= at:
            return output
        if what == "pictures":
            return spoilt(output, by)
        carried = [i for i, entry in enumerate(keywords["feat_cache"]) if torch.is_tensor(entry)]
        keywords["feat_cache"][carried[-1]] = spoilt(keywords["feat_cache"][carried[-1]], by)
        return output

    hooks = [decoder.register_forward_pre_hook(count)]
    if what == "an inner layer":
        hooks.append(decoder.middle[0].register_forward_hook(layer))
    else:
        hooks.append(decoder.register_forward_hook(whole, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def finite(state) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.stream.values() if torch.is_tensor(value))


@pytest.mark.parametrize("by", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("what", ["pictures", "an inner layer", "what is carried"])
@pytest.mark.sampled(3)
def test_it_ends_a_stream_like_a_model_that_does(rollout, stream, folders, fresh_vae, what, by):
    whole = rollout(length=45, stream=stream(filename_prefix="whole"))
    with (
        broken(fresh_vae, what, 7, by),
        pytest.raises(NonFinitePicturesError, match=SENTENCE.format("latent frames 6 to 8")),
    ):
        rollout(length=45, stream=stream(autosave_seconds=1e-6))
    out = folders / "output"
    assert len(frames_of(out / "take_00001_.mp4")) == 21
    state = load_state(out / "take_00001_.state.safetensors")
    assert (state.emitted, state.pending.shape[2], state.stream["vae_latents_seen"]) == (6, 3, 6)
    assert state.stream["frames_written"] == 21 and finite(state)
    rest = rollout(length=45, resume=state, stream=stream(filename_prefix="rest", join=True))
    assert torch.equal(rest.args[0]["samples"], whole.args[0]["samples"])
    frames, reference = frames_of(out / "rest_00001_.mp4"), frames_of(out / "whole_00001_.mp4")
    assert len(frames) == 45 and (frames.float() - reference.float()).abs().mean() < 3


def test_an_autosave_never_holds_what_is_not_finite(rollout, stream, folders, fresh_vae, monkeypatch):
    from adastate_pack.nodes import saved_states

    saved = []
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: saved.append(finite(state)))
    with broken(fresh_vae, "what is carried", 10), pytest.raises(NonFinitePicturesError):
        rollout(length=81, stream=stream(autosave_seconds=1e-6, history_chunks=1))
    assert len(saved) >= 3 and all(saved)


@pytest.mark.parametrize("frames_per_call", [1, 2])
def test_it_ends_the_decode_node(fresh_vae, node, frames_per_call):
    z = {"samples": torch.randn(1, 16, 6, 4, 4)}
    where = "latent frame 3" if frames_per_call == 1 else "latent frames 5 to 5|latent frame 5"
    with broken(fresh_vae, "pictures", 3), pytest.raises(NonFinitePicturesError, match=SENTENCE.format(f"({where})")):
        node("AdaStateDecode")(latent=z, vae=fresh_vae, frames_per_call=frames_per_call)


def test_it_ends_render_video(fresh_vae, node):
    z = {"samples": torch.randn(1, 16, 6, 4, 4)}
    with (
        broken(fresh_vae, "an inner layer", 3),
        pytest.raises(NonFinitePicturesError, match=SENTENCE.format("latent frame 3")),
    ):
        node("AdaStateRenderVideo")(latent=z, vae=fresh_vae, **FILE)


def test_a_latent_that_is_not_finite_is_named_instead(fresh_vae, node):
    z = torch.randn(2, 16, 6, 4, 4)
    z[1, 3, 4] = float("inf")
    for inputs in ({"id": "AdaStateDecode"}, {"id": "AdaStateRenderVideo"} | FILE):
        with pytest.raises(ValueError, match="the latent holds NaN or infinite values in latent frame 4"):
            node(inputs.pop("id"))(latent={"samples": z}, vae=fresh_vae, **inputs)


def test_it_ends_decode_hidden_state(rollout, fresh_vae, node):
    state = rollout(length=21, anchor=AnchorAdaptive(2)).args[1]
    with (
        broken(fresh_vae, "pictures", 1),
        pytest.raises(NonFinitePicturesError, match=SENTENCE.format("latent frame 0")),
    ):
        node("AdaStateDecodeState")(state=state, vae=fresh_vae)


def test_a_live_picture_of_the_hidden_state_never_ends_a_run(rollout, stream, fresh_vae, monkeypatch, caplog):
    whole = rollout(length=33, anchor=AnchorAdaptive(1), stream=stream()).args
    shown, original = [], job.hidden_picture

    def draw(*given):
        with broken(fresh_vae, "pictures", 0):
            return original(*given)

    monkeypatch.setattr(job, "hidden_picture", draw)
    monkeypatch.setattr(live.LiveRun, "watched", property(lambda run: True))
    monkeypatch.setattr(live.LiveRun, "_send", lambda run, *_: None)
    monkeypatch.setattr(live.LiveRun, "chunk", lambda run, facts, pictures, hidden=None: shown.append(hidden))
    with caplog.at_level(logging.WARNING):
        result = rollout(length=33, anchor=AnchorAdaptive(1), stream=stream()).args
    assert len(shown) == 3 and shown == [None] * 3 and "hidden state's preview could not be made" in caplog.text
    assert torch.equal(result[0]["samples"], whole[0]["samples"]) and json.loads(result[2])["frames"] == 33


def test_an_encoder_is_held_to_it_too(fresh_vae, node):
    with torch.no_grad():
        fresh_vae.first_stage_model.conv1.bias[0] = float("nan")
    with pytest.raises(NonFinitePicturesError, match="NaN or infinite values in the latent of 5 frames"):
        inputs = {"width": 32, "height": 32, "frames": 5, "crop": "center"}
        node("AdaStateContinueVideo")(image=torch.rand(5, 32, 32, 3), vae=fresh_vae, **inputs)
