"""The five functions between the linears and attentions of a Wan block, each a kernel when it is compiled.

Not compiled they give the bits of what they stand for: the host's own norms, modulation, gates and sums (ComfyUI,
comfy/ldm/wan/model.py), and the rotation and the write of a pass's keys (attention/cached.py).

Shapes: x and y [B, N, C]. `modulation` [1, 6, C] is the block's own, `e` [B, T, 6, C] the time's, T = 1 or frames; row 0 to 5 of
their sum are shift, scale and gate of the self-attention, then of the feed-forward. All in one dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..rope import Rope, Turn


def _row(x: torch.Tensor, modulation: torch.Tensor, e: torch.Tensor, row: int) -> torch.Tensor:
    """A row of the modulation for each token of x, or one for all of them: [B, N or 1, C]."""
    values = modulation[:, row] + e[:, :, row]
    return values if values.shape[1] == 1 else values.repeat_interleave(x.shape[1] // values.shape[1], 1)


def _norm(
    x: torch.Tensor, eps: float, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_modulate(x: torch.Tensor, modulation: torch.Tensor, e: torch.Tensor, eps: float) -> torch.Tensor:
    """What the self-attention's linears get."""
    return torch.addcmul(_row(x, modulation, e, 0), _norm(x, eps), 1 + _row(x, modulation, e, 1))


def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: tuple[float, float],
    turn: tuple[torch.Tensor, ...],
    tokens: int,
    heads: int,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
) -> torch.Tensor:
    """The queries, normed and rotated; the keys are so too, and go with the values straight into their slots.

    q, k, v and the slots [B, N, heads * head_dim]; `turn`: the parts of a Turn of the N tokens, of frames of `tokens`.
    """
    rotated, _ = norm_rotate_raw(q, k, v, q_weight, k_weight, eps, turn, tokens, heads, key_slots, value_slots)
    return rotated


def norm_rotate_raw(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: tuple[float, float],
    turn: tuple[torch.Tensor, ...],
    tokens: int,
    heads: int,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm_rotate`, and the keys before they are rotated, which a clean pass keeps."""
    q, k = F.rms_norm(q, q.shape[-1:], q_weight, eps[0]), F.rms_norm(k, k.shape[-1:], k_weight, eps[1])
    key_slots.copy_(_rotated(k, turn, tokens, heads))
    value_slots.copy_(v)
    return _rotated(q, turn, tokens, heads), k


def _rotated(x: torch.Tensor, turn: tuple[torch.Tensor, ...], tokens: int, heads: int) -> torch.Tensor:
    return Rope.rotate(x.unflatten(-1, (heads, -1)), Turn(turn, tokens)).flatten(2)


def gate_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    modulation: torch.Tensor,
    e: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with the self-attention's output y added, and its norm, which the cross attention gets."""
    x = torch.addcmul(x, y, _row(x, modulation, e, 2))
    return x, _norm(x, eps, weight, bias)


def add_norm_modulate(
    x: torch.Tensor, y: torch.Tensor, modulation: torch.Tensor, e: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with the cross attention's output y added, and what the feed-forward gets."""
    x = x + y
    return x, torch.addcmul(_row(x, modulation, e, 3), _norm(x, eps), 1 + _row(x, modulation, e, 4))


def gate(x: torch.Tensor, y: torch.Tensor, modulation: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """x with the feed-forward's output y added: the block's output."""
    return torch.addcmul(x, y, _row(x, modulation, e, 5))


FUNCTIONS = {
    "norm_modulate": norm_modulate,
    "norm_rotate": norm_rotate,
    "norm_rotate_raw": norm_rotate_raw,
    "gate_norm": gate_norm,
    "add_norm_modulate": add_norm_modulate,
    "gate": gate,
}
