"""Wan 2.2 S2V through the nodes: sound and picture in, a video with sound out; what is refused, and what it takes."""
# ruff: noqa: F811  fixtures that are imported

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import av
import comfy.sd
import folder_paths
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive, AnchorStatic
from adastate_pack.nodes.host import codec
from adastate_pack.nodes.host.codec import HostDecoder
from conftest import HostNode
from slow_liveavatar import LiveAvatar
from slow_s2v import SlowS2V
from talkers import drawn, state, track  # noqa: F401  a fixture
from tiny_s2v import features, write_tiny_s2v

SIDE, SEED = 64, 11
SMALL = {"width": SIDE, "height": SIDE, "batch_size": 1, "seed": SEED, "steps": 0, "shift": 0.0, "chunk_frames": 0,
         "window_frames": -1, "positions": "auto"}  # fmt: skip


POSITIVE = [[drawn(2, 1, 7, 4096), {}]]
PICTURE = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def plain(state):
    return comfy.sd.load_diffusion_model_state_dict(dict(state))


@pytest.fixture
def avatar(plain, node):
    return node("AdaStateModelPreset")(model=plain, preset="liveavatar").args[0]


def sound(seconds, rate=16000):
    wave = torch.zeros(1, 1, int(seconds * rate))
    wave[..., int(0.5 * rate)] = 1.0  # a click
    return {"waveform": wave, "sample_rate": rate}


def track_of(seconds=1.0, audio=True, **more):
    return track(seconds, **({"audio": sound(seconds)} if audio else {}), **more)


def roll(model, **inputs):
    given = SMALL | {"model": model, "positive": POSITIVE, "length": -1, "audio": track_of(), "reference": PICTURE}
    return HostNode("AdaStateRollout")(**(given | inputs))


def report_of(out):
    return json.loads(out.args[2])


@torch.inference_mode()
def test_a_sound_becomes_a_video_of_its_length_that_carries_it(avatar, state, stream, vae, written, folders):
    out = roll(avatar, stream=stream(fps=0.0))
    latents, report = out.args[0]["samples"], report_of(out)
    assert report["frames"] == 25 and report["video_fps"] == 25 and latents.shape[2] == 7  # a second, of 25 pictures
    still = codec.encode(vae, PICTURE.expand(5, -1, -1, -1))[:, :, 1:]
    model_space = avatar.model.process_latent_in
    slow = SlowS2V(state)
    heard = slow.folded(features(1.0))
    loop = LiveAvatar(slow, POSITIVE[0][0], seed=SEED, h=8, w=8, reference=model_space(still), heard=heard)
    theirs = loop.roll(3)[:, :, :7].float()
    assert float((model_space(latents) - theirs).abs().max()) < 1e-4
    # the decoder has seen the still, and of the first latent frame's pictures the last is kept
    decoder = HostDecoder(vae)
    decoder.stream.step(still.expand(-1, -1, 7, -1, -1).to(vae.vae_dtype))
    whole = torch.cat([decoder.step(part) for part in latents.split(1, 2)], 1)[0, 3:]
    shown = torch.cat(written).float() / 255
    assert shown.shape == whole.shape and float((shown - whole).abs().max()) < 0.02
    with av.open(str(folders / "output" / report["files"][0])) as file:
        rate = file.streams.audio[0].rate
        wave = torch.cat([torch.from_numpy(frame.to_ndarray()).float().abs().amax(0) for frame in file.decode(audio=0)])
    assert abs(int(wave.argmax()) / rate - (0.5 - 3 / 25)) < 0.04  # its picture is 3 frames ahead of what drove it


@torch.inference_mode()
def test_a_run_that_is_resumed_in_a_stream_gives_the_same_pictures(avatar, stream, written):
    roll(avatar, stream=stream(fps=0.0), audio=track_of(1.6))
    whole = torch.cat(written)
    written.clear()
    first = roll(avatar, stream=stream(fps=0.0, filename_prefix="cut"), audio=track_of(1.6), length=21)
    again = roll(
        avatar, stream=stream(fps=0.0, filename_prefix="cut", join=True), audio=track_of(1.6), resume=first.args[1]
    )
    assert torch.equal(torch.cat(written), whole)
    told = " ".join(report_of(again)["warnings"])
    assert "reference of its own" in told


