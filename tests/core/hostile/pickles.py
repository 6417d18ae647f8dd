"""Torch files that mean harm: pickles that would run code, archives that lie, and numbers without end."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .damage import NUMBERS, damaged

Weights = dict[str, torch.Tensor]


class Runs:
    """What a pickle makes by calling a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


class Stated(Runs):
    """The same, with a state that is set on what was made."""

    def __reduce__(self) -> Any:
        return (OrderedDict, (), {"__class__": 5, "x": Runs(*self._call[:1], *self._call[1])})


def calls(canary: Path, chance: random.Random) -> Runs:
    """An object that creates `canary` when it is unpickled by a reader that trusts it."""
    touch = f"open({str(canary)!r}, 'w').close()"
    kind = chance.choice([Runs, Runs, Stated])
    return chance.choice(
        [
            kind(os.system, f"touch {canary}"),
            kind(builtins.exec, touch),
            kind(builtins.eval, touch),
            kind(builtins.open, str(canary), "w"),
            kind(subprocess.Popen, ["touch", str(canary)]),
            kind(subprocess.check_output, ["touch", str(canary)]),
            kind(builtins.__import__, "this"),
            kind(os.mkdir, str(canary)),
            kind(getattr, "a", "join"),
            kind(pickle.loads, pickle.dumps(Runs(os.system, f"touch {canary}"))),
            kind(torch.save, {}, str(canary)),
            kind(torch.load, str(canary)),
            kind(torch.hub.load, "a/b", "c"),
            kind(map, builtins.exec, [touch]),
        ]
    )


