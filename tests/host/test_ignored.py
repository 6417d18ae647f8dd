"""What the host would act on and a rollout cannot is refused by name, before anything is loaded; the rest acts or is told.

Set by the host's own nodes where it has them, through every door that takes a model: the rollout, the sampler, the plan.
"""

from __future__ import annotations

import json
import logging

import comfy.hooks
import comfy.ldm.wan.model as host_wan
import comfy.model_management
import comfy.nested_tensor
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from comfy.ldm.modules.attention import attention_basic, attention_pytorch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import (
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_differential_diffusion,
    nodes_easycache,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_rope,
    nodes_slg,
)
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from conftest import HostNode

from nodes import SetLatentNoiseMask

SIGMAS = torch.tensor([1.0, 5 / 6, 0.0])
UNKNOWN = "which AdaState does not know and does not act on"


def no_op(*args, **kwargs):
    return None


def by_method(name, *args):
    def put(model):
        clone = model.clone()
        getattr(clone, name)(*args)
        return clone

    return put


def by_option(name, value):
    def put(model):
        clone = model.clone()
        clone.model_options["transformer_options"][name] = value
        return clone

    return put


def deep_shrink(model):
    node, settings = nodes_model_downscale.PatchModelAddDownscale, (3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")
    return node.execute(model, *settings).args[0] if hasattr(node, "execute") else node().patch(model, *settings)[0]


def with_defaults(node, **given):
    """The first output of a node of the host's, with its own defaults: each host has others."""
    inputs = [each for each in node.define_schema().inputs if each.id not in given]
    own = {each.id: each.options[0] if each.default is None else each.default for each in inputs}
    return node.execute(**own, **given).args[0]


def rope_node(model, **scales):
    neutral = {f"{what}_{axis}": 1.0 if what == "scale" else 0.0 for what in ("scale", "shift") for axis in "xyt"}
    return nodes_rope.ScaleROPE.execute(model, **(neutral | scales)).args[0]


def wrapper_in_options(model):
    clone = model.clone()
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", no_op, clone.model_options, is_model_options=True)
    return clone


def callback(kind):
    return by_method("add_callback_with_key", kind, "theirs", no_op)


def written_over(model):
    """Another pack wrote a forward over the layer's own."""
    model.model.diffusion_model.blocks[1].cross_attn.forward = lambda x, context, **more: x
    return model


REFUSED = {
    "scale rope": (lambda m: rope_node(m, scale_t=2.0), r"RoPE options \(rope_options\).*remove the Scale RoPE node"),
    "deep shrink": (
        deep_shrink,
        r"the patch input_block_patch_after_skip, output_block_patch \(patches\).*remove the node that sets it",
    ),
    "slg": (
        lambda m: nodes_slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "1", "1", 0.0).args[0],
        "a post-CFG function",
    ),
    "slg simple": (
        lambda m: nodes_slg.SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "1", "").args[0],
        "a cond batch function",
    ),
    "pag": (lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0).args[0], "a post-CFG function"),
    "easycache": (
        lambda m: nodes_easycache.EasyCacheNode.execute(m, 0.2, 0.15, 0.95, False).args[0],
        "the outer_sample wrapper easycache",
    ),
    "lazycache": (
        lambda m: nodes_easycache.LazyCacheNode.execute(m, 0.2, 0.15, 0.95, False).args[0],
        "the outer_sample wrapper lazycache",
    ),
    "context windows": (
        lambda m: with_defaults(nodes_context_windows.WanContextWindowsManualNode, model=m),
        r"context windows \(context_handler\)",
    ),
    "differential diffusion": (
        lambda m: nodes_differential_diffusion.DifferentialDiffusion.execute(m).args[0],
        "a denoise mask function",
    ),
    "rescale cfg": (lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0], "a CFG function"),
    "torch.compile": (
        lambda m: [c := m.clone(), set_torch_compile_wrapper(c, backend="eager")][0],
        "the apply_model wrapper torch.compile",
    ),
    "wrapper in the options": (wrapper_in_options, "the apply_model wrapper theirs"),
    "attn1 patch": (by_method("set_model_attn1_patch", no_op), r"the patch attn1_patch \(patches\)"),
    "attn2 patch": (by_method("set_model_attn2_patch", no_op), r"the patch attn2_patch \(patches\)"),
    "attn1 output": (by_method("set_model_attn1_output_patch", no_op), "attn1_output_patch"),
    "attn1 replace": (
        by_method("set_model_attn1_replace", no_op, "double_block", 1),
        r"the patch attn1 double_block 1 \(patches_replace\)",
    ),
    "post input": (by_method("set_model_post_input_patch", no_op), "post_input"),
    "block": (
        by_method("set_model_patch_replace", lambda args, more: args, "dit", "double_block", 1),
        r"the patch dit double_block 1 \(patches_replace\)",
    ),
    "patches of a newer kind": (by_option("patches_of_tomorrow", [no_op]), r"patches \(patches_of_tomorrow\)"),
    "ar_config": (by_option("ar_config", {"initial_latent": 1}), "takes given frames at start_latent"),
    "step callback": (callback("on_prepare_state"), "the on_prepare_state callback theirs"),
    "nag": (
        by_method("add_object_patch", "diffusion_model.blocks.1.cross_attn.forward", no_op),
        r"another diffusion_model.blocks.1.cross_attn.forward",
    ),
    "self attention": (
        by_method("add_object_patch", "diffusion_model.blocks.0.self_attn.forward", no_op),
        r"another diffusion_model.blocks.0.self_attn.forward",
    ),
    "written over": (written_over, r"another diffusion_model.blocks.1.cross_attn.forward"),
    "riflex": (
        by_method("add_object_patch", "diffusion_model.rope_embedder", torch.nn.Identity()),
        r"another diffusion_model.rope_embedder \(an object patch\)",
    ),
    "forward": (by_method("add_object_patch", "diffusion_model.forward", no_op), "another diffusion_model.forward"),
    "apply": (by_method("add_object_patch", "apply_model", no_op), "another apply_model"),
    "block object": (
        by_method("add_object_patch", "diffusion_model.blocks.1", torch.nn.Identity()),
        r"another diffusion_model.blocks.1 \(an object patch\)",
    ),
}


