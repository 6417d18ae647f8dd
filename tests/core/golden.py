"""Files that older versions of the pack made, and what their makers recorded beside them (written by tools/make_golden.py).

`tests/golden/<commit>/manifest.json` says for each file what it belongs to. An entry that a later version cannot take any more
gets a field `refused`, part of the sentence with which the file has to be refused; the sentence is in the changelog too.
This module imports nothing of the pack, so that tests inside a host, which know it by another name, can use it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "golden"
# between processors the last bits of sums differ
NEAR = dict(atol=1e-4, rtol=1e-4)


def entries(kind: str) -> list[Any]:
    """A pytest parameter (folder, entry) for each entry of a kind in every manifest."""
    found = []
    for path in sorted(FOLDER.glob("*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found += [pytest.param((path.parent, one), id=f"{path.parent.name}-{one['name']}") for one in manifest[kind]]
    assert found, f"no golden {kind}"
    return found


def taken_or_refused(entry: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Where the files of an entry are used: nothing may be raised, or the sentence that the manifest names has to be."""
    if "refused" not in entry:
        return nullcontext()
    return pytest.raises(ValueError, match=re.escape(entry["refused"]))


def assert_same_latents(
    found: torch.Tensor, expected: torch.Tensor, rounding: float | None, exact_attention: bool = True
) -> None:
    """[B, C, n, h, w] as recorded.

    `rounding`: by how much, relative to its norm, this rollout differs from the same one with a cache in float32. Where a
    value lies on the edge between two that such a cache can hold, the last bit of a sum decides which it becomes, and from
    then on that item is off by a fraction of what rounding does. So one item has to agree, and none be off by more than half
    of `rounding`; without it all have to agree. Where attention itself is computed in 16 bits (not `exact_attention`),
    processors differ by as much as rounding does, and twice that is the bound for all.
    """
    assert found.shape == expected.shape and found.dtype == torch.float32
    if rounding is None:
        torch.testing.assert_close(found, expected, **NEAR)
        return
    errors = sorted(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    least, most = (1e-4, rounding / 2) if exact_attention else (2 * rounding, 2 * rounding)
    assert errors[0] < least and errors[-1] < most, (errors, rounding)


def exact_numbers(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Random float32 numbers in -1..1, the same bits on every machine; normal ones differ between processors in their last."""
    return torch.randint(-256, 257, tuple(shape), generator=torch.Generator().manual_seed(seed)).float() / 256


def exact_weights(state_dict: Mapping[str, torch.Tensor], seed: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Such weights of these names and shapes: a state knows its model by a hash of them. `gain` is a power of two."""
    weights = {}
    for i, (name, value) in enumerate(state_dict.items()):
        numbers = exact_numbers(value.shape, seed + i)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            weights[name] = 1 + numbers / 4
        else:
            fan = value[0].numel() if value.ndim > 1 else 100
            weights[name] = numbers * 2.0 ** round(math.log2((3 / fan) ** 0.5)) * gain
    return weights
