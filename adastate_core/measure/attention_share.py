"""Where attention goes: the share of each cached and current frame, measured while a rollout runs.

The figure that AdaState's paper (arXiv 2605.30349) uses to show that a first frame keeps much of the attention, and more of
it the longer the window. Shares are exact softmax masses of evenly spaced content queries, averaged over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..rollout import Rollout

QUERIES = 64


def frame_shares(q: torch.Tensor, k: torch.Tensor, heads: int, tokens: int, first_query: int) -> torch.Tensor:
    """[frames] float64 shares, summing to 1, of keys k [B, frames * tokens, heads * d] as queries from `first_query` see them."""
    rows = torch.linspace(first_query, q.shape[1] - 1, QUERIES, device=q.device).round().long().unique()
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q[:, rows], k))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return weights.unflatten(-1, (-1, tokens)).sum(-1).cpu().double().mean((0, 1, 2))


@dataclass
class AttentionShare:
    """Shares by layer of one chunk's noisy passes; `labels` name the frames in the order of time."""

    labels: list[str] = field(default_factory=list)
    layers: list[list[float]] = field(default_factory=list)

    @property
    def mean(self) -> list[float]:
        """Over layers, by label."""
        return [sum(column) / len(column) for column in zip(*self.layers, strict=True)]


def label(kind: str, number: int, states: int, first_frame: int) -> tuple[int, str]:
    """(order, name) of a frame that `LayerCache.held_frames` lists, as seen from a chunk that starts at `first_frame`."""
    if kind == "anchor":
        return number, f"anchor {number}"
    if kind == "window":
        return 10_000 + number, f"past {number - first_frame}"
    if number < states:
        return 1_000_000 + number, f"state {number}"
    return 2_000_000 + number, f"current {number - states}"


def measure_share(rollout: Rollout, chunks: int) -> AttentionShare:
    """Roll `chunks` chunks out and measure in the last one; ValueError for a rollout that has begun or no chunk."""
    if chunks < 1 or rollout.emitted:
        raise ValueError(
            f"{chunks} chunks from frame {rollout.emitted}: a measurement needs a fresh rollout and a chunk"
        )
    spec, attention = rollout.spec, rollout.attention
    sums: dict[int, torch.Tensor] = {}
    names: dict[int, list[tuple[int, str]]] = {}
    states = spec.anchor.state_frames
    last = (chunks - 1) * spec.chunk_frames

    def look(layer: int, q: torch.Tensor, keys: torch.Tensor, clean: bool) -> None:
        if clean:
            return
        held = rollout.cache.layers[layer].held_frames(states + spec.chunk_frames)
        names[layer] = [label(kind, number, states, last) for kind, number in held]
        share = frame_shares(q, keys, rollout.cache.heads, spec.tokens, states * spec.tokens)
        sums[layer] = sums.get(layer, 0) + share

    length = 0
    for _ in range(chunks):
        length += spec.chunk_frames
        attention.observe = look if length > last else None
        for _chunk in rollout.chunks(length):
            pass
    attention.observe = None
    order = sorted(set(names[0]))
    found = AttentionShare([name for _, name in order])
    for layer, total in sorted(sums.items()):
        by_name = dict(zip(names[layer], (total / total.sum()).tolist(), strict=True))
        found.layers.append([by_name.get(entry, 0.0) for entry in order])
    return found


def share_table(found: Sequence[tuple[int, AttentionShare]]) -> list[dict]:
    """JSON-able: one entry a window with labels, mean shares and shares by layer."""
    return [{"window_frames": window, "labels": s.labels, "share": s.mean, "by_layer": s.layers} for window, s in found]