def sampled(model, positive, latent=None, cfg=None):
    sampler = HostNode("AdaStateSampler")(chunk_frames=3, window_frames=3, positions="packed").args[0]
    noise = HostNode("AdaStateNoise")(seed=5, chunk_frames=3).args[0]
    guider = nodes_custom_sampler.BasicGuider.execute(model, positive).args[0]
    latent = latent or EmptyHunyuanLatentVideo.execute(32, 32, 33, 1).args[0]
    with torch.inference_mode():
        return nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, SIGMAS, latent).args[0]


def planned(model, **more):
    return HostNode("AdaStatePlan")(**({"model": model, "width": 32, "height": 32, "length": 33} | more)).args


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_skipped_is_refused_by_name(rollout, model, positive, monkeypatch, name):
    put, message = REFUSED[name]
    given = put(model)
    loads = []
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: loads.append(a))
        for door in (lambda: rollout(model=given), lambda: planned(given)):
            with pytest.raises(ValueError, match=message) as refusal:
                door()
            assert "\n" not in str(refusal.value)
    assert not loads
    with pytest.raises(ValueError, match=message):
        sampled(given, positive)


def test_empty_entries_ask_for_nothing(rollout, model):
    clone = model.clone()
    clone.model_options["transformer_options"] |= {
        "patches": {"attn1_patch": []},
        "patches_replace": {"dit": {}},
        "wrappers": {"diffusion_model": {"theirs": []}},
        "callbacks": {},
        "rope_options": {},
    }
    clone.model_options["sampler_post_cfg_function"] = []
    out = rollout(model=clone)
    assert json.loads(out.args[2])["warnings"] == json.loads(rollout().args[2])["warnings"]


def test_a_run_callback_acts_where_the_host_runs_it(rollout, model, positive):
    """The host's guider calls it before a sampler; a rollout of ours has no such moment."""
    called = []
    clone = model.clone()
    clone.add_callback_with_key("on_pre_run", "theirs", called.append)
    with pytest.raises(ValueError, match="the on_pre_run callback theirs"):
        rollout(model=clone)
    sampled(clone, positive)
    assert len(called) == 1


def test_unknown_options_are_told_and_nothing_else_changes(rollout, model, positive, caplog):
    expected = rollout()
    clone = model.clone()
    clone.model_options["transformer_options"] |= {"tomorrows_key": 1, "sample_sigmas": SIGMAS, "block_index": 0}
    clone.model_options["another_key"] = {}
    clone.add_object_patch("adm_channels", 0)
    clone.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
    clone.add_callback_with_key("on_something", "theirs", no_op)
    clone.add_callback_with_key("on_load_after", "theirs", no_op)
    known = json.loads(expected.args[2])["warnings"]
    out = rollout(model=clone)
    told = json.loads(out.args[2])["warnings"][len(known) :]
    assert torch.equal(out.args[0]["samples"], expected.args[0]["samples"])
    text, numbers = planned(clone)
    assert json.loads(numbers)["warnings"][-4:] == told and all(warning in text for warning in told)
    with caplog.at_level(logging.WARNING, "adastate"):
        sampled(clone, positive)
    for name, warning in zip(("another_key", "tomorrows_key", "adm_channels", "on_something"), told, strict=True):
        assert f" {name}, {UNKNOWN}" in warning
        assert f"{name}, {UNKNOWN}" in caplog.text
    for harmless in ("model_sampling", "sample_sigmas", "uuids", "block_index", "on_load_after", "to_load_options"):
        assert harmless not in caplog.text + str(told)


