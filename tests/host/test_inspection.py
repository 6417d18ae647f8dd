"""What a file is said to be and a rollout to take, against other ways to count; and files that mean harm."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct

import comfy.model_management
import folder_paths
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorEMA, AnchorReplay, AnchorStatic
from adastate_pack.adastate_core.weights import checkpoints
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.checkpoint_wishes import rollout_defaults
from conftest import HostNode, random_wan
from safetensors.torch import save_file
from test_absorption import DEFAULTS
from test_models import models, report_of, written  # noqa: F401


def inspected(file, **more):
    return HostNode("AdaStateInspectCheckpoint")(file=file, **more).args[0]


def planned(model, **more):
    text, numbers = HostNode("AdaStatePlan")(**({"model": model, "width": 32, "height": 32, "length": 33} | more)).args
    return text, json.loads(numbers)


class Harm:
    """Runs a command when it is unpickled the trusting way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def harmful(mark, state):
    """(file name, how to write it, words of the refusal)."""
    cut = {name: value for name, value in state.items() if "blocks.1." not in name}
    return {
        "cut.safetensors": (lambda p: (save_file(state, p), os.truncate(p, 5000)), "cannot be read as a checkpoint"),
        "long_header.safetensors": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "cannot be read"),
        "no_json.safetensors": (lambda p: p.write_bytes(struct.pack("<Q", 8) + b"notjson!"), "cannot be read"),
        "empty.safetensors": (lambda p: p.write_bytes(b""), "cannot be read as a checkpoint"),
        "empty.pt": (lambda p: p.write_bytes(b""), "cannot be read as a checkpoint"),
        "shape.safetensors": (
            lambda p: save_file(state | {"blocks.1.ffn.2.weight": torch.zeros(64, 128)}, p),
            r"blocks.1.ffn.2.weight is \[64, 128\] and should be \[128, 64\]",
        ),
        "layer.safetensors": (
            lambda p: save_file(cut | {"blocks.2.ffn.0.weight": torch.zeros(64, 128)}, p),
            "has 2 layers up to 2, and layer 1 is missing",
        ),
        "norm.pt": (
            lambda p: torch.save({n: t for n, t in state.items() if n != "blocks.0.norm3.bias"}, p),
            "blocks.0.norm3.bias is missing",
        ),
        "flux.safetensors": (lambda p: save_file({"double_blocks.0.x": torch.zeros(2)}, p), "is not a Wan transformer"),
        "code.pt": (lambda p: torch.save(state | {"x": Harm(mark)}, p), "is a pickle with more than tensors"),
        "plain_code.pt": (lambda p: p.write_bytes(pickle.dumps(Harm(mark))), "pickle with more|cannot be read"),
        "code.bin": (
            lambda p: p.write_bytes(pickle.dumps({"generator": Harm(mark)}, 4)),
            "pickle with more|cannot be read",
        ),
        "code.safetensors": (lambda p: torch.save(Harm(mark), p), "cannot be read as a checkpoint"),
        "object.pt": (
            lambda p: torch.save({"generator": torch.nn.Linear(2, 2)}, p),
            "is a pickle with more than tensors",
        ),
        "words.pt": (lambda p: torch.save({"generator": "words"}, p), "holds no weights"),
    }


@pytest.mark.parametrize("name", list(harmful(None, {})))
def test_files_that_mean_harm(models, wan_state, tmp_path, name, monkeypatch):  # noqa: F811
    mark = tmp_path / "ran"
    write, words = harmful(mark, {n: t.clone() for n, t in wan_state.items()})[name]
    write(models / name)
    folder_paths.filename_list_cache.clear()
    monkeypatch.setattr("comfy.sd.load_diffusion_model_state_dict", lambda *a, **k: pytest.fail("it was loaded"))
    for node_id, inputs in (("AdaStateLoadModel", {"weight_dtype": "default"}), ("AdaStateInspectCheckpoint", {})):
        assert HostNode(node_id).validate(file=name) is True
        with pytest.raises(ValueError, match=words) as refusal:
            HostNode(node_id)(file=name, **inputs)
        assert str(refusal.value).startswith(name) and "\n" not in str(refusal.value)
    assert not mark.exists()


def test_what_the_host_cannot_load_is_one_sentence(models, wan_state):  # noqa: F811
    other = dict(wan_state) | {"text_embedding.0.weight": torch.zeros(128, 4097)}
    written(models, "wide.safetensors", other)
    with pytest.raises(
        ValueError, match="wide.safetensors is laid out like .* cannot load it: .*text_embedding"
    ) as refusal:
        HostNode("AdaStateLoadModel")(file="wide.safetensors", weight_dtype="default")
    assert "\n" not in str(refusal.value)
    metadata = {"_quantization_metadata": "[1]"}
    written(models, "quant.safetensors", wan_state, metadata)
    with pytest.raises(ValueError, match="quant.safetensors is laid out like .* cannot load it"):
        HostNode("AdaStateLoadModel")(file="quant.safetensors", weight_dtype="default")
    written(models, "i2v.safetensors", random_wan(in_dim=36))
    assert "it takes 36 input channels; a rollout needs plain text to video with 16" in inspected("i2v.safetensors")


