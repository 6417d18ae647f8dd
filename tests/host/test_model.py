"""The adapter on the host's own Wan model: exact, undone, and with what users load besides."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_pack.adastate_core.passes import NonFiniteError
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.nodes import job as job_module
from adastate_pack.nodes.host import model as adapter
from conftest import PACK, random_wan
from slow_rollout import SlowAttention, slow_rollout


class SlowSession(SlowAttention):
    """The slow attention, with what a patched cross attention asks of a session."""

    def kernel(self, q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    def text(self, layer, key, make):
        return make()

    def takes_unnormed(self, layer, dtype):
        return False


class SlowHost:
    """The loaded host model driven by the slow attention."""

    def __init__(self, host):
        self.host, self.geometry = host, host.geometry

    def velocity(self, x, timestep, attention):
        attention.__class__ = SlowSession
        return self.host.velocity(x, timestep, attention)


def loaded(model, positive, batch=1, anchor=None, window=3):
    host = adapter.HostModel(model, positive[0][0], batch)
    spec = RolloutSpec(host.geometry, batch, 4, 4, 3, window, anchor or Anchor(), "packed", host.dtype)
    host.load(spec.plan(5))
    return host, spec


@torch.no_grad()
def plain_output(model):
    """The plain model's velocity on fixed inputs, through the host's own door."""
    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(9)
    x, context = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    return model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context)


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_first_pass_is_the_hosts_own_forward(model, positive, batch):
    host, spec = loaded(model, positive, batch)
    rollout = Rollout(host, spec, Settings(1, Schedule((1.0,))))
    x = torch.randn(batch, 16, 3, 4, 4)
    rollout.attention.begin(rollout.past.layout(), 3, kept=False)
    ours = host.velocity(x, 700.0, rollout.attention)
    wan = model.model.diffusion_model
    theirs = wan(x, torch.full((batch,), 700.0), positive[0][0].expand(batch, -1, -1))
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=3e-6)


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize(
    "anchor", [Anchor(), AnchorStatic(1), AnchorEMA(2, 0.5), AnchorAdaptive(1)], ids=lambda a: a.kind
)
def test_the_rollout_node_equals_the_slow_rollout(rollout, model, positive, anchor):
    latents = rollout(anchor=anchor, length=45, window_frames=5).args[0]["samples"]
    host, _ = loaded(model, positive, anchor=anchor, window=5)
    slow = slow_rollout(
        SlowHost(host), batch=1, h=4, w=4, F=3, W=5, seed=5, sigmas=Schedule.shifted(2, 5.0).sigmas, length=12,
        anchor=anchor.kind, A=anchor.frames, S=anchor.state_frames, decay=getattr(anchor, "decay", 0.999),
    )  # fmt: skip
    expected = adapter.to_vae_space(model, slow["latents"])
    torch.testing.assert_close(latents, expected, atol=2e-3, rtol=1e-3)


def failing(model, monkeypatch, how):
    """Make the third chunk's first step fail."""
    original = adapter.HostModel.velocity
    calls = []

    def velocity(self, x, timestep, attention):
        calls.append(timestep)
        if len(calls) == 7:
            if how == "interrupt":
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            if how == "nan":
                return original(self, x, timestep, attention) * float("nan")
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(self, x, timestep, attention)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)


@pytest.mark.parametrize("how", ["none", "interrupt", "nan", "oom"])
def test_the_plain_model_is_as_before_and_the_cache_is_gone(rollout, model, monkeypatch, interrupt, how):
    before = plain_output(model)
    caches = []

    class Watched(Rollout):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(weakref.ref(self.cache))

    monkeypatch.setattr(job_module, "Rollout", Watched)
    if how == "none":
        rollout()
    else:
        failing(model, monkeypatch, how)
        with pytest.raises({"interrupt": interrupt, "nan": NonFiniteError, "oom": torch.cuda.OutOfMemoryError}[how]):
            rollout()
    assert torch.equal(plain_output(model), before)
    gc.collect()
    assert caches and caches[0]() is None


def test_a_patch_without_a_session_is_the_original(rollout, model):
    """The object patch outlives its clone until another model is loaded; it must then change nothing."""
    before = plain_output(model)
    rollout()
    patched = model.model.diffusion_model.blocks[0].self_attn.forward
    assert "self_attention_forward" in patched.__qualname__
    generator = torch.Generator().manual_seed(9)
    x, context = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    with torch.no_grad():
        assert torch.equal(model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context), before)