def hostile(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """(a torch file, what it is)."""
    way = chance.choice([*_WAYS] + [_code, _code, _code, _pickled, _pickled, _archive])
    data, what = way(dict(weights), canary, chance)
    return data, f"{way.__name__.strip('_')} {what}"


def saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def rewritten(whole: bytes, change: Callable[[str, bytes], bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file whose parts went through `change`, with checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", compress) as new:
        for part in old.infolist():
            new.writestr(part.filename, change(part.filename, old.read(part)))
    return out.getvalue()


def _code(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """A call somewhere in a pickle, in every form that such files have had."""
    call, where = calls(canary, chance), chance.choice(["whole", "value", "part", "key", "list", "last"])
    content: Any = {
        "whole": call,
        "value": weights | {"x": call},
        "part": {"generator_ema": weights, "critic": call},
        "key": {"generator": weights, "meta": [(1, call)]},
        "list": [weights, call],
        "last": OrderedDict(weights, z=call),
    }[where]
    form = chance.choice(["zip", "zip", "legacy", "pickle", "old pickle", "tar"])
    if form in ("zip", "legacy"):
        return saved(content, _use_new_zipfile_serialization=form == "zip"), f"{where} {form}"
    protocol = 0 if form == "old pickle" else chance.choice([2, 3, 4, 5])
    data = pickle.dumps(call, protocol)
    return (_tarred(data) if form == "tar" else data), f"{form} {protocol}"


def _tarred(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "../../evil"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _pickled(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """The pickle in the archive, changed: by bytes, by the numbers of its tensors, or another in its place."""
    how = chance.choice(["bytes", "bytes", "numbers", "numbers", "program", "program", "program"])
    program, what = _program(chance) if how == "program" else (b"", "")

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        if how == "bytes":
            return damaged(data, chance, head=0.2)[0]
        if how == "program":
            return program
        out = bytearray(data)
        # K: a byte, M: two, J: four: sizes, strides, offsets, and how many numbers a storage has
        for _ in range(chance.choice([1, 3, 20])):
            at = chance.randrange(len(out) - 9)
            while at < len(out) - 9 and out[at : at + 1] not in (b"K", b"M", b"J"):
                at += 1
            size = {b"K": 1, b"M": 2, b"J": 4}.get(bytes(out[at : at + 1]), 0)
            if chance.random() < 0.6 and size:
                big = chance.choice(NUMBERS)
                out[at : at + 1 + size] = b"\x8a\x08" + struct.pack(
                    "<q", min(big, 2**63 - 1) * chance.choice([1, 1, -1])
                )
            elif size:
                out[at + 1 : at + 1 + size] = chance.randbytes(size)
        return bytes(out)

    return rewritten(saved(weights), change), f"{how} {what}"


def _program(chance: random.Random) -> tuple[bytes, str]:
    """A pickle that calls nothing and is written to take memory, time or the stack."""
    laughs = (
        b"\x80\x02"
        + b"]q\x00"
        + b"".join(
            b"]"
            + b"("
            + b"h"
            + bytes([i]) * 1
            + b"".join(b"h" + bytes([i]) for _ in range(9))
            + b"e"
            + b"q"
            + bytes([i + 1])
            for i in range(12)
        )
    )
    key = b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40)
    )
    programs = {
        "laughs": laughs + b".",
        "laughing key": key + b"}h\x28K\x01s.",
        "laughing name": key + b".",
        "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "deep tuple": b"\x80\x02)" + b"\x85" * 50_000 + b".",
        "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
        "deep dict": b"\x80\x02" + b"}K\x01" * 20_000 + b"K\x01" + b"s" * 20_000 + b".",
        "itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
        "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "negative long": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        "text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "memo": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        "number": b"\x80\x02I" + b"9" * 200_000 + b"\n.",
        "protocol": b"\x80\xff.",
        "empty": b"",
        "stop": b".",
        "pops": b"\x80\x02" + b"0" * 99 + b".",
        "mark": b"\x80\x02" + b"(" * 99_999 + b"t.",
        "extension": b"\x80\x02\x84" + struct.pack("<i", 1) + b".",
        "persistent": b"\x80\x02(X\x07\x00\x00\x00storageNX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        "global": b"\x80\x02cbuiltins\neval\n.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__K\x05sb.",
    }
    name = chance.choice(list(programs))
    return programs[name], name


def _archive(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """The archive itself lies."""
    whole = saved(weights)
    how = chance.choice(
        [
            "bytes",
            "bytes",
            "bytes",
            "packed",
            "bomb",
            "paths",
            "twice",
            "script",
            "none",
            "many",
            "end",
            "short",
            "order",
        ]
    )
    if how == "bytes":
        return damaged(whole, chance, head=0.6)[0], how
    if how in ("packed", "bomb"):
        return rewritten(
            whole,
            lambda name, data: bytes(2**27) if how == "bomb" and name.endswith("data.pkl") else data,
            zipfile.ZIP_DEFLATED,
        ), how
    if how == "end":  # a table of contents of numbers
        at = whole.rindex(b"PK\x05\x06")
        out = bytearray(whole)
        for place in range(at + 8, at + 20, 4):
            out[place : place + 4] = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
        return bytes(out), how
    if how == "short":  # storages of fewer bytes than their tensors
        return rewritten(whole, lambda name, data: data[: len(data) // 2] if "/data/" in name else data), how
    if how == "order":
        return rewritten(whole, lambda name, data: b"big" if name.endswith("byteorder") else data), how
    out = io.BytesIO(b"" if how == "none" else whole)
    with zipfile.ZipFile(out, "a") as archive:
        more = {
            "paths": ["../../evil.py", "/etc/evil", "archive/../../x"],
            "twice": ["archive/data.pkl", "other/data.pkl"],
            "script": ["archive/code/a.py", "archive/constants.pkl"],
            "many": [f"archive/data/{i}x" for i in range(20_000)],
            "none": ["a.txt"],
        }[how]
        for name in more:
            archive.writestr(name, pickle.dumps(Runs(os.system, f"touch {canary}")) if how == "twice" else b"x")
    return out.getvalue(), how


def _tensors(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """Tensors that are no plain ones, or stand for more than they hold."""
    name = chance.choice(list(weights))
    like = weights[name]
    odd = {
        "expanded": torch.zeros(1).expand(2**34),
        "sparse": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (2**30, 2**30)),
        "meta": torch.empty(2**40, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
        "complex": like.to(torch.complex64),
        "parameter": torch.nn.Parameter(like.float()),
        "strided": like.t() if like.ndim == 2 else like,
        "bool": like.bool(),
        "nothing": torch.zeros(0, 2**40),
        "nan": torch.full_like(like, float("nan")),
        "scalar": torch.tensor(1.0),
        "numbers": 5,
        "text": "a",
        "none": None,
        "list": [like],
        "dictionary": {"a": like},
        "big number": 10**4400,
    }
    how = chance.choice(list(odd))
    content: Any = weights | {name: odd[how]}
    where = chance.choice(["", "generator_ema", "state_dict", "model", "generator_lora"])
    return saved(
        {where: content, "alpha": 10**4400, 5: content, (1, 2): "x"} if where else content
    ), f"{how} {name} {where}"


def _nested(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    """Models in models, and in themselves."""
    depth = chance.choice([2, 9, 200])
    content: Any = weights
    for _ in range(depth):
        content = {chance.choice(["model", "generator", "generator_ema", "state_dict"]): content}
    if chance.random() < 0.3:
        content["ema"] = content
    return saved(content), str(depth)


def _others(weights: Weights, canary: Path, chance: random.Random) -> tuple[bytes, str]:
    kinds = {
        "nothing": b"",
        "zeros": bytes(600),
        "cut": saved(weights)[: chance.randrange(3000)],
        "text": b"no weights",
        "magic": b"PK\x03\x04",
        "safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "numpy": b"\x93NUMPY\x01\0",
        "back": saved(weights)[::-1],
        "end": b"PK\x05\x06" + bytes(18),
        "marks": b"\x80\x02" + b"(" * 5000,
        "legacy": saved(weights, _use_new_zipfile_serialization=False),
    }
    name = chance.choice(list(kinds))
    return kinds[name], name


_WAYS = (_code, _pickled, _archive, _tensors, _nested, _others)
