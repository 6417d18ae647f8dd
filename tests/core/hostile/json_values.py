"""Seeded structural damage to values as JSON has them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "abc",
    "1",
    "inf",
    "nan",
    "\ud800",
    "a\nb",
    "x" * 10_000,
    [],
    [[]],
    [1],
    ["a"],
    [None, None],
    {},
    {"a": 1},
    {"": None},
    [1, 2, 3, 4],
    [[1, "1.0", 0.5, 0.5]],
    1e-320,
    "0x10",
    "١",
    " 1 ",
    "1e400",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a header but the whole."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*path, key))


def at(header: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        header = header[key]
    return header


def damage_header(header: Any, chance: random.Random) -> str:
    """Change one thing of a header in place; what it was, for a message."""
    every = list(places(header))
    path = chance.choice(every)
    owner, key = at(header, path[:-1]), path[-1]
    how = chance.choice(["value", "value", "value", "drop", "rename", "wrap", "swap", "twice", "deep", "sign"])
    if how == "value":
        owner[key] = chance.choice(VALUES)
    elif how == "drop":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[chance.choice([key + "x", "", "kind", "__class__", "\ud800"])] = owner.pop(key)
    elif how == "wrap":
        owner[key] = chance.choice([[owner[key]], {"a": owner[key]}, [owner[key]] * 3])
    elif how == "swap":
        other = chance.choice(every)
        if other[: len(path)] != path and path[: len(other)] != other:
            there = at(header, other[:-1])
            owner[key], there[other[-1]] = there[other[-1]], owner[key]
    elif how == "twice" and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif how == "deep":
        for _ in range(chance.choice([5, 200])):
            owner[key] = [owner[key]]
    elif isinstance(owner[key], int | float):
        owner[key] = chance.choice([-owner[key], owner[key] * 2, owner[key] + 1, float(owner[key]), str(owner[key])])
    return f"{how} {path}"


# what a file may hold instead of JSON
RAW: list[bytes] = [
    b"",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"null",
    b"NaN",
    b"5",
    b'"a"',
    b"[]",
    b"[[1, 2]]",
    b"\xff\xfe{\x00}\x00",
    b"\x00" * 99,
    b"9" * 5000,
    b"\xef\xbb\xbf{}",
    b'{"a": "\\ud800"}',
    b'{"a":1,"a":2}',
    b"1e999",
    b"\xc3\x28",
    b"{}" * 50_000,
    b"true",
    b"-0",
]


def hostile_json(value: Any, chance: random.Random) -> tuple[bytes, str]:
    """(bytes of a JSON file that may be none, what was done) of a whole table."""
    if chance.random() < 0.15:
        raw = chance.choice(RAW)
        return raw, f"raw {raw[:20]!r}"
    value, done = json.loads(json.dumps(value)), []
    for _ in range(chance.choice([1, 1, 2, 4])):
        if isinstance(value, dict | list) and value:
            done.append(damage_header(value, chance))
    text = json.dumps(value)
    code = chance.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-32"])
    done += [code] if code != "utf-8" else []
    return text.encode(code), "; ".join(done)
