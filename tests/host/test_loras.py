"""LoRAs in every layout that the host's loader knows: the same patches as its own Load LoRA gives, and none left out in silence."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import comfy.lora
import folder_paths
import pytest
import torch
from conftest import NODES, HostNode
from safetensors.torch import load_file, save_file
from test_models import AUTO, load, loras, models, report_of  # noqa: F401

WIDTH, HIDDEN, STRENGTH = 128, 64, 0.7
MODULES = {
    "blocks.0.self_attn.q": (WIDTH, WIDTH),
    "blocks.1.ffn.0": (HIDDEN, WIDTH),
    "blocks.0.cross_attn.k": (WIDTH, WIDTH),
}


def numbers(*shape, seed=0, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def pair(out, inner, up="lora_up.weight", down="lora_down.weight"):
    return {up: numbers(out, 4), down: numbers(4, inner)}


def loha(out, inner):
    return {
        "hada_w1_a": numbers(out, 4), "hada_w1_b": numbers(4, inner), "hada_w2_a": numbers(out, 4, seed=1),
        "hada_w2_b": numbers(4, inner, seed=1), "alpha": torch.tensor(2.0),
    }  # fmt: skip


def glora(out, inner):
    return {
        "a1.weight": numbers(4, inner), "a2.weight": numbers(inner, 4), "b1.weight": numbers(4, inner),
        "b2.weight": numbers(out, 4),
    }  # fmt: skip


KINDS = {
    "pair": pair,
    "pair with alpha": lambda o, i: pair(o, i) | {"alpha": torch.tensor(2.0)},
    "peft": lambda o, i: pair(o, i, "lora_B.weight", "lora_A.weight"),
    "peft's default": lambda o, i: pair(o, i, "lora_B.default.weight", "lora_A.default.weight"),
    "bare": lambda o, i: pair(o, i, "lora_B", "lora_A"),
    "diffusers": lambda o, i: pair(o, i, "lora.up.weight", "lora.down.weight"),
    "transformers": lambda o, i: pair(o, i, "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "with a middle": lambda o, i: pair(o, i) | {"lora_mid.weight": numbers(4, 4, 1, 1)},
    "dora": lambda o, i: pair(o, i) | {"dora_scale": 1 + numbers(o, 1)},
    "dora, other axis": lambda o, i: pair(o, i) | {"dora_scale": 1 + numbers(1, i)},
    "diff": lambda o, i: {"diff": numbers(o, i)},
    "diff and diff_b": lambda o, i: {"diff": numbers(o, i), "diff_b": numbers(o)},
    "pair and diff_b": lambda o, i: pair(o, i) | {"diff_b": numbers(o)},
    "w_norm and b_norm": lambda o, i: {"w_norm": numbers(o, i), "b_norm": numbers(o)},
    "set_weight": lambda o, i: {"set_weight": numbers(o, i)},
    "same size": lambda o, i: pair(o, i) | {"reshape_weight": torch.tensor([o, i])},
    "loha": loha,
    "lokr": lambda o, i: {"lokr_w1": numbers(8, 8), "lokr_w2": numbers(o // 8, i // 8)},
    "lokr, in factors": lambda o, i: {
        "lokr_w1": numbers(8, 8), "lokr_w2_a": numbers(o // 8, 2), "lokr_w2_b": numbers(2, i // 8), "alpha": torch.tensor(1.0),
    },
    "glora": glora,
    "oft": lambda o, i: {"oft_blocks": numbers(o // 16, 16, 16), "alpha": torch.tensor(0.1)},
    "boft": lambda o, i: {"oft_blocks": numbers(3, o // 16, 16, 16), "alpha": torch.tensor(0.1)},
}  # fmt: skip
NAMES = {
    "dots": lambda module: f"diffusion_model.{module}",
    "kohya": lambda module: "lora_unet_" + module.replace(".", "_"),
    "kohya, two strokes": lambda module: "lora_unet__" + module.replace(".", "_"),
}


def content(kind, name):
    return {f"{name(m)}.{part}": value for m, size in MODULES.items() for part, value in KINDS[kind](*size).items()}


def put(folder, weights, name="a.safetensors"):
    (save_file if name.endswith("safetensors") else torch.save)(weights, folder / name)
    folder_paths.filename_list_cache.clear()
    return name


def ours(model, file, strength=STRENGTH):
    return HostNode("AdaStateLoadLora")(model=model, file=file, strength=strength)


def theirs(model, file):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, STRENGTH)[0]


def merged(patcher):
    """What the host would run: every weight that has patches, with them."""
    held = patcher.model.state_dict()
    return {
        name: comfy.lora.calculate_weight(patches, held[name].clone().float(), name)
        for name, patches in patcher.patches.items()
    }


def same(a, b):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_patches_are_the_hosts(loras, model, name):  # noqa: F811
    plain = model.model.state_dict()
    for kind in KINDS:
        weights = content(kind, NAMES[name])
        # of kohya's names with two strokes the host knows pairs only
        knows = name != "kohya, two strokes" or "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in weights
        expected = merged(
            theirs(model, put(loras, weights if knows else content(kind, NAMES["kohya"]), "b.safetensors"))
        )
        out = ours(model, put(loras, weights))
        same(merged(out.args[0]), expected)
        assert out.ui is None and len(expected) == (1 + ("_b" in kind or "b_norm" in kind)) * len(MODULES), kind
        assert all((value - plain[key]).abs().max() > 1e-3 for key, value in expected.items()), kind


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "", "transformer.", "model.diffusion_model.", "_orig_mod.module."]
)
def test_trainers_prefixes_give_the_same(loras, model, prefix):  # noqa: F811
    for kind in ("peft", "dora", "diff and diff_b", "loha"):
        expected = merged(ours(model, put(loras, content(kind, NAMES["dots"]))).args[0])
        weights = content(kind, lambda module: prefix + module)
        for name, held in (("b.safetensors", weights), ("b.pt", {"generator_lora": weights, "step": 3})):
            same(merged(ours(model, put(loras, held, name)).args[0]), expected)


def test_the_numbers_are_those_of_the_formulas(loras, model, wan_state):  # noqa: F811
    """By hand, in float64; what a strength means is the host's: an update times the strength."""
    module, size = "blocks.1.ffn.0", (HIDDEN, WIDTH)
    weight, bias = (wan_state[f"{module}.{which}"].double() for which in ("weight", "bias"))

    def made(kind):
        weights = {f"diffusion_model.{module}.{part}": value for part, value in KINDS[kind](*size).items()}
        parts = {part: value.double() for part, value in KINDS[kind](*size).items()}
        return parts, merged(ours(model, put(loras, weights)).args[0])

    def close(found, expected):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)

    key = f"diffusion_model.{module}"
    p, found = made("pair with alpha")
    close(found[f"{key}.weight"], weight + STRENGTH * 2 / 4 * p["lora_up.weight"] @ p["lora_down.weight"])
    p, found = made("dora")
    whole = weight + p["lora_up.weight"] @ p["lora_down.weight"]
    turned = whole * p["dora_scale"] / weight.norm(dim=1, keepdim=True)
    close(found[f"{key}.weight"], weight + STRENGTH * (turned - weight))
    p, found = made("diff and diff_b")
    close(found[f"{key}.weight"], weight + STRENGTH * p["diff"])
    close(found[f"{key}.bias"], bias + STRENGTH * p["diff_b"])
    p, found = made("loha")
    product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    close(found[f"{key}.weight"], weight + STRENGTH * 2 / 4 * product)
    p, found = made("lokr")
    close(found[f"{key}.weight"], weight + STRENGTH * torch.kron(p["lokr_w1"], p["lokr_w2"]))


