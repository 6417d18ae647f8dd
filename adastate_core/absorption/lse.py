"""Attention in parts: every part's output with its log-sum-exp, and their exact merge.

softmax over the union of disjoint key sets is the mean of the sets' own outputs, weighted by exp(log-sum-exp): so what local
keys alone would give and what all keys give come out of one pass over the keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# query rows of one block in the plain way, and the most bytes of its scores, and of its keys and values in float32
BLOCK, MOST_BYTES = 1024, 2**28


@dataclass(frozen=True)
class Part:
    """`out` [B, heads, N, head_dim] and `lse` [B, heads, N] float32: attention over one set of keys."""

    out: torch.Tensor
    lse: torch.Tensor


def attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> Part:
    """Attention of q [B, N, heads * head_dim] over k, v [B, M, heads * head_dim], M > 0, with its log-sum-exp.

    The fastest way that this device has: torch's flash kernels on CPU and CUDA, the memory-efficient one for float32 on
    CUDA, else plain products in blocks of queries.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    way = fastest_way(q.device.type, q.dtype, q.shape[-1])
    return Part(*WAYS[way](q, k, v))


def merge(first: Part, second: Part) -> Part:
    """Attention over the union of two disjoint sets of keys; computed in float32, in the dtype of `first`."""
    lse = torch.logaddexp(first.lse, second.lse)
    a, b = ((part.lse - lse).exp()[..., None] for part in (first, second))
    return Part((a * first.out.float() + b * second.out.float()).to(first.out.dtype), lse)


def rows(part: Part) -> torch.Tensor:
    """The output as layers take it, [B, N, heads * head_dim]."""
    return part.out.transpose(1, 2).flatten(2)


def _flash_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _flash_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, lse[..., : q.shape[2]]


def _efficient_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[2]]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by explicit products in float32, `BLOCK` queries at a time, or fewer where there are many keys; as many heads
    at a time as `MOST_BYTES` of keys and values allow."""
    batch, heads, queries, channels = q.shape
    each = max(1, MOST_BYTES // (8 * batch * k.shape[2] * channels))
    rows = max(1, min(BLOCK, MOST_BYTES // (4 * batch * min(each, heads) * k.shape[2])))
    out, sums = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )
    for head in range(0, heads, each):
        some = slice(head, head + each)
        keys, values = k[:, some].float().transpose(-1, -2), v[:, some].float()
        for low in range(0, queries, rows):
            part = slice(low, low + rows)
            scores = q[:, some, part].float() @ keys * channels**-0.5
            lse = scores.logsumexp(-1)
            sums[:, some, part] = lse
            out[:, some, part] = (scores - lse[..., None]).exp() @ values
    return out, sums


WAYS = {"flash, cpu": _flash_cpu, "flash": _flash_cuda, "efficient": _efficient_cuda, "plain": plain}


@functools.cache
def fastest_way(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The name in `WAYS` that works here, tried once on a few numbers: these operators are torch's private ones."""
    candidates = {"cpu": ("flash, cpu",), "cuda": ("flash", "efficient")}.get(device, ())
    for name in candidates:
        try:
            probe = torch.ones((1, 1, 32, head_dim), dtype=dtype, device=device)
            out, lse = WAYS[name](probe, probe, probe)
            if out.shape == probe.shape and lse.shape == probe.shape[:3] and lse.dtype == torch.float32:
                return name
        except (RuntimeError, AttributeError, TypeError):
            continue
    return "plain"
