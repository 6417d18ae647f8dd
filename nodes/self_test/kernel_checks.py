"""The card's own arithmetic alone, against its formulas in float64 on the CPU: when a rollout differs, these say where."""

from __future__ import annotations

import torch

from ...adastate_core.cache.eight_bits import CODES, check_cache_dtype, quantised, unpack
from ...adastate_core.rope import THETA, Rope, axis_widths
from ..host.made_models import written_out
from ..host.model import HostModel
from .bench import Bench, near
from .outcome import Outcome, judged

HEADS, HEAD_DIM = 12, 128
# the rounding of the dtype, with room for the order in which a kernel adds
MOST_APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# queries and keys of a rollout's passes: a chunk over itself, over a window, and over a text
SIZES = ((180, 180), (180, 624), (180, 512), (60, 77))


def _drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_kernel(bench: Bench, dtype: torch.dtype) -> Outcome:
    """The host's attention in a dtype, with as many more keys than queries as a cache brings."""
    kernel = HostModel(bench.model, bench.context, 1).kernel
    found = []
    for queries, keys in SIZES:
        q, k, v = (_drawn(1, n, HEADS * HEAD_DIM, seed=n + i).to(dtype) for i, n in enumerate((queries, keys, keys)))
        out = kernel(*(t.to(bench.device) for t in (q, k, v)), HEADS)
        found.append(near(out, written_out(q, k, v, HEADS), MOST_APART[dtype], f"the formula, {queries} on {keys}"))
    worst = max(found, key=lambda part: part[1])
    good = [worst] if all(part[0] for part in found) else [part for part in found if not part[0]]
    return judged(good)


def rotation(bench: Bench) -> Outcome:
    """Rotary embedding from positions that a long video has, against the formula written out."""
    rows, columns, positions = 3, 5, (0.0, 7.0, 250.0)
    x = _drawn(1, len(positions) * rows * columns, 2, HEAD_DIM)
    rope = Rope(HEAD_DIM, rows, columns, bench.device)
    turned = Rope.rotate(x.to(bench.device), rope.turn(None, positions))
    back = Rope.rotate(turned, rope.turn(positions, [None] * len(positions)))
    return judged(
        [
            near(turned, _rotated(x, positions, rows, columns), 1e-5, "the formula"),
            near(back, x, 1e-5, "what was turned and turned back"),
        ]
    )


def _rotated(x: torch.Tensor, positions: tuple[float, ...], rows: int, columns: int) -> torch.Tensor:
    """The pairs of [1, tokens, heads, d] turned one angle after another (Wan 2.1, modules/model.py)."""
    places = [(p, r, c) for p in positions for r in range(rows) for c in range(columns)]
    angles = []
    for place in places:
        row = []
        for at, width in zip(place, axis_widths(HEAD_DIM), strict=True):
            row += [at * THETA ** (-2 * j / width) for j in range(width // 2)]
        angles.append(row)
    angle = torch.tensor(angles, dtype=torch.float64)[None, :, None]
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def eight_bits(bench: Bench, cache_dtype: str) -> Outcome:
    """Frames to 8 bits and back on the card: never further off than half a code, or than the format's own step."""
    check_cache_dtype(cache_dtype, bench.device)
    x = _drawn(1, 40, HEADS * HEAD_DIM)
    codes, scale = quantised(x.to(bench.device), HEADS, cache_dtype)
    out = torch.empty(1, 1, 40, HEADS * HEAD_DIM, device=bench.device)
    unpack(codes[None], scale[None], HEADS, out)
    heads = x.unflatten(-1, (HEADS, -1)).double()
    step = heads.abs().amax((1, 3), keepdim=True) / CODES[cache_dtype][1]
    # int8 has steps of one size; e4m3 has 3 bits behind the leading one, and no steps smaller than 2^-9
    half = step / 2 if cache_dtype == "int8" else torch.maximum(heads.abs() / 16, step * 2.0**-10)
    apart = (out[:, 0].cpu().unflatten(-1, (HEADS, -1)).double() - heads).abs() / half
    worst = float(apart.max())
    return judged([(worst <= 1.001, f"off by at most {worst:.3f} of half a step")])
