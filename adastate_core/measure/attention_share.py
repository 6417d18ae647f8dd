"""Where attention goes: the share of each cached and current frame, measured while a rollout runs.

The figure on the project page of AdaState (arXiv 2605.30349), which shows that a first frame keeps much of the attention. The page
says of it "preserved across n": it does not fade as the window grows. Shares are exact softmax masses of evenly spaced content
queries, averaged over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..rollout import Rollout

QUERIES = 64
# kinds of frames that lie in the cache while a chunk is made
CACHED = ("anchor", "past")


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

    @property
    def past(self) -> AttentionShare:
        """Of what is cached alone, without the frames that are being made, as that figure has it: shares sum to 1. Empty
        where nothing is cached."""
        cached = [i for i, name in enumerate(self.labels) if name.split()[0] in CACHED]
        sums = [sum(layer[i] for i in cached) for layer in self.layers] if cached else []
        layers = [[layer[i] / total for i in cached] for layer, total in zip(self.layers, sums, strict=False)]
        return AttentionShare([self.labels[i] for i in cached], layers)


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
    """Roll `chunks` chunks out and measure in the last one; ValueError as `measure_shares`."""
    return measure_shares(rollout, chunks, chunks - 1)[0]


def measure_shares(rollout: Rollout, chunks: int, first: int = 0) -> list[AttentionShare]:
    """Roll `chunks` chunks out and measure in each from chunk `first` on; ValueError for a rollout that has begun, no chunk, or
    several chunks denoised together."""
    if chunks < 1 or rollout.emitted:
        raise ValueError(
            f"{chunks} chunks from frame {rollout.emitted}: a measurement needs a fresh rollout and a chunk"
        )
    if rollout.spec.blocks > 1:
        raise ValueError(
            f"{rollout.spec.blocks} chunks are denoised together, so no pass is a chunk's own; choose another preset to measure "
            "shares"
        )
    found, attention, frames = [], rollout.attention, rollout.spec.chunk_frames
    for chunk in range(chunks):
        looks = _Looks(rollout, chunk * frames) if chunk >= first else None
        attention.observe = looks
        for _chunk in rollout.chunks((chunk + 1) * frames):
            pass
        found += [] if looks is None else [looks.share()]
    attention.observe = None
    return found


class _Looks:
    """What one chunk's noisy passes look at; called by every layer's attention."""

    def __init__(self, rollout: Rollout, first_frame: int) -> None:
        self.rollout, self.first_frame = rollout, first_frame
        self.sums: dict[int, torch.Tensor] = {}
        self.names: dict[int, list[tuple[int, str]]] = {}

    def __call__(self, layer: int, q: torch.Tensor, keys: torch.Tensor, clean: bool) -> None:
        if clean:
            return
        spec, cache = self.rollout.spec, self.rollout.cache
        states = spec.anchor.state_frames
        held = cache.layers[layer].held_frames(states + spec.chunk_frames)
        self.names[layer] = [label(kind, number, states, self.first_frame) for kind, number in held]
        share = frame_shares(q, keys, cache.heads, spec.tokens, states * spec.tokens)
        self.sums[layer] = self.sums.get(layer, 0) + share

    def share(self) -> AttentionShare:
        """Over all passes seen."""
        order = sorted(set(self.names[0]))
        found = AttentionShare([name for _, name in order])
        for layer, total in sorted(self.sums.items()):
            by_name = dict(zip(self.names[layer], (total / total.sum()).tolist(), strict=True))
            found.layers.append([by_name.get(entry, 0.0) for entry in order])
        return found


def share_table(found: Sequence[tuple[int, AttentionShare]]) -> list[dict]:
    """JSON-able: one entry a window with labels, mean shares and shares by layer."""
    return [{"window_frames": window, "labels": s.labels, "share": s.mean, "by_layer": s.layers} for window, s in found]
