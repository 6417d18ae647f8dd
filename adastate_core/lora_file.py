"""LoRAs of causal Wan models as trainers leave them: peft's names, in safetensors or in a torch file that holds `generator_lora`.

LongLive's (arXiv 2509.22622) is one: rank 256 with alpha 256 on every linear layer of the blocks, so that its scale is 1 and the
file has no `alpha`. The names that come out are the ones the host's own loader takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import LORA_PART, Checkpoint, CheckpointError, open_checkpoint, plain_name

PARTS = (LORA_PART, "lora", "state_dict")
HOSTS_PREFIX = "diffusion_model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(\.\w+)?\.weight")
_SIDES = {"A": "down", "B": "up"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that has been looked into: of each module the shapes of `down` [rank, in] and `up` [out, rank]."""

    checkpoint: Checkpoint
    pairs: dict[str, dict[str, str]]  # module -> "down" and "up" -> name in the checkpoint

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, in order."""
        return sorted({self.checkpoint.shapes[pair["down"]][0] for pair in self.pairs.values()})

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError, naming the first module that does not fit the model's weights of these shapes by plain name."""
        file = self.checkpoint.path.name
        for module, pair in self.pairs.items():
            weight = shapes.get(f"{module}.weight")
            if weight is None:
                raise ValueError(f"{file} is a LoRA of another model: this one has no {module}")
            down, up = (self.checkpoint.shapes[pair[side]] for side in ("down", "up"))
            if (up[0], down[1]) != (weight[0], torch.Size(weight[1:]).numel()):
                raise ValueError(
                    f"{file} is a LoRA of another model: {module} is {list(weight)} here and [{up[0]}, {down[1]}] there"
                )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under the host's names; `alpha` too where the file has it."""
        held = dict(self.checkpoint.tensors())
        for module, pair in self.pairs.items():
            for side, name in pair.items():
                yield f"{HOSTS_PREFIX}{module}.lora_{side}.weight", held[name]
            alpha = held.get(f"{module}.alpha")
            if alpha is not None:
                yield f"{HOSTS_PREFIX}{module}.alpha", alpha


def open_lora(path: Path | str) -> LoraFile:
    """Look into a LoRA's file. CheckpointError for one that cannot be read safely, holds no LoRA, or half of a pair."""
    checkpoint = open_checkpoint(path, PARTS)
    pairs: dict[str, dict[str, str]] = {}
    for name in checkpoint.shapes:
        if match := _MATRIX.fullmatch(name):
            side = _SIDES.get(match["side"], match["side"])
            pairs.setdefault(plain_name(match["module"]), {})[side] = name
    file = checkpoint.path.name
    if not pairs:
        raise CheckpointError(
            f"{file} is no LoRA with Wan's own module names: it has no pair of lora_A and lora_B; a whole model is loaded with "
            "Load Causal Video Model, and a LoRA in another layout with the host's own LoRA loader"
        )
    for module, pair in pairs.items():
        shapes = [checkpoint.shapes[pair[side]] for side in ("down", "up") if side in pair]
        if len(shapes) < 2:
            raise CheckpointError(f"{file} is incomplete: {module} has only one of its two matrices")
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise CheckpointError(
                f"{file} does not fit together: {module} has matrices of {list(shapes[0])} and {list(shapes[1])}"
            )
    return LoraFile(checkpoint, pairs)