def test_a_lora_acts_in_the_rollout(rollout, model, wan_state):
    delta = {f"blocks.{i}.self_attn.{n}.weight": 0.05 * torch.randn(128, 128) for i in range(2) for n in "qkvo"}
    delta["blocks.0.cross_attn.k.weight"] = 0.05 * torch.randn(128, 128)
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{name}": ("diff", (value,)) for name, value in delta.items()})
    plain = rollout().args[0]["samples"]
    with_lora = rollout(model=patched).args[0]["samples"]
    merged = {name: value + delta.get(name, 0) for name, value in wan_state.items()}
    reference = rollout(model=comfy.sd.load_diffusion_model_state_dict(merged)).args[0]["samples"]
    torch.testing.assert_close(with_lora, reference, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(with_lora, plain, atol=1e-2)
    assert torch.equal(rollout().args[0]["samples"], plain)


def test_fp8_weights_run(rollout, wan_state):
    options = {"dtype": torch.float8_e4m3fn}
    state = {name: value.clone() for name, value in wan_state.items()}
    small = comfy.sd.load_diffusion_model_state_dict(state, model_options=options)
    assert small.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    latents = rollout(model=small).args[0]["samples"]
    rounded = {
        name: value if name.startswith("patch_embedding") else value.to(torch.float8_e4m3fn).float()
        for name, value in wan_state.items()
    }
    reference = rollout(model=comfy.sd.load_diffusion_model_state_dict(rounded)).args[0]["samples"]
    torch.testing.assert_close(latents, reference, atol=5e-2, rtol=5e-2)


def test_offloaded_weights_run(rollout, model, monkeypatch):
    """With no memory for weights the host casts each one as it is used; the numbers stay the same."""
    expected = rollout().args[0]["samples"]
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    latents = rollout().args[0]["samples"]
    assert model.model.model_lowvram
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    comfy.model_management.unload_all_models()


def test_the_fingerprint_survives_rounding_and_lora(model, wan_state):
    first = adapter.fingerprint(model)
    half = comfy.sd.load_diffusion_model_state_dict({k: v.bfloat16() for k, v in wan_state.items()})
    assert adapter.fingerprint(half) == first
    patched = model.clone()
    patched.add_patches({"diffusion_model.head.modulation": ("diff", (torch.ones(1, 2, 128),))})
    comfy.model_management.load_models_gpu([patched])
    assert adapter.fingerprint(patched) == first
    for dtype in (torch.float16, torch.float8_e4m3fn):
        state = {name: value.bfloat16() for name, value in wan_state.items()}
        loaded = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
        assert adapter.fingerprint(loaded) == export_fingerprint(state_of(wan_state), dtype)
    other = comfy.sd.load_diffusion_model_state_dict(random_wan(seed=3))
    assert adapter.fingerprint(other) != first


def state_of(wan_state):
    return {name: value.bfloat16() for name, value in wan_state.items()}


def export_fingerprint(weights, dtype):
    """The exporter's own function, loaded alone: its package does not belong in this process."""
    source = (PACK / "training" / "export.py").read_text()
    start, end = source.index("def fingerprint"), source.index("def main")
    space = {"torch": torch, "hashlib": hashlib}
    exec(source[start:end], space)  # noqa: S102
    return space["fingerprint"](weights, dtype)


def refused(rollout, message, **inputs):
    with pytest.raises(ValueError, match=message):
        rollout(**inputs)


def test_models_that_cannot_be_driven_are_refused(rollout, model):
    image_to_video = random_wan(in_dim=36)
    generator = torch.Generator().manual_seed(0)
    for name, shape in {
        "img_emb.proj.0.weight": (1280,), "img_emb.proj.0.bias": (1280,), "img_emb.proj.1.weight": (1280, 1280),
        "img_emb.proj.1.bias": (1280,), "img_emb.proj.3.weight": (128, 1280), "img_emb.proj.3.bias": (128,),
        "img_emb.proj.4.weight": (128,), "img_emb.proj.4.bias": (128,),
    }.items():  # fmt: skip
        image_to_video[name] = torch.randn(shape, generator=generator)
    for i in range(2):
        for part in ("k_img", "v_img"):
            image_to_video[f"blocks.{i}.cross_attn.{part}.weight"] = torch.randn(128, 128)
            image_to_video[f"blocks.{i}.cross_attn.{part}.bias"] = torch.randn(128)
        image_to_video[f"blocks.{i}.cross_attn.norm_k_img.weight"] = torch.ones(128)
    wrong = comfy.sd.load_diffusion_model_state_dict(image_to_video)
    refused(rollout, "the model is a WAN21_I2V; a rollout drives", model=wrong)

    def no_op(*args, **kwargs):
        return None

    for set_it, words in {
        "set_model_unet_function_wrapper": "a UNet wrapper",
        "set_model_sampler_cfg_function": "a CFG function",
        "set_model_sampler_post_cfg_function": "a post-CFG function",
        "set_model_sampler_pre_cfg_function": "a pre-CFG function",
    }.items():
        clone = model.clone()
        getattr(clone, set_it)(no_op)
        refused(rollout, f"the model carries {words}", model=clone)
    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "easycache", no_op)
    refused(rollout, "diffusion_model wrapper easycache", model=clone)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"hooks": object()}, "hooks"),
        ({"area": (1, 1, 0, 0)}, "an area"),
        ({"mask": torch.ones(1, 8, 8)}, "a mask"),
        ({"start_percent": 0.2}, "a timestep range"),
        ({"control": object()}, "a ControlNet"),
        ({"concat_latent_image": torch.zeros(1)}, "a concat latent image"),
        ({"reference_latents": [torch.zeros(1)]}, "reference latents"),
        ({"strength": 0.5}, "strength 0.5"),
        ({"time_dim_concat": torch.zeros(1)}, "reference frames"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_conditioning_that_cannot_be_honoured_is_refused(rollout, positive, extra, message):
    refused(rollout, message, positive=[[positive[0][0], extra]])


def test_prompts_of_the_wrong_shape_are_refused(rollout, positive):
    refused(rollout, "holds 2 conditioning entries", positive=positive * 2)
    refused(rollout, "holds 0 conditioning entries", positive=[])
    refused(rollout, "has 768 channels and the model reads 4096", positive=[[torch.zeros(1, 5, 768), {}]])
    refused(rollout, "a batch of 3 prompts for batch_size 1", positive=[[torch.zeros(3, 5, 4096), {}]])


def test_a_plan_that_does_not_fit_is_refused_before_loading(rollout, monkeypatch):
    loads = []
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: loads.append(a))
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 200_000)
    refused(rollout, r"GiB are free; window_frames \d+ would fit", window_frames=1000, length=4001)
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 1000)
    refused(rollout, "no window would fit", window_frames=1000, length=4001)
    assert not loads
    message = ""
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 200_000)
    try:
        rollout(window_frames=1000, length=4001)
    except ValueError as error:
        message = str(error)
    monkeypatch.undo()
    window = int(message.split("window_frames ")[1].split()[0])
    host_plan = rollout(window_frames=window, length=5).args[2]
    assert '"kv_bytes_planned"' in host_plan


