"""Low-rank updates of a Wan model: trained in place of its matrices, written as the host's LoRA loader takes them.

Key names are the host's generic ones (comfy/lora.py): `diffusion_model.<module>.lora_down.weight`, `.lora_up.weight`,
`.alpha`, and `.diff` / `.diff_b` for what is not a matrix.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils import parametrize

from adastate_core.files.whole_file import whole_file

from .bare_model import load_denoiser

PREFIX = "diffusion_model."


class LowRank(nn.Module):
    """weight + up @ down; `down` starts random, `up` at zero, so that nothing changes at first."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def train_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze `model` and give every linear layer inside its blocks a trainable update of `rank`."""
    model.requires_grad_(False)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def student_of(config: dict) -> nn.Module:
    """The transformer that `start_from` names, to be trained whole, or by updates of `lora_rank` if that is given."""
    model = load_denoiser(config["start_from"])
    if config.get("lora_rank"):
        train_low_rank(model, config["lora_rank"])
    return model


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The plain state dict, with trained updates added in."""
    weights = {}
    for name, value in model.state_dict().items():
        if not name.endswith((".down", ".up")):
            weights[name.replace("parametrizations.weight.original", "weight")] = value
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            weights[f"{name}.weight"] = module.weight.detach().clone()
    return weights


def low_rank_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained updates by the host's names."""
    parts = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            update = module.parametrizations.weight[0]
            parts[f"{PREFIX}{name}.lora_down.weight"] = update.down.detach().clone()
            parts[f"{PREFIX}{name}.lora_up.weight"] = update.up.detach().clone()
            parts[f"{PREFIX}{name}.alpha"] = torch.tensor(float(update.down.shape[0]))
    return parts


def save_lora(parts: dict[str, torch.Tensor], path: Path, rollout: dict) -> None:
    """bf16 safetensors with the settings it was trained for as metadata (key "adastate", JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.to(torch.bfloat16).contiguous() for name, value in parts.items()}
    with whole_file(path) as file:
        file.write(save(halves, metadata={"format": "pt", "adastate": json.dumps(rollout)}))
    path.chmod(0o644)


def between(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best update of `rank` from one full set of weights to another, matrix by matrix; the rest as it differs.

    Modulations stay as they are: the host's patcher passes over parameters of modules that have modules in them.
    """
    parts = {}
    for name, value in tuned.items():
        difference = value.float() - base[name].float()
        if not bool(difference.any()) or name.endswith("modulation"):
            continue
        module, _, last = name.rpartition(".")
        if last == "weight" and difference.ndim == 2 and min(difference.shape) > rank:
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            root = s[:rank].sqrt()
            parts[f"{PREFIX}{module}.lora_up.weight"] = u[:, :rank] * root
            parts[f"{PREFIX}{module}.lora_down.weight"] = root[:, None] * v[:rank]
            parts[f"{PREFIX}{module}.alpha"] = torch.tensor(float(rank))
        elif last == "weight":
            parts[f"{PREFIX}{module}.diff"] = difference
        else:
            parts[f"{PREFIX}{module}.diff_b"] = difference
    return parts


@torch.no_grad()
def apply_lora(model: nn.Module, path: str) -> None:
    """Add a LoRA file to a bare model's weights, as the host does at strength 1; ValueError for keys it has not."""
    parts = {name.removeprefix(PREFIX): value.float() for name, value in load_file(path).items()}
    own = dict(model.named_parameters())
    used = set()
    for name in [n for n in parts if n.endswith(".lora_up.weight")]:
        module = name.removesuffix(".lora_up.weight")
        up, down = parts[name], parts[f"{module}.lora_down.weight"]
        scale = float(parts.get(f"{module}.alpha", torch.tensor(float(len(down))))) / len(down)
        own[f"{module}.weight"] += scale * (up @ down).view_as(own[f"{module}.weight"])
        used |= {name, f"{module}.lora_down.weight", f"{module}.alpha"}
    for name in parts.keys() - used:
        module, _, kind = name.rpartition(".")
        target = f"{module}.bias" if kind == "diff_b" else f"{module}.weight"
        if kind not in ("diff", "diff_b") or target not in own:
            raise ValueError(f"{path} holds {name}, which fits nothing in this model")
        own[target] += parts[name]