def test_a_plain_sampling_run_has_nothing_to_tell(model, positive, caplog):
    with caplog.at_level(logging.WARNING, "adastate"):
        sampled(model, [[positive[0][0], {"pooled_output": None}]])
    assert UNKNOWN not in caplog.text


def test_unknown_conditioning_is_told(rollout, model, positive, caplog):
    base = json.loads(rollout().args[2])["warnings"]
    prompt = [[positive[0][0], {"pooled_output": torch.zeros(1, 8), "guidance": 3.5, "model_conds": {"extra": 1}}]]
    (told,) = json.loads(rollout(positive=prompt).args[2])["warnings"][len(base) :]
    assert told.startswith(f"positive carries guidance, model_conds extra, {UNKNOWN}")
    prompt[0][1].pop("model_conds")
    with caplog.at_level(logging.WARNING, "adastate"):
        sampled(model, prompt)
    assert f"positive carries guidance, {UNKNOWN}" in caplog.text


def test_hooks_of_a_text_encoder_are_refused(rollout, model, positive):
    """As a CLIP with hooks encodes: on the conditioning, and where the prompt follows the hooks' schedule."""
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.WeightHook())
    for extra, message in (
        ({"hooks": group}, r"hooks \(keyframed LoRA\)"),
        ({"clip_start_percent": 0.0, "clip_end_percent": 0.5}, "a schedule of text encoder hooks"),
        ({"additional_models": [1]}, "a model of its own"),
        ({"context_latents": [torch.zeros(1, 16, 1, 4, 4)]}, "reference latents"),
        ({"noise_concat": torch.zeros(1, 4, 3, 4, 4)}, "channels beside the noise"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout(positive=[[positive[0][0], extra]])


def test_a_noise_mask_on_start_latent_is_refused(rollout, monkeypatch):
    given = {"samples": torch.randn(1, 16, 3, 4, 4)}
    masked = SetLatentNoiseMask().set_mask(given, torch.ones(1, 32, 32))[0]
    loads = []
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: loads.append(a))
        with pytest.raises(ValueError, match="start_latent carries a noise mask .* remove Set Latent Noise Mask"):
            rollout(start_latent=masked)
    assert not loads
    nested = {"samples": comfy.nested_tensor.NestedTensor([given["samples"], torch.zeros(1, 8, 16)])}
    with pytest.raises(ValueError, match="several latents at once"):
        rollout(start_latent=nested)
    plain = rollout(start_latent=given)
    indexed = rollout(start_latent=given | {"batch_index": [3], "downscale_ratio_spacial": 8})
    assert torch.equal(indexed.args[0]["samples"], plain.args[0]["samples"])
    told = [w for w in json.loads(indexed.args[2])["warnings"] if w not in json.loads(plain.args[2])["warnings"]]
    assert told == ["start_latent carries batch_index, which a rollout does not use"]


@pytest.mark.parametrize("door", ["rollout", "sampler"])
def test_an_attention_override_acts_on_every_attention(rollout, model, positive, door):
    """Self and cross attention of every layer and pass, and it sees which noise level it is at."""
    seen = []

    def override(attention, q, k, v, heads, **more):
        options = more["transformer_options"]
        seen.append((tuple(q.shape), tuple(k.shape), round(float(options["sigmas"][0]), 4)))
        return attention_basic(q, k, v, heads) * 0.5

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override

    def run(given):
        return sampled(given, positive)["samples"] if door == "sampler" else rollout(model=given).args[0]["samples"]

    plain, halved = run(model), run(clone)
    chunks, steps, layers = 3, 2 + 1, 2
    assert len(seen) == chunks * steps * layers * 2
    assert [level for _, _, level in seen[:: 2 * layers]] == [1.0, 0.8333, 0.0] * chunks
    assert not torch.allclose(plain, halved, atol=1e-2)


def test_another_back_end_in_the_hosts_wan_acts(rollout, monkeypatch):
    """As packs that write over the name in the host's module do."""
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        return attention_pytorch(*args, **kwargs)

    monkeypatch.setattr(host_wan, "optimized_attention", theirs)
    rollout()
    assert len(calls) == 3 * 3 * 2 * 2


def test_a_compute_dtype_acts(rollout, model, positive):
    """The host's ModelComputeDtype node: the cache and the activations have it."""
    half = nodes_model_advanced.ModelComputeDtype().patch(model, "bf16")[0]
    plain, out = rollout(), rollout(model=half)
    bytes_of = [json.loads(each.args[2])["kv_bytes_used"] for each in (plain, out)]
    assert bytes_of[0] == 2 * bytes_of[1]
    difference = (out.args[0]["samples"] - plain.args[0]["samples"]).abs().max()
    assert 1e-4 < difference < 0.5
    assert torch.equal(sampled(half, positive)["samples"], rollout(model=half, sigmas=SIGMAS).args[0]["samples"])


def test_a_compiled_block_acts_and_the_model_is_known_after_it(rollout, model):
    clone, calls = model.clone(), []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    block = "diffusion_model.blocks.0"
    clone.add_object_patch(block, torch.compile(clone.get_model_object(block), backend=backend))
    plain = rollout().args[0]["samples"]
    for given in (clone, clone, model):
        torch.testing.assert_close(rollout(model=given).args[0]["samples"], plain, atol=1e-5, rtol=1e-5)
    assert calls


def test_a_rollout_is_not_taken_for_another_packs_patch(rollout, model, positive):
    """Its own forwards stay in the model until the host loads another clone."""
    first = rollout(anchor=AnchorAdaptive(1)).args[0]["samples"]
    assert "forward" in vars(model.model.diffusion_model.blocks[0].self_attn)
    planned(model)
    sampled(model, positive)
    assert torch.equal(rollout(anchor=AnchorAdaptive(1)).args[0]["samples"], first)


def test_what_another_clone_left_loaded_is_not_this_models(rollout, model, positive):
    """A clone with another attention was sampled with the host's own sampler before; the plain model does not have it."""
    plain = rollout().args[0]["samples"]
    theirs = model.clone()
    theirs.add_object_patch("diffusion_model.blocks.1.cross_attn.forward", lambda x, context, **more: x)
    comfy.model_management.load_models_gpu([theirs])
    assert "<lambda>" in model.model.diffusion_model.blocks[1].cross_attn.forward.__qualname__
    planned(model)
    assert torch.equal(rollout().args[0]["samples"], plain)
    comfy.model_management.load_models_gpu([theirs])
    assert torch.equal(sampled(model, positive)["samples"], rollout(sigmas=SIGMAS).args[0]["samples"])


def test_model_sampling_may_be_patched(rollout, model, positive):
    """A rollout has its own step list: Model Sampling SD3 only shapes the host's SIGMAS."""
    shifted = nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)[0]
    assert torch.equal(rollout(model=shifted).args[0]["samples"], rollout().args[0]["samples"])
    sampled(shifted, positive)