def test_norms_modulations_heads_and_embeddings_are_patched_too(loras, model, wan_state):  # noqa: F811
    names = ["blocks.0.norm3.weight", "blocks.1.self_attn.norm_q.weight", "patch_embedding.weight", "head.head.weight"]
    weights = {f"diffusion_model.{n.removesuffix('.weight')}.diff": numbers(*wan_state[n].shape) for n in names}
    weights |= {
        f"diffusion_model.{n}.diff": numbers(*wan_state[n].shape) for n in ("blocks.1.modulation", "head.modulation")
    }
    weights["diffusion_model.head.head.diff_b"] = numbers(64)
    weights["lora_unet_blocks_0_norm3.diff_b"] = numbers(WIDTH)
    out = ours(model, put(loras, weights))
    same(merged(out.args[0]), merged(theirs(model, "a.safetensors")))
    assert out.ui is None and len(out.args[0].patches) == 8


def test_an_alpha_that_is_a_plain_number_is_used(loras, model):  # noqa: F811
    weights = content("pair with alpha", NAMES["dots"])
    expected = merged(ours(model, put(loras, weights)).args[0])
    plain = {name: value.item() if name.endswith(".alpha") else value for name, value in weights.items()}
    same(merged(ours(model, put(loras, plain, "b.pt")).args[0]), expected)