def test_the_plain_way_follows_numbers_and_hears_silence_where_there_is_no_sound(plain):
    out = roll(plain, length=25, audio=None, reference=latent_of(PICTURE), steps=2, batch_size=2)
    assert out.args[0]["samples"].shape == (2, 16, 7, 8, 8)
    report = report_of(out)
    assert report["settings"]["history"] == "clean" and any("hears silence" in each for each in report["warnings"])
    short = report_of(roll(plain, length=49, audio=track_of(0.6, audio=False), reference=latent_of(PICTURE)))[
        "warnings"
    ]
    assert any("from its end on the model hears silence" in each for each in short)
    long = report_of(roll(plain, length=9, audio=track_of(2.0, audio=False), reference=latent_of(PICTURE)))["warnings"]
    assert any("the rest of the sound drives nothing" in each for each in long)


def latent_of(picture):
    return {"samples": drawn(5, 1, 16, 2, picture.shape[1] // 8, picture.shape[2] // 8)}


def asked_of(preset="liveavatar", **inputs):
    return preset, inputs


def absorption_of(node, **more):
    given = {
        "ratio": 1.0, "warmup_frames": 9, "local_window_frames": 3, "sink_frames": 1, "ridge": "auto", "scope": "head", "rank": 16,
        "select": "residual", "absorb": True, "schedule": "once",
    }  # fmt: skip
    return node("AdaStateAbsorption")(**given | more).args[0]


def test_absorption_leaves_the_picture_to_every_layer(plain, avatar, node, stream):
    """While it looks on nothing changes; once layers have lost their history the reference is still seen."""
    given = dict(length=61, reference=latent_of(PICTURE), steps=2, window_frames=9)
    whole = roll(plain, **given).args[0]["samples"]
    out = roll(plain, **given, absorption=absorption_of(node))
    assert float((out.args[0]["samples"][:, :, :9] - whole[:, :, :9]).abs().max()) < 1e-4
    assert report_of(out)["absorption"]["phase"] == "switched"
    never = roll(plain, **given, absorption=absorption_of(node, local_window_frames=9, sink_frames=0)).args[0][
        "samples"
    ]
    assert float((never - whole).abs().max()) < 1e-4  # all is local, the reference too
    one = node("AdaStateModelPreset")(model=avatar, preset="liveavatar_one_window").args[0]
    found = report_of(roll(one, length=61, stream=stream(fps=0.0), absorption=absorption_of(node)))["absorption"]
    assert found["phase"] == "switched" and found["kv_bytes_after"] < found["kv_bytes_before"]


REFUSED = {
    "sound alone": (asked_of(audio="sound alone"), "not what is heard in it; connect Audio Encoder Encode"),
    "another encoder": (asked_of(audio="base"), "audio has 13 layers of 768 channels and the model hears 25 of 1024"),
    "no reference": (asked_of(reference=None), "shows a reference picture and none is connected"),
    "no stream for a picture": (asked_of(stream=None), "there is no stream whose VAE could encode it"),
    "too many pictures": (asked_of(reference=PICTURE.expand(3, -1, -1, -1)), "reference holds 3 pictures for batch_size 1"),
    "a LATENT of another size": (asked_of(reference={"samples": drawn(1, 1, 16, 1, 4, 8)}), "reference is 64x32 and the roll"),
    "a LATENT of another space": (asked_of(reference={"samples": drawn(1, 1, 48, 1, 8, 8)}), "reference is a LATENT"),
    "no sound to follow": (asked_of(audio=None), "length is -1, which stands for as long as the sound"),
    "two rates": (asked_of(audio=track_of(1.0, fps=16.0)), "fps is 16 in AdaState Audio and 25 in the stream"),
    "start latents": (asked_of(start_latent=latent_of(PICTURE)), "give the picture as reference, or choose a preset with a clean"),
    "a hidden state": (asked_of(anchor=AnchorAdaptive(1), positions="packed"), "the adaptive anchor, whose state a clean pass"),
    "absorption": (asked_of(absorption="absorption"), "absorption, which follows one window; remove it, or set"),
    "a small video": (asked_of(width=32, height=32, reference={"samples": drawn(1, 1, 16, 1, 4, 4)}), "sides must be at least 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_before_anything_is_loaded(plain, node, stream, monkeypatch, name):
    (preset, inputs), message = REFUSED[name]
    model = node("AdaStateModelPreset")(model=plain, preset=preset).args[0]
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *a, **k: pytest.fail("something was loaded"))
    inputs = {"stream": stream(fps=25.0)} | inputs
    if inputs.get("audio") == "sound alone":
        inputs["audio"] = node("AdaStateAudio")(audio=sound(1.0), fps=0.0, offset=0.0).args[0]
    if inputs.get("audio") == "base":
        heard = (drawn(1, 1, 49, 768),) * 13
        encoded = {"encoded_audio": heard[0], "encoded_audio_all_layers": heard, "audio_samples": 16000}
        inputs["audio"] = node("AdaStateAudio")(encoded=encoded, fps=0.0, offset=0.0).args[0]
    if inputs.get("absorption"):
        inputs["absorption"] = absorption_of(node)
    with pytest.raises(ValueError, match=message) as error:
        roll(model, **inputs)
    assert "\n" not in str(error.value)


def test_models_that_hear_nothing_take_neither_sound_nor_picture(model, node):
    with pytest.raises(ValueError, match="hears nothing: connect the sound to the audio input of Stream To Video"):
        roll(model)
    with pytest.raises(ValueError, match="shows none: connect the picture to start_latent through Continue Video"):
        roll(model, audio=None, length=9)
    given = node("AdaStateModelPreset")(model=model, preset="liveavatar").args[0]
    with pytest.raises(ValueError, match="is for models that are driven by sound, and this one is of Wan 2.1"):
        roll(given, audio=None, reference=None, length=9)


def test_a_recache_needs_a_clean_pass(avatar, node, stream):
    at = node("AdaStatePromptAt")
    prompts = at(positive=POSITIVE, seconds=0.0, transition="recache").args[0]
    prompts = at(positive=[[drawn(8, 1, 7, 4096), {}]], seconds=0.5, transition="recache", prompts=prompts).args[0]
    with pytest.raises(ValueError, match="with history own level there are none; choose another transition"):
        roll(avatar, positive=prompts, stream=stream(fps=0.0))


def test_the_plan_names_what_other_ways_take(avatar, node, stream, vae):
    given = {
        "model": avatar,
        "width": SIDE,
        "height": SIDE,
        "length": -1,
        "audio": track_of(),
        "reference": PICTURE,
        "vae": vae,
    }
    text, numbers = node("AdaStatePlan")(**given, stream=stream(fps=0.0)).args
    planned, frame = json.loads(numbers), 2 * 16 * 128 * 4  # keys and values of a latent frame in float32, in one layer
    assert planned["kv_bytes"] == 4 * 12 * frame and planned["plan_bytes"]["reference"] == 2.5 * frame
    instead = list(planned["instead"].values())
    assert instead[0]["kv_bytes"] == 12 * frame and instead[2]["host_bytes"] == planned["kv_bytes"]
    assert (
        instead[1]["kv_bytes"] < planned["kv_bytes"]
        and "one window, and absorption of 50% of the layers (ISPA)" in text
    )
    report = report_of(roll(avatar, stream=stream(fps=0.0)))
    sizes = report["plan_bytes"] | {"text_kv": planned["plan_bytes"]["text_kv"]}
    assert sizes == planned["plan_bytes"] and report["kv_bytes_used"] == planned["kv_bytes"]


@contextmanager
def listed(folder, kind):
    before = folder_paths.folder_names_and_paths[kind]
    folder_paths.folder_names_and_paths[kind] = ([str(folder)], {".safetensors"})
    folder_paths.filename_list_cache.clear()
    try:
        yield
    finally:
        folder_paths.folder_names_and_paths[kind] = before
        folder_paths.filename_list_cache.clear()


def test_files_are_known_and_their_lora_has_half_its_strength(state, node, tmp_path):
    write_tiny_s2v(tmp_path / "liveavatar_merged.safetensors", state)
    pair = {f"blocks.0.self_attn.q.lora_{side}.default.weight": drawn(4, *shape) for side, shape in
            (("A", (2, 128)), ("B", (128, 2)))}  # fmt: skip
    pair |= {f"audio_injector.injector.0.q.lora_{side}.default.weight": drawn(5, *shape) for side, shape in
             (("A", (2, 128)), ("B", (128, 2)))}  # fmt: skip
    import safetensors.torch

    safetensors.torch.save_file(pair, tmp_path / "liveavatar.safetensors")
    with listed(tmp_path, "diffusion_models"), listed(tmp_path, "loras"):
        text = node("AdaStateInspectCheckpoint")(file="liveavatar_merged.safetensors", width=SIDE, height=SIDE).args[0]
        assert "Wan 2.2 S2V" in text and "taken for LiveAvatar" in text and "it makes 25 frames a second" in text
        loaded = node("AdaStateLoadModel")(
            file="liveavatar_merged.safetensors", weight_dtype="default", preset="auto"
        ).args[0]
        patched = node("AdaStateLoadLora")(model=loaded, file="liveavatar.safetensors")
    (strength, *_), *_ = patched.args[0].patches["diffusion_model.blocks.0.self_attn.q.weight"]
    assert strength == 0.5 and "audio_injector.injector.0.q" in " ".join(patched.args[0].patches)
    assert any("0.5 times the strength" in each for each in patched.args[0].model_options["adastate_notes"])


def test_the_hosts_own_sampler_is_no_way_to_drive_it(avatar):
    from adastate_pack.nodes.host import guider

    class Guider:
        predict_noise = guider.CFGGuider.predict_noise
        cfg, model_patcher, conds = 1.0, avatar, {"positive": [{"cross_attn": POSITIVE[0][0]}]}

    with pytest.raises(
        ValueError, match="is driven by sound, which this sampler has no input for: use AdaState Rollout"
    ):
        guider.check_guider(Guider(), {"model_options": avatar.model_options})


def test_nodes_that_have_no_input_for_a_sound_say_so(plain, node):
    with pytest.raises(ValueError, match="which this node has no input for; use a text-to-video model"):
        node("AdaStateAttentionShare")(model=plain, positive=POSITIVE, width=SIDE, height=SIDE, windows="3", seed=1)


@pytest.mark.parametrize("preset", ["liveavatar", "liveavatar_one_window"])
def test_half_precision_is_near(state, node, preset):
    """bfloat16 weights, activations and cache, against the same rounded weights in float32."""
    given = dict(length=25, reference=latent_of(PICTURE))
    rounded = {name: value.to(torch.bfloat16) for name, value in state.items()}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = comfy.sd.load_diffusion_model_state_dict(dict(rounded))
        model.set_model_compute_dtype(dtype)
        model = node("AdaStateModelPreset")(model=model, preset=preset).args[0]
        found.append(roll(model, **given).args[0]["samples"])
    assert 0 < float((found[0] - found[1]).abs().mean()) < 0.1 * float(found[1].abs().mean())


def test_a_static_anchor_and_8_bits_go_with_it(avatar, stream):
    out = roll(avatar, stream=stream(fps=0.0), anchor=AnchorStatic(3), cache_dtype="int8", window_frames=6)
    assert Path(report_of(out)["files"][0]).suffix == ".mp4" and torch.isfinite(out.args[0]["samples"]).all()