def test_a_window_longer_than_the_video_is_neither_planned_nor_allocated(rollout, monkeypatch):
    fitting = rollout(window_frames=9)
    taken = sum(json.loads(fitting.args[2])["plan_bytes"].values())
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 2 * taken)
    endless = rollout(window_frames=4096)
    assert torch.equal(endless.args[0]["samples"], fitting.args[0]["samples"])
    report = json.loads(endless.args[2])
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] < 1.3 * json.loads(fitting.args[2])["kv_bytes_used"]
    refused(rollout, "GiB are free; window_frames", window_frames=4096, length=4001)


def test_the_past_in_8_bits_or_in_host_memory(rollout, node, monkeypatch):
    plain = rollout(window_frames=6, length=49)
    for cache_dtype, cache_device in (("model", "host memory"), ("int8", "gpu"), ("fp8", "host memory")):
        chosen = {"cache_dtype": cache_dtype, "cache_device": cache_device}
        out = rollout(window_frames=6, length=49, **chosen)
        report = json.loads(out.args[2])
        assert report["kv_bytes_used"] == report["kv_bytes_planned"] and chosen.items() <= report["settings"].items()
        assert (report["host_kv_bytes_used"] > 0) == (cache_device == "host memory")
        same = torch.equal(out.args[0]["samples"], plain.args[0]["samples"])
        assert same == (cache_dtype == "model")
    refused(rollout, "cache_dtype is fp8 in the state and model here", resume=out.args[1], window_frames=6, length=81)
    assert "cache_dtype is 'fp4'; it must be one of model, fp8, int8" in node("AdaStateRollout").validate(
        cache_dtype="fp4"
    )
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 2**40)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *device: 2**19)
    long = dict(cache_device="host memory", window_frames=300, length=1201)
    refused(rollout, "cache_device host memory needs .* of host memory", **long)


def test_a_model_that_nobody_holds_any_more_is_not_asked_what_it_takes(model, monkeypatch):
    """The host's list keeps its entry until it loads the next model; the entry's own model is gone."""
    comfy.model_management.load_models_gpu([model])
    listed = comfy.model_management.current_loaded_models
    gone = comfy.model_management.LoadedModel(model)
    monkeypatch.setattr(gone, "_model", lambda: None)
    with pytest.raises(AttributeError):
        gone.model_loaded_memory()
    before = adapter.available_bytes(model)
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [*listed, gone])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: before)
    assert adapter.available_bytes(model) >= before
