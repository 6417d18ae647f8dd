"""Files of the 5B line in the very formats that LongLive 2.0 writes, tiny: what loads, what it is taken for, what is refused."""

from __future__ import annotations

import json

import comfy.lora
import comfy.sd
import folder_paths
import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.defaults import resolve
from adastate_pack.nodes.host.checkpoint_wishes import DEFAULTS_KEY
from conftest import HostNode
from test_models import AUTO, load, loras, models, renamed, report_of, written  # noqa: F401

MERGED = {
    "checkpoint_format": "longlive_generator_merged_lora", "source_generator_ckpt": "/a/generator.pt",
    "source_lora_ckpt": "/a/lora.pt", "model_name": "Wan2.2-TI2V-5B", "dtype": "bfloat16", "merged_lora": True,
}  # fmt: skip
FOR_TE = {
    "checkpoint_format": "longlive_generator_merged_bf16", "checkpoint_version": 1, "source_generator_ckpt": None,
    "quantization": {"format": "bf16", "backend": "transformer_engine_runtime", "materialized": False, "materialized_modules": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return tiny_5b.model_state(dtype=torch.bfloat16)


def inspected(file, **more):
    return HostNode("AdaStateInspectCheckpoint")(file=file, **more).args[0]


# name: (what is beside the generator, the preset that it is taken for)
FILES = {
    "LongLive-2.0-5B/model_bf16.pt": (MERGED, "longlive2_5b"),
    "model_bf16.pt": (MERGED, "longlive2_5b"),
    "model.pt": ({}, ""),
    "LongLive-2.0-5B-NVFP4-S2/model_te.pt": (FOR_TE, "longlive2_5b_2step"),
    "self_forcing_dmd.pt": ({}, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_load_and_are_taken_for_what_they_are(models, state, name):  # noqa: F811
    beside, preset = FILES[name]
    file = written(models, name, {"generator": renamed(state, "model."), **beside})
    model = load(file)
    assert type(model.model.model_config).__name__ == "WAN22_T2V"
    held = model.model.diffusion_model.state_dict()
    assert held.keys() == state.keys() and all(torch.equal(held[key].bfloat16(), state[key]) for key in state)
    assert model.model_options.get(DEFAULTS_KEY, {}).get("preset", "") == preset
    said = inspected(file, width=1280, height=704)
    assert "Wan 2.2 5B, width 128: 2 layers" in said and "bfloat16" in said
    if preset:
        assert "taken for LongLive 2.0, 5B" in said and "sampler unipc" in said and "latent space" not in said
        assert "999, 833\n" in said if "2step" in preset else "999, 937, 833, 624\n" in said
    else:
        assert "nothing says how it is rolled out" in said
    frame = 2 * (704 // 32) * (1280 // 32) * 128 * 2 * 2
    assert f"{frame / 2**20:.1f} MiB a latent frame" in said
    with pytest.raises(ValueError, match="needs multiples of 32"):
        inspected(file, width=1264, height=704)


def test_bytes_of_transformer_engine_are_left_out_and_said(models, state):  # noqa: F811
    linear = [name.removesuffix(".weight") for name in state if name.endswith("_attn.q.weight")]
    extra = {f"model.{name}._extra_state": torch.arange(9, dtype=torch.uint8) for name in linear}
    file = written(models, "longlive2.pt", {"generator": renamed(state, "model.") | extra, **FOR_TE})
    words = "4 weights that a Wan 2.2 text-to-video model has no place for and that a rollout does without: 4 of Transformer"
    out = HostNode("AdaStateLoadModel")(file=file, weight_dtype="default")
    assert words in out.ui.as_dict()["text"][0] and words in inspected(file)


def packed(state):
    """As FourOverSix writes it: the linear layers of the blocks in 4 bits, without their weights."""
    out = {}
    for name, value in state.items():
        if not (name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2):
            out[f"model.{name}"] = value
            continue
        rows, columns = value.shape
        base = f"model.{name.removesuffix('weight')}quantized_weight_"
        out |= {
            f"{base}values": torch.zeros(rows, columns // 2, dtype=torch.uint8), f"{base}amax": torch.ones(1),
            f"{base}scale_factors": torch.zeros(rows * columns // 16, dtype=torch.float8_e4m3fn),
            f"{base}metadata": torch.tensor([rows, columns, rows, columns], dtype=torch.int32),
        }  # fmt: skip
    return {"generator": out, "checkpoint_format": "longlive_generator_nvfp4", "quantization": {"format": "nvfp4"}}


def wrapped(state):
    """As TransformerEngine's own layers would write it."""
    return {
        "generator": {
            f"model.{name}".replace(".q.", ".q.linear.").replace(".0.weight", ".0.linear.weight"): value
            for name, value in state.items()
        },
        "checkpoint_format": "longlive_generator_te_nvfp4",
    }


REFUSED = {
    "model_4o6.pt": (
        packed,
        r"holds 20 weights packed in 4 bits \(NVFP4 of FourOverSix.*: take model_te.pt of the same",
    ),
    "te.pt": (wrapped, "was saved out of TransformerEngine's own layers .*: take LongLive 2.0's model_te.pt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_packed_for_another_library_is_refused_by_name(models, state, name, monkeypatch):  # noqa: F811
    make, words = REFUSED[name]
    file = written(models, name, make(state))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *a, **k: pytest.fail("loaded"))
    for run in (load, inspected):
        with pytest.raises(ValueError, match=f"^{name} {words}") as error:
            run(file)
        assert "\n" not in str(error.value)


def test_more_channels_in_than_out_are_refused(models, state):  # noqa: F811
    wide = state | {"patch_embedding.weight": torch.zeros(128, 100, 1, 2, 2)}
    file = written(models, "i2v.safetensors", wide)
    assert "it takes 100 input channels; a rollout needs plain text to video with 48" in inspected(file)
    with pytest.raises(ValueError, match="the model takes 100 input channels; a rollout needs plain .* with 48"):
        load(file)


def test_its_lora_is_read_whole(models, loras, state):  # noqa: F811
    """peft's names as the trainer leaves them, rank and alpha alike: the scale is 1."""
    generator = torch.Generator().manual_seed(3)
    weights = [n for n, w in state.items() if n.startswith("blocks.") and n.endswith(".weight") and w.ndim == 2]
    lora, update = {}, {}
    for name in weights:
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((8, state[name].shape[1]), (state[name].shape[0], 8))
        )
        module = f"base_model.model.{name.removesuffix('.weight')}"
        lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        update[f"diffusion_model.{name}"] = up @ down
    torch.save({"generator_lora": lora, "critic_lora": lora, "step": 1}, loras / "lora.pt")
    folder_paths.filename_list_cache.clear()
    model = load(written(models, "LongLive2.pt", {"generator": renamed(state, "model.")}))
    out = HostNode("AdaStateLoadLora")(model=model, file="lora.pt")
    assert out.ui is None and out.args[0].patches.keys() == update.keys()
    for name, expected in update.items():
        got = comfy.lora.calculate_weight(out.args[0].patches[name], torch.zeros_like(expected), name)
        torch.testing.assert_close(got, expected)


def test_a_preset_for_another_latent_space_says_so(model):
    told = HostNode("AdaStateModelPreset")(model=model, preset="longlive2_5b").args[1]
    words = "its weights work in the latent space of Wan 2.2 (48 channels)"
    assert f"{words}, and those of this model in that of Wan 2.1 (16)" in told
    five = tiny_5b.loaded_model()
    assert "latent space" not in HostNode("AdaStateModelPreset")(model=five, preset="longlive2_5b").args[1]
    told = HostNode("AdaStateModelPreset")(model=five, preset="self_forcing").args[1]
    assert "the latent space of Wan 2.1 (16 channels), and those of this model in that of Wan 2.2 (48)" in told


def test_a_list_of_the_hosts_that_is_the_presets_is_taken_as_the_preset_has_it():
    """Its scheduler begins at 1, where UniPC is another than at 0.9998."""
    resolved = resolve({"preset": "longlive2_5b"}, {}, None)
    assert (
        resolved.given_schedule((1.0, 0.9375, 5 / 6, 0.625, 0.0))
        == resolved.schedule
        == PRESETS["longlive2_5b"].schedule
    )
    others = resolved.given_schedule((1.0, 0.5, 0.0))
    assert (others.sigmas, others.told, others.sampler) == ((1.0, 0.5), (), "unipc")


SMALL = AUTO | {"steps": 3, "length": 13}


def test_a_sampler_of_ones_own_is_used_and_told(model, node, rollout):
    for preset, sampler, used in (
        ("longlive", "auto", "renoising"),
        ("longlive", "unipc", "unipc"),
        ("longlive2_5b", "euler", "euler"),
    ):
        given, text = node("AdaStateModelPreset")(model=model, preset=preset, sampler=sampler).args
        settings = report_of(rollout(model=given, **SMALL))["settings"]
        words, numbers = node("AdaStatePlan")(model=given, width=32, height=32, length=13).args
        assert settings["sampler"] == json.loads(numbers)["settings"]["sampler"] == used
        assert f"4 noisy passes a chunk, by the sampler {used}" in words
        assert ("uses the sampler" in text) == (sampler != "auto")
    assert "it uses the sampler euler, and not its own unipc" in text
    with pytest.raises(
        ValueError, match="the sampler is euler, and Rolling Forcing denoises chunks together, which only renoising"
    ):
        node("AdaStateModelPreset")(model=model, preset="rolling_forcing", sampler="euler")


def test_a_file_may_name_its_sampler(models, wan_state, rollout):  # noqa: F811
    def used(own):
        file = written(models, "x.safetensors", wan_state, {"adastate": json.dumps(own)})
        return report_of(rollout(model=load(file), **SMALL)), inspected(file)

    report, said = used({"steps": 3, "sampler": "euler", "start": "inside", "fps": 24.0})
    assert report["settings"]["sampler"] == "euler" and '"sampler": "euler", "start": "inside", "fps": 24.0' in said
    report, said = used({"preset": "self_forcing", "sampler": "unipc"})
    assert report["settings"]["sampler"] == "unipc" and "uses the sampler unipc, and not its own renoising" in said
    report, _ = used({"sampler": "heun", "start": ["inside"]})
    assert "say sampler 'heun', start a list, which makes no sense here" in report["warnings"][0]
    with pytest.raises(ValueError, match="Rolling Forcing denoises chunks together, which only renoising does"):
        used({"preset": "rolling_forcing", "sampler": "euler"})
