"""LoRA files as trainers leave them: every layout gives the same pairs, and what is none is refused in one sentence."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import Harm, weights

from adastate_core.weights.checkpoints import open_checkpoint
from adastate_core.weights.lora_file import open_lora

RANK, MODULES = 4, ("blocks.0.self_attn.q", "blocks.1.ffn.0")


def pairs(sides: tuple[str, str], prefix: str = "", infix: str = "", adapter: str = "") -> dict[str, torch.Tensor]:
    """down [RANK, in] and up [out, RANK] of two modules under a trainer's names."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for module in MODULES:
        out, inner = weights()[f"{module}.weight"].shape
        name = prefix + module.replace("blocks.", f"blocks.{infix}", 1)
        found[f"{name}.lora_{sides[0]}{adapter}.weight"] = torch.randn(RANK, inner, generator=generator)
        found[f"{name}.lora_{sides[1]}{adapter}.weight"] = torch.randn(out, RANK, generator=generator)
    return found


PEFT = pairs(("A", "B"), "base_model.model.")
LAYOUTS = {
    "longlive.pt": {"generator_lora": PEFT, "critic_lora": {"x": torch.zeros(2)}, "step": 3000},
    "plain.pt": PEFT,
    "wrapped.pt": {"generator_lora": pairs(("A", "B"), "base_model.model.model.", "", ".default")},
    "peft.safetensors": PEFT,
    "flat.safetensors": {f"generator_lora.{name}": value for name, value in PEFT.items()},
    "hosts.safetensors": pairs(("down", "up"), "diffusion_model."),
    "compiled.safetensors": pairs(("A", "B"), "_orig_mod.base_model.model."),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pairs(name, tmp_path):
    content = LAYOUTS[name]
    save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(content, tmp_path / name)
    lora = open_lora(tmp_path / name)
    assert lora.ranks == [RANK]
    expected = pairs(("down", "up"), "diffusion_model.")
    found = dict(lora.tensors())
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    lora.check({name: tuple(weight.shape) for name, weight in weights().items()})


def test_alpha_is_kept(tmp_path):
    content = PEFT | {f"base_model.model.{MODULES[0]}.alpha": torch.tensor(2.0)}
    save_file(content, tmp_path / "a.safetensors")
    assert dict(open_lora(tmp_path / "a.safetensors").tensors())[f"diffusion_model.{MODULES[0]}.alpha"] == 2.0


def changed(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """PEFT with one entry changed, or without it."""
    rest = {key: tensor for key, tensor in PEFT.items() if not key.endswith(name)}
    return rest if value is None else rest | {f"base_model.model.{name}": value}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (weights(), "is no LoRA with Wan's own module names.*Load Causal Video Model"),
        ({"lora_unet_blocks_0_q.lora_down.weights": torch.zeros(2)}, "is no LoRA with Wan's own module names"),
        (changed("blocks.1.ffn.0.lora_B.weight", None), "is incomplete: blocks.1.ffn.0 has only one"),
        (
            changed("blocks.0.self_attn.q.lora_A.weight", torch.zeros(3, 128)),
            "does not fit together: blocks.0.self_attn.q has matrices of \\[3, 128\\] and \\[128, 4\\]",
        ),
        (
            changed("blocks.0.self_attn.q.lora_A.weight", torch.zeros(4)),
            "does not fit together: blocks.0.self_attn.q has matrices of \\[4\\]",
        ),
    ],
)
def test_what_is_no_lora_is_refused(content, words, tmp_path):
    save_file(content, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"bad.safetensors {words}") as error:
        open_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_another_models_lora_is_refused_by_the_first_module_that_does_not_fit(tmp_path):
    save_file(PEFT, tmp_path / "a.safetensors")
    lora = open_lora(tmp_path / "a.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in weights().items()}
    with pytest.raises(ValueError, match="a LoRA of another model: this one has no blocks.1.ffn.0"):
        lora.check({name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")})
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q is \[256, 128\] here and \[128, 128\] there"):
        lora.check(shapes | {"blocks.0.self_attn.q.weight": (256, 128)})


def test_code_in_a_lora_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"generator_lora": {"x": Harm(str(mark))}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harm(str(mark))))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name} (is a pickle with more than tensors|cannot be read)"):
            open_lora(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["longlive.pt", "peft.safetensors"])
def test_a_lora_in_the_place_of_a_model_says_which_node_reads_it(name, tmp_path):
    content = LAYOUTS[name]
    save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a LoRA and no model: .*Load Causal LoRA"):
        _ = open_checkpoint(tmp_path / name).geometry
