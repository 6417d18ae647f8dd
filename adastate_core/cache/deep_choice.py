"""Which tokens of the past Deep Forcing keeps (arXiv 2512.05081): those that the newest frames attend to most.

A token's score is the sum of q.k over the queries of the recent frames, in float32, one for all heads of a layer (the
authors' code sums over heads), own to a layer and a batch item; of equal ones the older token is taken. The sum over queries
needs their sum only: a clean pass keeps that of every frame, at time 0, and time turns it later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rope import Rope


def summed(q: torch.Tensor, frames: int, rope: Rope, heads: int) -> torch.Tensor:
    """Queries [B, frames * P, width], normed and not rotated, as sums over each frame's tokens at time 0: float32
    [B, frames, width]."""
    turned = rope.rotate(q.float().unflatten(-1, (heads, -1)), rope.turn(None, [0.0] * frames))
    return turned.flatten(2).unflatten(1, (frames, -1)).sum(2)


def choose(
    keys: Sequence[torch.Tensor],
    queries: torch.Tensor,
    places: Sequence[int],
    count: int,
    rope: Rope,
    heads: int,
    spent: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `count` tokens [B, count] int64, in the order of time, with the largest scores of all tokens of `keys`.

    `keys` are frames [B, P, width], oldest first, rotated to where they are; `queries` [B, n, width] sums of frames at time 0
    (`summed`), to be judged from the n `places` in time. Of the first tokens those that are `spent` [B, n] come last.
    """
    which = torch.arange(len(places), device=rope.device)
    turn = rope.turn_tokens(places, which, torch.zeros_like(which))
    query = rope.rotate(queries.unflatten(-1, (heads, -1)), turn).sum(1).flatten(1)[:, :, None]
    # a frame at a time: a copy of all candidates in float32 would outgrow the buffers
    scores = [(key.float() @ query)[..., 0] for key in keys]
    every = torch.cat(scores, 1)
    if spent is not None:
        every[:, : spent.shape[1]].masked_fill_(spent, -torch.inf)
    order = every.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def gathered(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, width] of frames [B, n, P, width] by their number in time."""
    return source.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, source.shape[-1]))