def wan_header(width, feed_forward, layers, prefix=""):
    """The header of a bf16 Wan 2.1 safetensors file, by hand, and the bytes of its weights."""
    shapes = {
        "patch_embedding": (width, 16, 1, 2, 2), "text_embedding.0": (width, 4096), "text_embedding.2": (width, width),
        "time_embedding.0": (width, 256), "time_embedding.2": (width, width), "time_projection.1": (6 * width, width),
        "head.head": (64, width),
    }  # fmt: skip
    plain = {"head.modulation": (1, 2, width)}
    for i in range(layers):
        plain |= {f"blocks.{i}.modulation": (1, 6, width)}
        plain |= {f"blocks.{i}.norm3.{part}": (width,) for part in ("weight", "bias")}
        for kind in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{i}.{kind}.{name}": (width, width) for name in "qkvo"}
            plain |= {f"blocks.{i}.{kind}.norm_{name}.weight": (width,) for name in "qk"}
        shapes |= {f"blocks.{i}.ffn.0": (feed_forward, width), f"blocks.{i}.ffn.2": (width, feed_forward)}
    plain |= {f"{name}.weight": shape for name, shape in shapes.items()}
    plain |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    header, end = {}, 0
    for name, shape in plain.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[prefix + name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    return header, end


@pytest.mark.parametrize(
    ("name", "width", "feed_forward", "layers", "parameters"),
    [("krea_realtime.safetensors", 5120, 13824, 40, 14.29e9), ("self_forcing.safetensors", 1536, 8960, 30, 1.42e9)],
    ids=["14B", "1.3B"],
)
def test_a_big_file_is_told_by_its_header(models, model, monkeypatch, name, width, feed_forward, layers, parameters):  # noqa: F811
    """The file is sparse: nothing but its header is ever written or may be read."""
    header, count = wan_header(width, feed_forward, layers, "model.")
    text = json.dumps(header).encode()
    with open(models / name, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count)
    folder_paths.filename_list_cache.clear()
    assert count / 2 == pytest.approx(parameters, rel=2e-3)
    monkeypatch.setattr(checkpoints.Checkpoint, "tensors", lambda self: pytest.fail("weights were read"))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: pytest.fail("it was loaded"))
    said = inspected(name, width=832, height=480, length=165)
    assert f"{'14B' if width == 5120 else '1.3B'}: {layers} layers of width {width}, {width // 128} heads" in said
    assert f"{len(header)} weights, {count / 2**30:.2f} GiB in bfloat16" in said
    frame = 2 * (480 // 16) * (832 // 16) * width * layers * 2
    a_frame = f"{frame / 2**30:.2f} GiB" if frame >= 2**30 else f"{frame / 2**20:.1f} MiB"
    assert f"{a_frame} a latent frame" in said and f"would be {42 * frame / 2**30:.2f} GiB" in said
    window = 3 if name.startswith("krea") else 18
    kept = (window + 3) * frame  # window and chunk; keys that never move need no second copy
    assert f"{kept / 2**30:.2f} GiB for a window of {window} at any length" in said
    assert ("was made for 21 latent frames (81 pictures) and 42 were asked for" in said) == (window == 18)
    assert "was made for" not in inspected(name, length=81)
    assert rollout_defaults(model) is None  # which looks into every file


def test_what_is_said_of_other_files(models, wan_state):  # noqa: F811
    written(models, "a.pt", {"generator_ema": wan_state, "generator": random_wan(seed=3)})
    said = inspected("a.pt", width=32, height=32)
    assert "layout: a torch file, its generator_ema" in said and "taken for Self-Forcing (arXiv 2506.08009)" in said
    assert "it makes 16 frames a second" in said
    assert "width 128: 2 layers of width 128, 1 heads, feed-forward 64" in said
    written(models, "b.safetensors", wan_state)
    assert "nothing says how it is rolled out; choose one of the presets self_forcing, " in inspected("b.safetensors")
    written(models, "c.safetensors", wan_state, {"adastate": json.dumps({"window_frames": 6, "fingerprints": ["f"]})})
    assert 'its own settings: {"window_frames": 6}' in inspected("c.safetensors")
    assert "width is 100; it must be a multiple of 16" in HostNode("AdaStateInspectCheckpoint").validate(
        file="b.safetensors", width=100
    )
    for node_id, inputs in (("AdaStateInspectCheckpoint", {"file": "b.safetensors"}), ("AdaStatePlan", {"length": 9})):
        with pytest.raises(ValueError, match="height is 20; it must be a multiple of 16"):
            HostNode(node_id)(width=32, height=20, **inputs, **({"model": None} if node_id == "AdaStatePlan" else {}))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"window_frames": 6, "batch_size": 2, "positions": "fixed"},
        {"anchor": AnchorEMA(2, 0.9), "window_frames": 4},
        {"anchor": AnchorReplay(9), "window_frames": 7, "positions": "absolute"},
        {"anchor": AnchorStatic(2), "chunk_frames": 2, "window_frames": 0},
    ],
    ids=str,
)
def test_the_plan_is_what_a_rollout_reports(model, rollout, more):
    text, plan = planned(model, **more)
    numbers = {"chunk_frames": 0, "window_frames": -1, "positions": "auto"} | more
    report = report_of(rollout(length=33, **numbers))
    names = set(plan["plan_bytes"]) - {"text_kv", "vae_cache", "absorption", "working"}
    assert {name: plan["plan_bytes"][name] for name in names} == {name: report["plan_bytes"][name] for name in names}
    assert plan["plan_bytes"]["working"] > report["plan_bytes"]["working"] > 0  # the noise of 4 steps, and of 2
    assert plan["kv_bytes"] == report["kv_bytes_used"] and plan["fits"] is True
    assert plan["plan_bytes"]["text_kv"] == report["plan_bytes"]["text_kv"] * 512 // 5
    batch = more.get("batch_size", 1)
    assert plan["kept_latents_bytes"] == batch * 16 * 9 * 4 * 4 * 4 and "for 9 latent frames" in text
    assert plan["total_bytes"] == sum(plan["plan_bytes"].values())
    assert {name: report["settings"][name] for name in plan["settings"]} | {"steps": 4} == plan["settings"]
    assert plan["anchor"] == report["settings"]["anchor"]