def test_where_an_override_does_not_act_is_told(rollout, model, node):
    """An absorption makes its watched passes of parts whose weights no attention function gives."""
    settings = {"ratio": 0.5, "warmup_frames": 12, "local_window_frames": 3, "sink_frames": 1, "ridge": "auto"}
    more = {"scope": "head", "rank": 8, "select": "residual", "absorb": True, "schedule": "once"}
    absorption = node("AdaStateAbsorption")(**settings, **more).args[0]
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *qkv, heads, **rest: (
        attention_pytorch(*qkv, heads)
    )
    told = "attention override (optimized_attention_override) is not used in passes that the absorption watches"
    for given, watching, expected in ((clone, absorption, True), (clone, None, False), (model, absorption, False)):
        report = json.loads(rollout(model=given, absorption=watching, window_frames=12).args[2])
        assert any(told in warning for warning in report["warnings"]) == expected


def test_a_batch_index_at_the_noise_node_is_told(node, caplog):
    noise = node("AdaStateNoise")(seed=5, chunk_frames=3).args[0]
    latent = EmptyHunyuanLatentVideo.execute(32, 32, 9, 1).args[0]
    with caplog.at_level(logging.WARNING, "adastate"):
        plain = noise.generate_noise(latent)
        assert not caplog.text
        assert torch.equal(noise.generate_noise(latent | {"batch_index": [2]}), plain)
    assert "the latent carries batch_index, which a rollout's noise does not use" in caplog.text
