"""LoRAs of causal Wan models as trainers leave them, under the names that the host's own loader takes.

Every weight of a file goes to the host: peft's pairs, kohya's names (`lora_unet_blocks_0_...`), full differences (`diff`,
`diff_b`), DoRA, LoHa, LoKr and whatever else it knows. A torch file may hold them in `generator_lora`, as LongLive's does
(arXiv 2509.22622: rank 256 with alpha 256 on every linear layer of the blocks, so that its scale is 1 and there is no `alpha`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .checkpoints import LORA_PART, Checkpoint, open_checkpoint, plain_name
from .file_kind import CheckpointError, shown_name

PARTS = (LORA_PART, "lora", "state_dict")
HOSTS_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet_"
_KOHYAS = ("lora_unet__", "lycoris_", KOHYA_PREFIX)
_DOTTED = ("transformer.", "unet.", "pipe.dit.", "dit.")
TEXT_ENCODERS = ("lora_te", "text_encoder", "te.", "te1.", "te2.", "cond_stage_model.", "clip_")
_PART = re.compile(
    r"(?P<module>.+?)(?P<part>\.lora_[AB]|\.lora_(A|B|down|up|mid)(\.\w+)?\.weight|[._]lora\.(down|up)\.weight"
    r"|\.lora_linear_layer\.(down|up)\.weight|\.(alpha|dora_scale|diff|diff_b|diff_m|set_weight|w_norm|b_norm|reshape_weight"
    r"|hada_\w+|lokr_\w+|oft_\w+|rescale|[ab][12]\.weight))"
)
_ODD = re.compile(r"(?P<module>.+?)\.(?P<part>lora_.+)")  # lora_magnitude_vector, lora_B.bias
_SIDE = re.compile(r"[._]lora(_linear_layer)?[._](?P<side>A|B|down|up)(\.\w+)?(\.weight)?")
_SIDES = {"A": "down", "B": "up"}
_UP, _DOWN, _MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
# parts that bring an update of the weight by themselves: of two of one weight the host keeps the last
_UPDATES = (
    (_UP,),
    ("hada_w1_a",),
    ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    ("a1.weight",),
    ("oft_blocks",),
    ("w_norm",),
)
_UPDATES += (("diff",), ("set_weight",))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that has been looked into: of each of its modules the parts, by the host's names, and their names in the file."""

    checkpoint: Checkpoint
    modules: dict[str, dict[str, str]]  # module as the file calls it, prefix aside -> part -> name in the checkpoint

    @property
    def ranks(self) -> list[int]:
        """Every rank of a pair of matrices that occurs, in order."""
        return sorted({self._shape(parts[_DOWN])[0] for parts in self.modules.values() if _DOWN in parts})

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shapes[name]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether it is for a model with weights of these shapes by plain name.

        ValueError, naming the first module, where one is of another size, of a layer that the model has not, or none fits.
        """
        file = self.checkpoint.path.name
        known = targets(shapes)
        layers = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
        absent = []
        for module, parts in self.modules.items():
            target = known.get(module)
            if target is None:
                layer = re.match(rf"({KOHYA_PREFIX})?blocks[._](\d{{1,9}})[._]", module)
                if layer and int(layer[2]) >= layers:
                    raise ValueError(f"{file} is a LoRA of another model: this one has no {shown_name(module)}")
                absent.append(module)
            elif reason := self._misfit(target, parts, shapes):
                raise ValueError(f"{file} is a LoRA of another model: {reason}")
        if len(absent) == len(self.modules):
            what = "for a text encoder" if all(map(is_text_encoders, absent)) else "a LoRA of another model"
            raise ValueError(
                f"{file} is {what}: this one has no {shown_name(absent[0])}, nor any other of its {len(absent)} modules; load it "
                "with the loader of the model that it was made for"
            )

    def _misfit(self, target: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
        """How the parts of one module contradict the shape of its weight `target`, or nothing."""
        weight, module = shapes[target], target.removesuffix(".weight")
        bias = shapes.get(f"{module}.bias") if target.endswith(".weight") else None
        found = {part: self._shape(name) for part, name in parts.items()}
        if _UP in found:
            up, down = found[_UP], found[_DOWN]
            made = (up[0], prod(down[1:]) * prod(found.get(_MID, (0, 0))[2:]))
            if made != (weight[0], prod(weight[1:])):
                return f"{module} is {list(weight)} here and {list(made)} there"
        wanted = {"diff": weight, "set_weight": weight, "w_norm": weight, "diff_b": bias, "b_norm": bias}
        for part, shape in found.items():
            if wanted.get(part) not in (None, shape):
                return f"{module} is {list(wanted[part])} here and {list(shape)} there ({part})"
        if "reshape_weight" in parts and self.checkpoint.tensor(parts["reshape_weight"]).flatten().tolist() != list(
            weight
        ):
            return f"it makes {module}, which is {list(weight)} here, a weight of another size (reshape_weight)"
        scale, ones = found.get("dora_scale"), (1,) * (len(weight) - 2)
        if scale is not None and scale not in ((weight[0], 1, *ones), (1, *weight[1:2], *ones)):
            return f"{module} is {list(weight)} here and its dora_scale {list(scale)} there"
        return ""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the file, under the host's names."""
        held = dict(self.checkpoint.tensors())
        for module, parts in self.modules.items():
            for part, name in parts.items():
                yield hosts_name(module, part), held[name]

    def unread_scale(self) -> str:
        """What the file says of its scale in a place where the host does not look, or nothing: "alpha 32 for rank 16"."""
        if any("alpha" in parts for parts in self.modules.values()) or not self.ranks:
            return ""
        said = [each for each in self.checkpoint.beside if re.fullmatch(r"\w*alpha\w* [\d.]{1,12}", each)]
        said += [f"alpha {float(n):g}" for n in _numbers_of(self.checkpoint.metadata, "lora_alpha") if 0 < n < 1e6]
        ranks = {float(rank) for rank in self.ranks}
        return next((each for each in said if {float(each.split()[-1])} != ranks), "")

    def doubled(self) -> list[str]:
        """The modules with more than one update of the same weight."""
        return [m for m, parts in self.modules.items() if sum(any(p in parts for p in one) for one in _UPDATES) > 1]


