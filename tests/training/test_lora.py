"""LoRA files: what the host's own loader makes of them is what training meant."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_denoiser import tiny_denoiser

from training.host_models import use_host
from training.lora import (
    apply_lora,
    between,
    low_rank_parts,
    save_lora,
    train_low_rank,
    train_towards,
    whole_weights,
)


@pytest.fixture
def model():
    return tiny_denoiser()


def through_the_host(model, path) -> dict[str, torch.Tensor]:
    """The weights after the host has loaded the model and put the LoRA on it at strength 1."""
    use_host()
    import comfy.sd
    import comfy.utils

    patcher = comfy.sd.load_diffusion_model_state_dict({n: v.clone() for n, v in model.state_dict().items()})
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(path)), 1.0, 0)
    patched.patch_model()
    return {n: v.detach().float().clone() for n, v in patched.model.diffusion_model.state_dict().items()}


def test_the_host_applies_a_difference_file_as_we_do(model, tmp_path):
    tuned = {n: v + 0.02 * torch.randn_like(v) for n, v in model.state_dict().items()}
    save_lora(between(model.state_dict(), tuned, 8), tmp_path / "lora.safetensors", {"steps": 4})
    hosts = through_the_host(model, tmp_path / "lora.safetensors")
    ours = copy.deepcopy(model)
    apply_lora(ours, str(tmp_path / "lora.safetensors"))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(hosts[name], value, atol=2e-3, rtol=2e-2, msg=name)
        reached = not torch.equal(hosts[name], model.state_dict()[name])
        assert reached != name.endswith("modulation"), f"{name}: the host's patcher passes over modulations alone"
        if value.ndim < 2:
            torch.testing.assert_close(hosts[name], tuned[name], atol=2e-3, rtol=2e-2, msg=name)


def test_a_difference_of_low_rank_comes_back_whole(model):
    base = model.state_dict()
    name = "blocks.1.ffn.0.weight"
    tuned = dict(base) | {name: base[name] + torch.randn(64, 4) @ torch.randn(4, 128)}
    parts = between(base, tuned, 8)
    assert sorted(parts) == [
        f"diffusion_model.blocks.1.ffn.0.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    stem = "diffusion_model.blocks.1.ffn.0"
    update = parts[f"{stem}.lora_up.weight"] @ parts[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(base[name] + update, tuned[name], atol=1e-4, rtol=1e-4)


def test_a_trained_low_rank_update_loads_in_the_host(model, tmp_path):
    plain = copy.deepcopy(model)
    train_low_rank(model, 4)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(n.endswith((".up", ".down")) for n in trainable)
    torch.testing.assert_close(model.blocks[0].ffn[0].weight, plain.blocks[0].ffn[0].weight)
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_lora(low_rank_parts(model), tmp_path / "lora.safetensors", {})
    hosts = through_the_host(plain, tmp_path / "lora.safetensors")
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight", "blocks.1.cross_attn.o.weight"):
        module = model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(hosts[name], module.weight, atol=4e-3, rtol=4e-2)
        assert not torch.equal(hosts[name], plain.state_dict()[name])
    folded = copy.deepcopy(plain)
    folded.load_state_dict(whole_weights(model))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(folded.get_submodule(name).weight, module.weight), name


def test_what_is_trained_towards_whole_weights_begins_there_and_is_all_in_the_file(model, tmp_path):
    """At first it is the host's model with the difference file on it; once trained, with the file that is written then."""
    base = copy.deepcopy(model)
    tuned = {n: v + 0.02 * torch.randn_like(v) for n, v in model.state_dict().items()}
    save_lora(between(model.state_dict(), tuned, 8), tmp_path / "first.safetensors", {})
    train_towards(model, tuned, 8)
    first = through_the_host(base, tmp_path / "first.safetensors")
    for name, value in whole_weights(model).items():
        torch.testing.assert_close(value, first[name], atol=2e-3, rtol=2e-2, msg=name)
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained and all(name.startswith("blocks.") and name.endswith((".down", ".up")) for name in trained)
    with torch.no_grad():
        for name, one in model.named_parameters():
            one += 0.05 * torch.randn_like(one) * (name in trained)
    save_lora(low_rank_parts(model), tmp_path / "last.safetensors", {})
    last = through_the_host(base, tmp_path / "last.safetensors")
    for name, value in whole_weights(model).items():
        torch.testing.assert_close(value, last[name], atol=5e-3, rtol=5e-2, msg=name)


def test_a_lora_of_something_else_is_refused(model, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.nowhere.diff": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="nowhere.diff, which fits nothing in this model"):
        apply_lora(model, str(path))
    assert load_file(path)
