"""Seeded structural damage to the header JSON and the tensors of the pack's files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from hostile.json_values import damage_header
from safetensors import safe_open
from safetensors.torch import load_file

from adastate_core.files.tensor_file import write_tensors

DEEP = 3_000


def damage_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    """Change one tensor of a file in place; what it was."""
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    how = chance.choice(
        ["drop", "rename", "dtype", "axis", "flat", "cut", "empty", "bad", "swap", "scalar", "more", "ends"]
    )
    if how == "drop":
        del tensors[name]
    elif how == "rename":
        parts = name.split(".")
        parts[chance.randrange(len(parts))] = chance.choice(["x", "0", "99", "-1", "", "\u0661", "1e3", "9" * 5000])
        tensors[".".join(parts)] = tensors.pop(name)
    elif how == "dtype":
        kind = chance.choice([torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
        tensors[name] = tensor.float().nan_to_num().to(kind)
    elif how == "axis":
        tensors[name] = tensor[None] if chance.random() < 0.5 or not tensor.ndim else tensor[0].clone()
    elif how == "flat":
        tensors[name] = tensor.reshape(-1).clone()
    elif how == "cut":
        axis = chance.randrange(tensor.ndim) if tensor.ndim else None
        if axis is not None and tensor.shape[axis]:
            tensors[name] = tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
    elif how == "empty":
        tensors[name] = tensor.reshape(-1)[:0].clone() if tensor.ndim < 2 else tensor[..., :0].clone()
    elif how == "bad" and tensor.is_floating_point() and tensor.numel():
        spoilt = tensor.float().clone()
        spoilt.view(-1)[chance.randrange(spoilt.numel())] = chance.choice([float("nan"), float("inf"), -100.0, 0.0])
        tensors[name] = spoilt.to(tensor.dtype)
    elif how == "swap":
        other = chance.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    elif how == "scalar":
        tensors[name] = torch.tensor(0.5)
    elif how == "more":
        tensors[name + chance.choice(["x", ".0", "0", ""])] = torch.zeros(chance.choice([(), (1,), (2, 2)]))
    elif tensor.numel() and not tensor.is_floating_point() and tensor.dtype is not torch.bool:
        ends = torch.iinfo(tensor.dtype)
        tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice([ends.min, ends.max, 0])
    return f"{how} {name}"


def damage_texts(texts: dict[str, str], chance: random.Random) -> str:
    """Change what stands beside the header."""
    name = chance.choice(sorted(texts))
    bad = [
        "",
        "0",
        "abc",
        "null",
        "[" * DEEP,
        "{" * 9,
        '{"a": NaN}',
        "9" * 5000,
        '{"a":1,"a":2}',
        "\x00",
        "[1",
        "3",
        "\ud800",
    ]
    if chance.random() < 0.2:
        texts["more"] = chance.choice(bad)
        return "another text"
    texts[name] = chance.choice(bad)
    return f"text {name} = {texts[name][:20]!r}"


def mutated(path: Path, target: Path, chance: random.Random) -> str:
    """Write a damaged `target` of the whole file `path`, with right checksums or as one of before; what was done to it."""
    with safe_open(path, framework="pt") as file:
        texts = {name: text for name, text in file.metadata().items() if name != "checksums"}
    kind = "state" if "state" in texts else "absorption"
    tensors, header, done = load_file(path), json.loads(texts[kind]), []
    if chance.random() < 0.5:
        texts["version"] = "1"
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        if chance.random() < 0.65 and header:
            done.append(damage_header(header, chance))
        elif tensors:
            done.append(damage_tensors(tensors, chance))
    texts[kind] = json.dumps(header)
    if chance.random() < 0.06:
        done.append(damage_texts(texts, chance))
    if texts.get("version") == "1":
        _plain(target, tensors, texts)
    else:
        write_tensors(target, tensors, texts)
    return "; ".join(done)


def _plain(target: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    """As write_tensors, without its checksums; names and texts may be half a surrogate pair."""
    write_tensors(target, tensors, texts)
    data = target.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["checksums"]
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
