"""What a rollout says it will take, of the device, of host memory and of the disk, against what it took."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_pack.adastate_core.states.state_file import load_state, save_state
from adastate_pack.nodes import preflight
from adastate_pack.nodes.absorption_request import AbsorptionRequest
from adastate_pack.nodes.host import model as adapter
from conftest import PACK
from torch._subclasses.fake_tensor import FakeTensorMode

_SPEC = importlib.util.spec_from_file_location("live_bytes", PACK / "tests" / "core" / "live_bytes.py")
live_bytes = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(live_bytes)


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"autosave_seconds": 60.0} | inputs))


def report_of(out):
    return json.loads(out.args[2])


STATES = {
    "none": dict(anchor=Anchor()),
    "adaptive": dict(anchor=AnchorAdaptive(1)),
    "static": dict(anchor=AnchorStatic(2), positions="absolute"),
    "ema": dict(anchor=AnchorEMA(2, 0.9), window_frames=6),
    "int8": dict(anchor=AnchorAdaptive(1), cache_dtype="int8"),
    "host memory": dict(cache_device="host memory", window_frames=6),
    "batch": dict(batch_size=2, window_frames=6),
    "no latents": dict(keep_latents=False),
}


@pytest.mark.parametrize("streams", [False, True], ids=["latents", "stream"])
@pytest.mark.parametrize("case", STATES)
@pytest.mark.sampled(3)
def test_a_state_on_disk_is_planned(rollout, stream, tmp_path, case, streams):
    """Its tensors to 1 % (nothing pending is the least of it), the file with at most its header more."""
    more = STATES[case] | ({"stream": stream()} if streams else {})
    out = rollout(length=45, width=96, height=96, **more)
    state, planned = out.args[1], report_of(out)["memory_planned"]
    size = save_state(state, tmp_path / "a.state.safetensors").stat().st_size
    assert load_state(tmp_path / "a.state.safetensors").emitted == 12
    chunk = 3 * 16 * 12 * 12 * 4 * more.get("batch_size", 1)  # of pending latents there are none at the end
    assert (
        state.nbytes <= planned["host"]["state"] + planned["host"].get("kept_latents", 0) <= 1.01 * state.nbytes + chunk
    )
    assert size <= planned["disk"]["state"] <= 1.01 * size + chunk + 20_000


def test_a_state_of_an_absorption_is_planned(rollout):
    """In its warm-up, and once layers are switched."""
    settings = AbsorptionSettings(warmup_frames=12, local_window_frames=3, ratio=0.5)
    more = dict(absorption=AbsorptionRequest(settings), window_frames=15, width=96, height=96)
    for length in (33, 81):
        out = rollout(length=length, **more)
        planned = report_of(out)["memory_planned"]["host"]
        assert out.args[1].nbytes <= planned["state"] + planned["kept_latents"]


def test_what_the_report_says_was_planned_and_taken(rollout, stream):
    report = report_of(rollout(length=45, stream=stream()))
    planned, peak = report["memory_planned"], report["memory_peak"]
    names = {name: size for name, size in report["plan_bytes"].items() if size}
    assert names.items() <= planned["device"].items()
    assert set(planned["device"]) - set(names) == {"host_forward", "decoder"}
    assert set(planned["host"]) == {"latents", "kept_latents", "pictures", "state"} and set(planned["disk"]) == {
        "state"
    }
    assert peak == {"kv": report["kv_bytes_planned"], "host_kv": 0}
    quiet = report_of(rollout(length=45, stream=stream(autosave_seconds=0.0), keep_latents=False))["memory_planned"]
    assert "kept_latents" not in quiet["host"]


def test_a_state_that_host_memory_has_no_room_for_is_told(rollout, stream, monkeypatch):
    monkeypatch.setattr(preflight.host_model, "free_host_bytes", lambda: 1000)
    [warning] = [w for w in report_of(rollout(length=45, stream=stream()))["warnings"] if "host memory" in w]
    assert warning.startswith("a state of this rollout takes 0.00 GiB of host memory")
    assert warning.endswith("it may not be possible to save one; use a smaller window_frames or turn keep_latents off")


SHAPES = [(size, 16, (60, 104), n) for size in ((1536, 8960), (5120, 13824)) for n in (3, 4, 15)]


@pytest.mark.parametrize(("size", "channels", "latent", "frames"), [*SHAPES, ((3072, 14336), 48, (44, 80), 8)], ids=str)
def test_the_hosts_estimate_is_at_least_what_a_forward_takes(model, monkeypatch, size, channels, latent, frames):
    """Live bytes of the host's own forward at 832x480 (the 5B: 1280x704) in bfloat16, two layers, each of which gives back what
    it took; what lies between its attention's queries and its output is the pack's, and counted there."""
    (width, feed_forward), model = size, model if channels == 16 else tiny_5b.loaded_model()
    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", lambda q, k, v, heads, **more: torch.empty_like(q))
    with FakeTensorMode(), torch.inference_mode():
        wan = comfy.ldm.wan.model.WanModel(
            model_type="t2v", dim=width, ffn_dim=feed_forward, num_heads=width // 128, num_layers=2, in_dim=channels,
            out_dim=channels, operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.bfloat16,
        )  # fmt: skip
        context, time = torch.randn(1, 512, 4096, dtype=torch.bfloat16), torch.zeros(1)
        x = torch.randn(1, channels, frames, *latent, dtype=torch.bfloat16)
        with live_bytes.LiveBytes() as live:
            freqs = wan.rope_encode(frames, *latent, device="cpu", dtype=torch.float32)
            wan.forward_orig(x, time, context, freqs=freqs, transformer_options={})
    tiny = model.model
    as_wide = tiny.memory_usage_factor * width / tiny.diffusion_model.dim
    for name, value in (
        ("memory_usage_factor", as_wide),
        ("get_dtype", lambda: torch.bfloat16),
        ("manual_cast_dtype", None),
    ):
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)  # as on CUDA
    estimate = adapter.forward_bytes(
        model, SimpleNamespace(tokens=latent[0] * latent[1] // 4, batch=1, pass_frames=frames)
    )
    assert 0 < live.peak["cpu"] <= estimate <= 3 * live.peak["cpu"], (live.peak, estimate)


def test_the_most_that_a_state_takes_is_not_below_any_that_there_was(rollout):
    """At every length, so with latents pending and windows that are not full."""
    for length in range(5, 60, 8):
        out = rollout(length=length, anchor=AnchorAdaptive(1))
        planned, state = report_of(out)["memory_planned"], out.args[1]
        assert state.nbytes <= planned["host"]["state"] + planned["host"].get("kept_latents", 0)
