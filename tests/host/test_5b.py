"""The 5B line through every node that takes a model, a VAE, a latent or a state: what goes, and what is refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy.sd
import folder_paths
import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.geometry import WAN22
from adastate_pack.adastate_core.states.state_file import load_state, save_state
from adastate_pack.adastate_core.video.picture_forms import to_bytes
from adastate_pack.nodes.chunk_facts import hidden_picture
from adastate_pack.nodes.host.codec import HostDecoder
from comfy.cli_args import LatentPreviewMethod, args
from comfy_extras import nodes_custom_sampler as sampling
from comfy_extras.nodes_wan import Wan22ImageToVideoLatent
from conftest import random_vae, random_wan
from PIL import Image

FILE = {"filename_prefix": "a", "fps": 24.0, "codec": "h264", "quality": 18}
NUMBERS = {"chunk_frames": 3, "window_frames": 3, "positions": "packed"}


@pytest.fixture(scope="module")
def vae():
    return tiny_5b.loaded_vae()


@pytest.fixture
def model():
    return tiny_5b.loaded_model()


@pytest.fixture(scope="module")
def older():
    """A VAE and a MODEL of Wan 2.1."""
    return comfy.sd.VAE(sd=random_vae()), comfy.sd.load_diffusion_model_state_dict(random_wan())


@pytest.fixture
def plan(model, node):
    def call(**more):
        inputs = {"model": model, "width": 32, "height": 32, "length": 33, "batch_size": 1} | NUMBERS
        return json.loads(node("AdaStatePlan")(**(inputs | more)).args[1])

    return call


def report_of(out) -> dict:
    return json.loads(out.args[2])


def test_a_streamed_rollout_of_two_is_resumed_bit_for_bit(rollout, stream, vae, node, plan, folders, written):
    given = {"batch_size": 2, "anchor": AnchorAdaptive(1)}
    latents = rollout(**given).args[0]["samples"]
    assert latents.shape == (2, 48, 9, 2, 2) and not torch.equal(latents[0], latents[1])
    first = rollout(**given, length=21, stream=stream())
    save_state(first.args[1], folders / "a.safetensors")
    state = load_state(folders / "a.safetensors")
    rest = rollout(**given, resume=state, stream=stream(join=True))
    assert torch.equal(rest.args[0]["samples"], latents)
    with torch.no_grad():
        pictures = to_bytes(HostDecoder(vae, fast=True).step(latents))
    assert torch.equal(torch.cat(written[::2]), pictures[0]) and torch.equal(torch.cat(written[1::2]), pictures[1])
    report, planned = report_of(rest), plan(batch_size=2, anchor=AnchorAdaptive(1), vae=vae)
    assert report["decoder"].startswith("a full Wan 2.2 VAE, VAE-space latents")
    sizes = planned["plan_bytes"]
    assert sizes["vae_cache"] == report["plan_bytes"]["vae_cache"] == HostDecoder(vae).cache_bytes(2, 2, 2)
    assert planned["kv_bytes"] == report["kv_bytes_used"] and planned["kept_latents_bytes"] == 2 * 48 * 9 * 4 * 4
    hidden = node("AdaStateDecodeState")(state=state, vae=vae).args[0]
    assert hidden.shape == (2, 32, 32, 3)


def test_files_go_through_the_hosts_own_loaders_and_executor(execute, folders, monkeypatch):
    names = [path.name for path in tiny_5b.write_files(folders)]
    for kind in ("diffusion_models", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folders)], {".safetensors"}))

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    words = {"terrain": "snow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    with tiny_5b.narrow_vae_class():
        shown = execute({
            "model": node("UNETLoader", unet_name=names[0], weight_dtype="default"),
            "vae": node("VAELoader", vae_name=names[1]),
            "tiny": node("VAELoader", vae_name=names[2]),
            "words": node("AdaStateDemoPrompt", **words),
            "picture": node("EmptyImage", width=48, height=48, batch_size=1, color=7),
            "start": node(
                "AdaStateContinueVideo", vae=["vae", 0], image=["picture", 0], width=32, height=0, frames=1, crop="center",
            ),
            "roll": node(
                "AdaStateRollout", model=["model", 0], positive=["words", 0], width=0, height=0, length=13, batch_size=1, seed=1,
                steps=1, shift=5.0, start_latent=["start", 0], **NUMBERS,
            ),
            "full": node("AdaStateDecode", latent=["roll", 0], vae=["vae", 0]),
            "video": node("AdaStateRenderVideo", latent=["roll", 0], vae=["tiny", 0], **FILE),
            "metrics": node("AdaStateVideoMetrics", video=["video", 0]),
            "save": node("SaveImage", images=["full", 0], filename_prefix="x"),
            "report": node("PreviewAny", source=["roll", 2]),
            "numbers": node("PreviewAny", source=["metrics", 1]),
        })  # fmt: skip
    pictures = sorted((folders / "output").glob("x*.png"))
    assert len(pictures) == 13 and Image.open(pictures[0]).size == (32, 32)
    assert json.loads(shown["report"]["text"][0])["frames"] == json.loads(shown["numbers"]["text"][0])["pictures"] == 13


def test_given_frames_stay_and_a_size_follows_the_vae(rollout, node, vae):
    def go_on(width, height, area="832x480", shape=(48, 96)):
        inputs = {"frames": 5, "crop": "center", "area": area, "image": torch.rand(5, *shape, 3)}
        return node("AdaStateContinueVideo")(vae=vae, width=width, height=height, **inputs).args

    latent, pictures, count = go_on(0, 32)
    assert latent["samples"].shape == (1, 48, 2, 2, 4) and pictures.shape == (5, 32, 64, 3) and count == 5
    made = rollout(start_latent=latent, width=0, height=0, length=17).args[0]["samples"]
    torch.testing.assert_close(made[:, :, :2], latent["samples"], atol=1e-5, rtol=1e-5)
    assert go_on(0, 0, "64x64", (64, 64))[1].shape[1:3] == (64, 64)
    with pytest.raises(ValueError, match="height is 48; a model of this VAE needs multiples of 32: try 32 or 64"):
        go_on(32, 48)


def test_the_sampler_is_the_rollout(rollout, model, positive, node, vae):
    empty = Wan22ImageToVideoLatent.execute(vae, 32, 32, 33, 1).args[0]
    sigmas = torch.tensor([1.0, 5 / 6, 0.0])

    def sample(latent):
        sampler, noise = (
            node("AdaStateSampler")(**NUMBERS).args[0],
            node("AdaStateNoise")(seed=5, chunk_frames=3).args[0],
        )
        guider = sampling.BasicGuider.execute(model, positive).args[0]
        with torch.inference_mode():
            out = sampling.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)
        return out.args[0]["samples"]

    assert torch.equal(sample(empty), rollout(sigmas=sigmas).args[0]["samples"])
    with pytest.raises(ValueError, match="height is 48; this model needs multiples of 32: try 32 or 64"):
        sample({"samples": torch.zeros(1, 48, 3, 3, 2)})


def test_attention_and_absorption_take_it(rollout, model, positive, node):
    shares = node("AdaStateAttentionShare")(model=model, positive=positive, width=32, height=32, windows="3", seed=1)
    assert json.loads(shares.args[1])[0]["window_frames"] == 3
    settings = {
        "ratio": 0.5, "warmup_frames": 12, "local_window_frames": 3, "sink_frames": 1, "ridge": "auto", "scope": "head", "rank": 64,
        "select": "sensitivity", "absorb": True, "schedule": "once",
    }  # fmt: skip
    absorption = node("AdaStateAbsorption")(**settings).args[0]
    found = report_of(rollout(window_frames=12, length=73, absorption=absorption))["absorption"]
    assert found["phase"] == "switched" and found["kv_bytes_after"] < found["kv_bytes_before"]


def test_previews_are_of_its_own_latents(rollout, progress_told, monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    rollout()
    assert [preview[1].size for _, _, preview in progress_told if preview] == [(2, 2)] * 3


@torch.no_grad()
def test_a_picture_of_a_hidden_state_is_small(model, vae):
    """At most 160 pixels a side, which are 10 of these latents."""
    shown = SimpleNamespace(request=SimpleNamespace(model=model), space=WAN22, decoder=HostDecoder(vae))
    assert hidden_picture(shown, torch.zeros(2, 48, 2, 6, 12)).shape == (48, 96, 3)
    assert hidden_picture(shown, torch.zeros(1, 48, 1, 6, 10)).shape == (96, 160, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 336}, "width is 336; this model needs multiples of 32: try 320 or 352"),
        ({"height": 16}, "height is 16; this model needs multiples of 32: try 32"),
        (
            {"latent": (1, 16, 1, 4, 4)},
            r"start_latent is \[1, 16, 1, 4, 4\] of Wan 2.1; it must be a Wan 2.2 video latent",
        ),
        ({"latent": (1, 8, 1, 4, 4)}, r"start_latent is \[1, 8, 1, 4, 4\]; it must be a Wan 2.2 video latent"),
    ],
)
def test_sizes_and_latents_of_others_are_refused_before_anything_is_loaded(rollout, plan, inputs, message, monkeypatch):
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *a, **k: pytest.fail("it was loaded"))
    if shape := inputs.pop("latent", None):
        inputs["start_latent"] = {"samples": torch.zeros(shape)}
    for call in (rollout, plan):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_what_is_of_another_space_is_refused_by_name(rollout, stream, node, vae, older, plan, model):
    old_vae, old_model = older
    latents, old_latents = torch.zeros(1, 48, 2, 2, 2), torch.zeros(1, 16, 2, 4, 4)
    state, old_state = rollout(length=9).args[1], rollout(length=9, model=old_model).args[1]
    refused = [
        (lambda: rollout(stream=stream(vae=old_vae)), "a Wan 2.1 VAE .16 channels., and the model works in Wan 2.2's latents"),
        (lambda: rollout(model=old_model, stream=stream()), "a Wan 2.2 VAE .48 channels., .* load wan_2.1_vae"),
        (lambda: plan(vae=old_vae), "and the model works in Wan 2.2's latents .48 channels.: load wan2.2_vae"),
        (lambda: rollout(resume=old_state), "of a model of Wan 2.1's latents .* load the model that the state was made with"),
        (lambda: rollout(model=old_model, resume=state), "the model works in Wan 2.1's"),
        (lambda: node("AdaStateDecodeState")(state=rollout(length=9, anchor=AnchorAdaptive(1)).args[1], vae=old_vae), "Wan 2.2's"),
        (lambda: node("AdaStateDecode")(latent={"samples": old_latents}, vae=vae), "a Wan 2.1 video, and the vae is a Wan 2.2 VAE"),
        (lambda: node("AdaStateRenderVideo")(latent={"samples": latents}, vae=old_vae, **FILE), "load wan2.2_vae"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