LEFT = {
    "modules": (
        {f"diffusion_model.blocks.0.cross_attn.k_img.{p}": v for p, v in pair(WIDTH, WIDTH).items()},
        r"2 of modules that this model has not \(2 of blocks' cross_attn.k_img\)",
    ),
    "differences": ({"diffusion_model.blocks.0.diff_m": numbers(1, 6, WIDTH)}, r"1 that the host has no use for \(1 of diff_m\)"),
    "parts": (
        {"diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector": numbers(WIDTH)},
        r"1 that the host has no use for \(1 of lora_magnitude_vector\)",
    ),
    "biases": (
        {"diffusion_model.blocks.0.self_attn.q.lora_B.bias": numbers(WIDTH)},
        r"1 that the host has no use for \(1 of lora_B\)",
    ),
    "no bias there": (
        {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": numbers(WIDTH)},
        r"1 that the host has no use for \(1 of diff_b\)",
    ),
    "text encoders": (
        {f"lora_te_layers_0_mlp.{p}": v for p, v in pair(8, 8).items()}, "2 of a text encoder, which Load Causal LoRA leaves",
    ),
    "lonely scales": (
        {"diffusion_model.blocks.1.self_attn.k.dora_scale": numbers(WIDTH, 1)},
        r"1 that the host has no use for \(1 of dora_scale\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", LEFT)
def test_what_nobody_knows_is_counted_where_it_is_seen(loras, model, which, caplog):  # noqa: F811
    extra, words = LEFT[which]
    weights = content("pair", NAMES["dots"])
    out = ours(model, put(loras, weights | extra))
    text = out.ui.as_dict()["text"][0]
    assert re.search(words, text), text
    assert text.startswith(f"a.safetensors: of its {len(weights) + len(extra)} weights these are left out: ")
    assert text in caplog.text
    same(merged(out.args[0]), merged(ours(model, put(loras, weights)).args[0]))
    plan = HostNode("AdaStatePlan")(model=out.args[0].clone(), width=64, height=64, length=5)
    assert text in plan.args[0]


def test_two_loras_in_a_row_both_say_what_they_leave(loras, model, rollout):  # noqa: F811
    weights = content("pair", NAMES["dots"]) | LEFT["text encoders"][0]
    first = ours(model, put(loras, weights)).args[0]
    second = ours(first, put(loras, weights, "b.safetensors")).args[0]
    assert [note.partition(":")[0] for note in second.model_options["adastate_notes"]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    warnings = report_of(rollout(model=second, length=5, **AUTO))["warnings"]
    assert sum("2 of a text encoder" in each for each in warnings) == 2
    assert len(first.model_options["adastate_notes"]) == 1 and "adastate_notes" not in model.model_options


def test_two_updates_of_one_weight_are_said(loras, model):  # noqa: F811
    weights = content("pair", NAMES["dots"]) | content("diff", NAMES["dots"])
    out = ours(model, put(loras, weights))
    assert "more than one update of 3 of its modules, such as blocks." in out.ui.as_dict()["text"][0]
    same(merged(out.args[0]), merged(theirs(model, "a.safetensors")))


MODULE = "diffusion_model.blocks.0.self_attn.q"
REFUSED = {
    "diff": ({"diff": numbers(WIDTH, 64)}, r"blocks.0.self_attn.q is \[128, 128\] here and \[128, 64\] there \(diff\)"),
    "diff_b": ({"diff_b": numbers(64)}, r"blocks.0.self_attn.q is \[128\] here and \[64\] there \(diff_b\)"),
    "dora": (
        pair(WIDTH, WIDTH) | {"dora_scale": numbers(WIDTH)},
        r"\[128, 128\] here and its dora_scale \[128\] there",
    ),
    "larger": (pair(WIDTH, WIDTH) | {"reshape_weight": torch.tensor([256, 128])}, "a weight of another size"),
    "loha": (loha(WIDTH, 64), r"\[128, 128\] here and its update \(loha\) has another size"),
    "lokr": ({"lokr_w1": numbers(8, 8), "lokr_w2": numbers(8, 16)}, r"its update \(lokr\) has another size"),
    "oft": ({"oft_blocks": numbers(5, 16, 16)}, r"its update \(oft\) has another size"),
    "half a loha": ({"hada_w1_a": numbers(WIDTH, 4)}, "is incomplete: parts of .*blocks.0.self_attn.q are missing"),
    "half a lokr": ({"lokr_w1": numbers(8, 8)}, r"its update \(lokr\) has another size"),
    "a flat loha": (loha(WIDTH, WIDTH) | {"hada_w2_b": numbers(WIDTH)}, r"its update \(loha\) has another size"),
    "a flat lokr": (
        {"lokr_w1": numbers(8, 8), "lokr_w2_a": numbers(16), "lokr_w2_b": numbers(2, 16)},
        r"its update \(lokr\) has another size",
    ),
    "alphas": (pair(WIDTH, WIDTH) | {"alpha": numbers(3)}, "alpha of blocks.0.self_attn.q is no single number"),
    "only unknown": ({"dora_scale": numbers(WIDTH, 1)}, "holds 1 weights and the host has no use for any of them"),
}


def test_an_update_that_does_not_fit_is_refused(loras, model):  # noqa: F811
    for which, (parts, words) in REFUSED.items():
        put(loras, {f"{MODULE}.{part}": value for part, value in parts.items()})
        with pytest.raises(ValueError, match=f"^a.safetensors .*{words}") as error:
            ours(model, "a.safetensors")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300, which


def test_a_text_encoders_lora_and_an_adapter_with_two_sets_are_refused(loras, model):  # noqa: F811
    put(loras, LEFT["text encoders"][0])
    with pytest.raises(ValueError, match="a.safetensors is for a text encoder: this one has no lora_te_layers_0_mlp"):
        ours(model, "a.safetensors")
    two = content("peft's default", NAMES["dots"])
    two |= {name.replace("default", "second"): value + 1 for name, value in two.items()}
    put(loras, two)
    with pytest.raises(ValueError, match="a.safetensors holds blocks.0.* twice, as .*default.* and as .*second"):
        ours(model, "a.safetensors")


ODD_PARTS = (
    "lora_A.weight", "diff", "x", "alpha", "dora_scale", "hada_w1_a", "lokr_w1", "oft_blocks", "a1.weight", "w_norm", "b_norm",
    "set_weight", "reshape_weight", "lora_mid.weight",
)  # fmt: skip
ODD_NAMES = (
    "vace_patch_embedding.weight",
    "img_emb.emb_pos",
    "scaled_fp8",
    "ref_conv.weight",
    "blocks.x.y",
    "lora_te_a.alpha",
)


def odd(generator, weights):
    """A whole file in which some weights are gone, of another shape or kind, or have companions that make no sense."""
    weights = dict(weights)
    for _ in range(generator.randint(1, 4)):
        name, how = generator.choice(list(weights)), generator.randrange(7)
        value, shape = weights[name], generator.choice([(1,), (3, 3), (2, 4, 4), (1, 2, 3, 4), ()])
        if how == 0:
            del weights[name]
        elif how == 5:
            weights[f"{name.rpartition('.')[0]}.{generator.choice(ODD_PARTS)}"] = torch.ones(shape)
        elif how == 6:
            weights[generator.choice(ODD_NAMES)] = torch.ones(shape)
        else:
            weights[name] = (value.flatten(), value.flatten()[:1], torch.zeros(()), value.to(torch.int32))[how - 1]
    return {name: value.clone() for name, value in weights.items()}


def test_odd_files_are_used_or_refused_in_one_sentence(loras, models, model, wan_state):  # noqa: F811
    """Through the two nodes on the host itself; what is used is also merged, so that nothing fails later."""
    generator, refused = random.Random(11), 0
    lora = content("pair and diff_b", NAMES["dots"]) | {"lora_unet_blocks_0_norm3.diff": numbers(WIDTH)}
    for module, parts in (
        ("blocks_1_cross_attn_v", loha(WIDTH, WIDTH)),
        ("blocks_1_cross_attn_q", KINDS["lokr"](WIDTH, WIDTH)),
    ):
        lora |= {f"lora_unet_{module}.{part}": value for part, value in parts.items()}
    for index in range(100):
        suffix = ("safetensors", "pt")[index % 3 == 0]
        try:
            if index % 5:
                merged(ours(model, put(loras, odd(generator, lora), f"odd.{suffix}")).args[0])
            else:
                HostNode("AdaStateLoadModel")(
                    file=put(models, odd(generator, wan_state), f"odd.{suffix}"), weight_dtype="default"
                )
        except ValueError as error:
            refused += 1
            text = str(error)
            assert text.startswith(f"odd.{suffix} ") and "\n" not in text and len(text) < 500, text
            assert not re.search(r"NoneType|must be 2D|invalid for input|/odd|KeyError", text), text
    assert 50 < refused < 100


def test_a_scale_where_the_host_does_not_look_is_said(loras, model):  # noqa: F811
    weights = content("peft", lambda module: f"transformer.{module}")
    words = "for rank 4 where the host does not look for it, so the update has the scale 1"

    def told(file):
        ui = ours(model, file).ui
        return ui.as_dict()["text"][0] if ui else ""

    for metadata in (
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})},
        {"ss_network_alpha": "8.0"},
    ):
        save_file(weights, loras / "meta.safetensors", metadata=metadata)
        folder_paths.filename_list_cache.clear()
        assert f"says alpha 8 {words}" in told("meta.safetensors")
    assert f"says lora_alpha 8 {words}" in told(put(loras, {"generator_lora": weights, "lora_alpha": 8}, "a.pt"))
    assert told(put(loras, {"generator_lora": weights, "lora_alpha": 4, "step": 9}, "b.pt")) == ""
    for metadata in (
        {"lora_adapter_metadata": "[" * 9999},
        {"lora_adapter_metadata": "[1]", "ss_network_alpha": "None"},
    ):
        save_file(weights, loras / "odd.safetensors", metadata=metadata)
        folder_paths.filename_list_cache.clear()
        assert told("odd.safetensors") == ""


