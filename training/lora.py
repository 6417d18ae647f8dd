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

from .bare_model import load_denoiser, read_weights

PREFIX = "diffusion_model."


class LowRank(nn.Module):
    """weight + up @ down; `down` starts random, `up` at zero, so that nothing changes at first, unless both are given."""

    def __init__(self, weight: torch.Tensor, rank: int, given: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        up, down = given or (torch.zeros(rows, rank), torch.randn(rank, columns) / columns**0.5)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def train_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze `model` and give every linear layer inside its blocks a trainable update of `rank`."""
    model.requires_grad_(False)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def train_towards(model: nn.Module, tuned: dict[str, torch.Tensor], rank: int) -> None:
    """As `train_low_rank`, from the best updates of `rank` towards whole weights `tuned`; what differs outside the blocks' linear
    layers is put on the frozen model in the form that a LoRA file has, and kept for that file."""
    parts = between(model.state_dict(), tuned, rank)
    factors = {}
    for name, module in model.blocks.named_modules(prefix="blocks"):
        up = f"{PREFIX}{name}.lora_up.weight"
        if isinstance(module, nn.Linear) and up in parts:
            down, _ = parts.pop(f"{PREFIX}{name}.lora_down.weight"), parts.pop(f"{PREFIX}{name}.alpha")
            factors[module] = (parts.pop(up), down)
    model.requires_grad_(False)
    add_parts(model, parts)
    for module, given in factors.items():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, given))
    model.frozen_parts = parts


def student_of(config: dict) -> nn.Module:
    """The transformer that `start_from` names, to be trained whole, or by updates of `lora_rank` if that is given, which begin at
    nothing or at what leads to the weights that `lora_towards` names."""
    model = load_denoiser(config["start_from"])
    if config.get("lora_towards"):
        train_towards(model, read_weights(config["lora_towards"]), config["lora_rank"])
    elif config.get("lora_rank"):
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
    """The trained updates by the host's names, with what `train_towards` has put on the model beside them."""
    parts = dict(getattr(model, "frozen_parts", {}))
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
    if strange := add_parts(model, load_file(path)):
        raise ValueError(f"{path} holds {strange}, which fits nothing in this model")


def add_parts(model: nn.Module, parts: dict[str, torch.Tensor]) -> str | None:
    """Add a LoRA's parts to a bare model's weights; the first of them that fits nothing, which is left out."""
    parts = {name.removeprefix(PREFIX): value.float() for name, value in parts.items()}
    own = dict(model.named_parameters())
    used = set()
    for name in [n for n in parts if n.endswith(".lora_up.weight")]:
        module = name.removesuffix(".lora_up.weight")
        up, down = parts[name], parts[f"{module}.lora_down.weight"]
        scale = float(parts.get(f"{module}.alpha", torch.tensor(float(len(down))))) / len(down)
        own[f"{module}.weight"].data += scale * (up @ down).view_as(own[f"{module}.weight"])
        used |= {name, f"{module}.lora_down.weight", f"{module}.alpha"}
    for name in parts.keys() - used:
        module, _, kind = name.rpartition(".")
        target = f"{module}.bias" if kind == "diff_b" else f"{module}.weight"
        if kind not in ("diff", "diff_b") or target not in own:
            return name
        own[target].data += parts[name]
    return None
