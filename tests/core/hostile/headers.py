"""safetensors files that mean harm: headers that lie, and numbers that are none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from .damage import NUMBERS, damaged
from .json_values import RAW, VALUES, damage_header

TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "C64",
    "f32",
    "",
    "../F32",
    "F" * 5000,
)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
NAMES = (
    "../../evil.weight",
    "/etc/passwd",
    "C:\\x",
    "",
    " ",
    "\0",
    "a\nb",
    "\u202e",
    "__class__",
    "__metadata__2",
    "x" * 50_000,
    "model." * 3000 + "patch_embedding.weight",
    "model.patch_embedding.weight",
    "blocks.0.self_attn.q.weight ",
    "blocks.-1.norm3.bias",
    "blocks.99999.norm3.weight",
    "blocks.\u0661.norm3.weight",
    "blocks.1e3.norm3.weight",
    "{}{0}",
    "%s%n",
    "<b>",
    "scaled_fp8",
    "blocks.0.self_attn.q.scale_weight",
    "blocks.0.self_attn.q.comfy_quant",
    "vace_blocks.0.weight",
    "generator.blocks.0.norm3.bias",
    "diffusion_model.head.head.weight",
    "blocks.0.self_attn.q.lora_A.weight",
    "_fsdp_wrapped_module." * 400 + "head.head.weight",
)
Header = dict[str, Any]


def split(whole: bytes) -> tuple[Header, bytes]:
    """(header, the tensors' bytes) of a whole file."""
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of both; `length` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def hostile(whole: bytes, chance: random.Random) -> tuple[bytes, str]:
    """(a file made of a whole one, what was done to it)."""
    way = chance.choice([*_WAYS] + [_entry, _entry, _settings, _settings, _numbers])
    header, data = split(whole)
    made, what = way(header, data, chance)
    if chance.random() < 0.1:
        made, more = damaged(made, chance)
        what += f", {more}"
    return made, f"{way.__name__.strip('_')} {what}"


def _length(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    text = json.dumps(header).encode()
    length = chance.choice([*NUMBERS, len(text) - 1, len(text) + 1, 100_000_001, len(text) + len(data), 8]) % 2**64
    return joined(text, data, length), str(length)


def _raw(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    raw = chance.choice(RAW)
    return joined(raw, chance.choice([data, b""])), f"{raw[:20]!r}"


def _text(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The header's JSON as a text: names twice, depths, numbers, codes."""
    text, name = json.dumps(header), chance.choice(list(header))
    how = chance.choice(["twice", "metadata twice", "deep", "digits", "nan", "code", "tail", "spaces"])
    if how == "twice":
        text = text[:-1] + "," + json.dumps({name: header[name]})[1:]
    elif how == "metadata twice":
        text = text[:-1] + ',"__metadata__":{"adastate":"{}"}}'
    elif how == "deep":
        text = text[:-1] + ',"x":' + "[" * chance.choice([500, 200_000]) + "}"
    elif how == "digits":
        text = text[:-1] + ',"x":{"dtype":"F32","shape":[' + "9" * 6000 + '],"data_offsets":[0,0]}}'
    elif how == "nan":
        text = text[:-1] + ',"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,Infinity]}}'
    elif how == "code":
        code = chance.choice(["utf-16", "utf-8-sig", "utf-32"])
        return joined(text.encode(code), data), code
    text += {"tail": "}{", "spaces": " " * 100_000}.get(how, "")
    return joined(text.encode(), data), how


def _entry(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Some tensors whose entries lie."""
    done = []
    for _ in range(chance.choice([1, 1, 2, 5])):
        name = chance.choice([name for name in header if name != "__metadata__"] or [""])
        entry = header.get(name)
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            continue
        if not _is_span(entry["data_offsets"]):  # an earlier lie
            continue
        how = chance.choice(list(_LIES))
        _LIES[how](header, name, entry, len(data), chance)
        done.append(f"{how} {name[:40]}")
    return joined(header, data), " ".join(done)


def _is_span(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) for each in value)


def _lie_type(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    entry["dtype"] = chance.choice(TYPES)


def _lie_same_size(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    """Another type, its shape made to fit its bytes."""
    begin, end = entry["data_offsets"]
    entry["dtype"] = chance.choice(list(_BYTES) + ["F8_E4M3", "I8", "BOOL"])
    entry["shape"] = [(end - begin) // _BYTES.get(entry["dtype"], 1)]


def _lie_shape(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    entry["shape"] = chance.choice(
        [
            [2**40, 0],
            [0],
            [2**62, 2**62],
            [0] * 65,
            [1] * 5000,
            [-1],
            [1.5],
            [True],
            ["3"],
            [2**64],
            None,
            3,
            [[3]],
            [2**31, 2**31, 0],
        ]
        + [[*entry["shape"], 1], entry["shape"][::-1], entry["shape"][:-1], [*entry["shape"], 2]]
    )
    if chance.random() < 0.5:
        entry["data_offsets"] = [0, 0]


def _lie_place(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = chance.choice(
        [
            [end, begin],
            [begin + 1, end + 1],
            [0, end - begin],
            [size - (end - begin), size],
            [size, size + end - begin],
            [begin],
            [],
            None,
        ]
        + [
            [-4, end - begin - 4],
            [2**63, 2**63 + end - begin],
            [float(begin), float(end)],
            [begin, end, end],
            [begin, end + 4],
            "0",
        ]
    )


def _lie_empty(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    header[name] = chance.choice([{}, None, [], 5, "F32", {"dtype": "F32"}, [entry]])


def _lie_name(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    header[chance.choice(NAMES)] = header.pop(name)


def _lie_gone(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    del header[name]


def _lie_shared(header: Header, name: str, entry: Header, size: int, chance: random.Random) -> None:
    """Two names for the same bytes, the sum of all left as it was where another goes."""
    header[chance.choice(NAMES)] = dict(entry)
    others = [
        one
        for one, each in header.items()
        if isinstance(each, dict) and each.get("shape") == entry["shape"] and one != name
    ]
    if others and chance.random() < 0.5:
        header[chance.choice(others)] = dict(entry)


_LIES: dict[str, Callable[..., None]] = {
    "type": _lie_type,
    "type of its size": _lie_same_size,
    "shape": _lie_shape,
    "place": _lie_place,
    "empty": _lie_empty,
    "name": _lie_name,
    "gone": _lie_gone,
    "shared": _lie_shared,
}


def _many(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Very many tensors of nothing."""
    count = chance.choice([1000, 30_000, 60_000])
    stem = chance.choice(["x", "blocks.0.self_attn.q.weight", "blocks."])
    header |= {f"{stem}{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    return joined(header, data), f"{count} of {stem}"


def _settings(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """What the file says of how it wants to be rolled out, and other texts that are read."""
    texts = header.get("__metadata__") or {}
    texts = header["__metadata__"] = {name: text for name, text in texts.items() if isinstance(text, str)}
    how = chance.choice(["settings"] * 6 + ["raw", "quantised", "format", "lora", "none", "odd"])
    if how == "settings":
        told = json.loads(texts.get("adastate", "{}")) or {
            "steps": 4,
            "shift": 5.0,
            "chunk_frames": 3,
            "window_frames": 3,
        }
        how = "; ".join(damage_header(told, chance) for _ in range(chance.choice([1, 1, 2, 4])) if told)
        if chance.random() < 0.3:
            key = chance.choice(
                [
                    "ending",
                    "sampler",
                    "start",
                    "preset",
                    "anchor",
                    "timesteps",
                    "positions",
                    "keep_first_frame",
                    "levels",
                ]
            )
            told[key] = chance.choice([*VALUES, "open", "euler", "inside", "self_forcing", "absolute", "krea"])
            how += f"; {key}"
        texts["adastate"] = json.dumps(told)
    elif how == "raw":
        texts["adastate"] = chance.choice(
            ["[", "5", "null", "[" * 50_000, '"a"', "{}{}", "9" * 5000, '{"steps": NaN}', "\ud800", "[1]"]
        )
    elif how == "quantised":
        texts["_quantization_metadata"] = chance.choice(
            ["[", "{}", "null", '{"layers": 5}', '{"layers": {"blocks.0.self_attn.q": {}}}']
        )
    elif how == "format":
        texts["format"] = texts["checkpoint_format"] = chance.choice(["tf", "", "longlive2", "x" * 9000])
    elif how == "lora":
        texts["lora_adapter_metadata"] = chance.choice(
            ["[", '{"lora_alpha": "9e9"}', '{"r": -1, "lora_alpha": [1]}', "[" * 50_000]
        )
        texts["ss_network_alpha"] = chance.choice(["nan", "1..2", "1e400", "-1", "None", "\u0661"])
    elif how == "none":
        header["__metadata__"] = chance.choice([None, [], 5, "a", {}])
    else:
        header["__metadata__"] = {"adastate": chance.choice([{"steps": 4}, 5, None, ["a"]])} | dict(texts, x=1)
    return joined(header, data), how


def _numbers(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Numbers that are none, in one tensor or in all."""
    out = bytearray(data)
    entry = chance.choice([each for name, each in header.items() if name != "__metadata__"])
    begin, end = entry["data_offsets"] if chance.random() < 0.7 else (0, len(data))
    value = chance.choice(
        [b"\xff\x7f\xff\x7f", b"\x80\x7f\x80\x7f", b"\x80\xff\x80\xff", bytes(4), b"\xff\xff\x7f\x7f"]
    )
    if chance.random() < 0.5:
        out[begin:end] = (value * ((end - begin) // 4 + 1))[: end - begin]
    elif end - begin >= 4:
        at = begin + 4 * chance.randrange((end - begin) // 4)
        out[at : at + 4] = value
    return joined(header, bytes(out)), value.hex()


def _bytes(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    return damaged(joined(header, data), chance, head=0.9)


def _other(header: Header, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Something else under this name."""
    kinds = {
        "nothing": b"",
        "zeros": bytes(5000),
        "pickle": b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
        "zip": b"PK\x03\x04" + bytes(99),
        "gguf": b"GGUF" + bytes(99),
        "html": b"<html>no",
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "tar": bytes(257) + b"ustar",
        "text": b"weights",
        "short": b"\x07\0\0",
        "hdf": b"\x89HDF\r\n\x1a\n" + bytes(99),
    }
    name = chance.choice(list(kinds))
    return kinds[name], name


_WAYS = (_length, _raw, _text, _entry, _many, _settings, _numbers, _bytes, _other)