def _numbers_of(metadata: Mapping[str, str], key: str) -> list[float]:
    """The numbers under names that end in `key` in peft's or kohya's metadata of a file."""
    found: dict[str, object] = {"lora_alpha": metadata.get("ss_network_alpha")}
    try:
        inner = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        inner = {}
    found |= inner if isinstance(inner, dict) else {}
    numbers = []
    for name, value in found.items():
        if name.endswith(key) and isinstance(value, (int, float, str)) and re.fullmatch(r"[\d.]{1,12}", str(value)):
            with suppress(ValueError):
                numbers.append(float(value))
    return numbers


def hosts_name(module: str, part: str) -> str:
    """What the host's loader calls a part of a module."""
    prefix = "" if module.startswith(KOHYA_PREFIX) or is_text_encoders(module) else HOSTS_PREFIX
    return f"{prefix}{module}.{part}"


def is_text_encoders(module: str) -> bool:
    """Whether a module's name is one of a text encoder."""
    return module.startswith(TEXT_ENCODERS)


def targets(shapes: Iterable[str]) -> dict[str, str]:
    """The weight that each module's name stands for, by Wan's own names and by kohya's."""
    found = {}
    for name in shapes:
        module = name.removesuffix(".weight")
        found[module] = name
        if module != name:
            found[KOHYA_PREFIX + module.replace(".", "_")] = name
    return found


def _split(name: str) -> tuple[str, str]:
    """(module, part) of a name in a file, the part by the host's name; an unknown part is the name's last word."""
    if match := _PART.fullmatch(name):
        module, part = match["module"], match["part"][1:]
        if side := _SIDE.fullmatch(match["part"]):
            part = f"lora_{_SIDES.get(side['side'], side['side'])}.weight"
    elif match := _ODD.fullmatch(name):
        module, part = match["module"], match["part"]
    else:
        module, _, part = name.rpartition(".")
        module, part = (module, part) if module else (name, "")
    for prefix in (*_KOHYAS, *_DOTTED):
        if module.startswith(prefix):
            return (KOHYA_PREFIX if prefix in _KOHYAS else "") + module.removeprefix(prefix), part
    return plain_name(module), part


def open_lora(path: Path | str) -> LoraFile:
    """Look into a LoRA's file. CheckpointError for one that cannot be read safely, holds no LoRA, or half of a pair."""
    checkpoint = open_checkpoint(path, PARTS)
    file = checkpoint.path.name
    if not any(_PART.fullmatch(name) for name in checkpoint.shapes):
        raise CheckpointError(
            f"{file} is no LoRA with Wan's own module names: it has no pair of lora_A and lora_B and no difference (diff) of a "
            "layer; a whole model is loaded with Load Causal Video Model"
        )
    modules: dict[str, dict[str, str]] = {}
    twice = checkpoint.twice
    for name in checkpoint.shapes:
        module, part = _split(name)
        other = modules.setdefault(module, {}).setdefault(part, name)
        if other != name and not twice:
            twice = f"{shown_name(module)} twice, as {shown_name(other)} and as {shown_name(name)}"
    if twice:
        raise CheckpointError(f"{file} holds {twice}, and nothing says which of them is meant")
    for module, parts in modules.items():
        if reason := _broken(parts, checkpoint.shapes):
            raise CheckpointError(f"{file} {reason.format(shown_name(module).replace('{', '(').replace('}', ')'))}")
    return LoraFile(checkpoint, modules)


def _broken(parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with a module by itself, with {} for its name, or nothing."""
    pair = [shapes[parts[part]] for part in (_DOWN, _UP) if part in parts]
    if len(pair) == 1:
        return "is incomplete: {} has only one of its two matrices"
    if pair:
        (down, up), mid = pair, shapes[parts[_MID]] if _MID in parts else None
        fits = len(down) in (2, 4, 5) and len(up) in (2, len(down)) and prod(up[1:]) == down[0]
        if mid is not None:
            fits = fits and len(mid) == 4 and mid[:2] == (down[0], down[0])
        if not fits:
            return f"does not fit together: {{}} has matrices of {list(down)} and {list(up)}"
    if "alpha" in parts and prod(shapes[parts["alpha"]]) != 1:
        return "does not fit together: alpha of {} is no single number"
    return ""