def test_a_plan_counts_the_decoder_and_loads_nothing(model, vae, rollout, node, monkeypatch):
    settings = {"filename_prefix": "a", "fps": 16.0, "codec": "h264", "quality": 18, "preview": False}
    report = report_of(rollout(length=9, stream=node("AdaStateStreamOutput")(vae=vae, **settings).args[0]))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: pytest.fail("it was loaded"))
    text, plan = planned(model, vae=vae)
    assert plan["plan_bytes"]["vae_cache"] == report["plan_bytes"]["vae_cache"] > 0
    assert plan["memory"]["device"]["decoder"] == report["memory_planned"]["device"]["decoder"] > 0
    assert "to decode a chunk" in text
    text, plan = planned(model)
    assert plan["plan_bytes"]["vae_cache"] == 0 and "decoder" not in plan["memory"]["device"]
    assert "to decode a chunk" not in text


def test_a_plan_follows_a_preset_and_warns(model, node):
    given = node("AdaStateModelPreset")(model=model, preset="self_forcing").args[0]
    text, plan = planned(given, length=85)
    assert plan["settings"]["window_frames"] == 18 and plan["settings"]["positions"] == "absolute"
    assert len(plan["warnings"]) == 1 and plan["warnings"][0] in text
    assert planned(given, length=81)[1]["warnings"] == []
    with pytest.raises(ValueError, match="positions is 'absolute' with the ema anchor"):
        planned(given, positions="absolute", anchor=AnchorEMA(2, 0.9))


def test_a_plan_that_does_not_fit_says_what_would(model, monkeypatch, rollout):
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 3_500_000)
    text, plan = planned(model, window_frames=1000, length=8001)
    assert plan["fits"] is False and plan["free_bytes"] == 3_500_000 and "window_frames " in text
    window = int(text.split("; window_frames ")[1].split()[0])
    assert planned(model, window_frames=window, length=8001)[1]["fits"] is True
    assert planned(model, window_frames=window + 1, length=8001)[1]["fits"] is False
    short, plan = planned(model, window_frames=1000)
    assert (
        plan["fits"] is True and "however long the video is" in short and "the same at any length" in planned(model)[0]
    )
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 1000)
    assert "no window would fit" in planned(model)[0]


def test_a_plan_is_made_anew_at_every_run(node):
    fingerprint = node("AdaStatePlan").node.fingerprint_inputs(model=None, width=32, height=32, length=9)
    assert fingerprint != fingerprint


@pytest.mark.parametrize("cache_device", ["gpu", "host memory"])
@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_a_plan_with_another_cache_is_what_the_rollout_plans_and_uses(model, rollout, cache_dtype, cache_device):
    cache = {"cache_dtype": cache_dtype, "cache_device": cache_device, "window_frames": 9}
    text, numbers = planned(model, **cache)
    report = report_of(rollout(model=model, length=33, **cache))
    others = {name: numbers["plan_bytes"][name] for name in ("text_kv", "working")}  # of other prompts and steps
    assert numbers["plan_bytes"] == report["plan_bytes"] | others
    assert numbers["kv_bytes"] == report["kv_bytes_used"] and numbers["host_bytes"] == report["host_kv_bytes_used"]
    assert ("host_k: " in text) == (cache_device != "gpu")


def test_a_plan_counts_what_an_absorption_collects(model, rollout):
    absorption = HostNode("AdaStateAbsorption")(**(DEFAULTS | {"scope": "layer"})).args[0]
    more = {"absorption": absorption, "window_frames": 9}
    plain, numbers = planned(model, window_frames=9)[1], planned(model, **more)[1]
    report = report_of(rollout(model=model, length=33, **more))
    assert numbers["plan_bytes"]["absorption"] == report["plan_bytes"]["absorption"] > 0
    # statistics, and the work of taking them, which is more than that of attention alone
    assert numbers["total_bytes"] - plain["total_bytes"] >= numbers["plan_bytes"]["absorption"]