def test_the_shipped_lora_is_listed_and_makes_of_the_demo_what_its_file_says():
    """Every weight by hand, in float64; the file has no part that is left out."""
    file, demo = "adastate_journey_lora.safetensors", load("adastate_demo.safetensors")
    path = folder_paths.get_full_path("loras", file)
    assert file in NODES["AdaStateLoadLora"].INPUT_TYPES()["required"]["file"][1]["options"]
    assert Path(path).stat().st_size < 4_000_000
    parts = {name.removeprefix("diffusion_model."): value.double() for name, value in load_file(path).items()}
    base = {name: value.double() for name, value in demo.model.diffusion_model.state_dict().items()}
    expected = {name: value.clone() for name, value in base.items()}
    for name, value in parts.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "lora_up":
            down, alpha = parts[f"{module}.lora_down.weight"], parts[f"{module}.alpha"]
            expected[f"{module}.weight"] += value @ down * (alpha / len(down))
        elif part in ("diff", "diff_b"):
            expected[f"{module}.{'bias' if part == 'diff_b' else 'weight'}"] += value
    out = ours(demo, file, 1.0)
    assert out.ui is None
    changed = {name.removeprefix("diffusion_model."): value for name, value in merged(out.args[0]).items()}
    for name, value in changed.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-4, rtol=1e-4, msg=name)
    moved = {name for name, value in expected.items() if not torch.equal(value, base[name])}
    assert set(changed) >= moved and len(moved) > 100
