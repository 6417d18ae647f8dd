"""The forwards of a Wan block and of its two attentions, rewritten to attend through a rollout's cache.

They use a module's own projections and norms (`q`, `k`, `v`, `o`, `norm_q`, `norm_k`), so LoRA, fp8 and offloading
keep working, and hold no session: it is found in `transformer_options`, and without one the original is called.
Module names: Wan 2.1, modules/model.py; ComfyUI, comfy/ldm/wan/model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cached import CachedAttention
from .fused_blocks import QueryKeyNorms

SESSION = "adastate_session"
TEXT_KEY = "adastate_text_key"

# (a norm, the activations that it gets) -> why a function cannot stand for the norm, or None if it can: its weights are as they
# are used, on the same device and in the same dtype
Hindrance = Callable[[nn.Module, torch.Tensor], str | None]


def _can(session: Any, question: str, *asked: Any) -> bool:
    """What a session answers; one that only attends has no compiled functions."""
    answer = getattr(session, question, None)
    return answer is not None and answer(*asked)


def _always(norm: nn.Module, x: torch.Tensor) -> str | None:
    return "nobody looks after its norms"


def _called(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return ffn(x)


def block_forward(
    block: nn.Module,
    layer: int,
    original: Callable[..., torch.Tensor],
    hindrance: Hindrance,
    feed_forward: Callable[[nn.Module, torch.Tensor], torch.Tensor] = _called,
) -> Callable[..., torch.Tensor]:
    """A `forward` for `blocks[layer]`: compiled functions between the block's own linears and attentions, within a session that
    has them; everywhere else, and where a norm hinders, the original. `feed_forward` runs the block's `ffn`."""

    def forward(
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: Any,
        context: torch.Tensor,
        context_img_len: int | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **more: Any,
    ) -> torch.Tensor:
        attending = {"context_img_len": context_img_len, "transformer_options": transformer_options}
        session: CachedAttention | None = transformer_options.get(SESSION)
        if session is None or more or e.ndim != 4 or not _can(session, "uses", layer):
            return original(x, e=e, freqs=freqs, context=context, **attending, **more)
        if why := block_hindrance(block, x, hindrance):
            session.blocks.leave(layer, why)
            return original(x, e=e, freqs=freqs, context=context, **attending)
        fused, rows, norm3 = session.blocks.fused, (block.modulation, e), block.norm3
        x = x.contiguous()
        y = fused("norm_modulate", x, *rows, block.norm1.eps)
        y = block.self_attn(y, freqs, transformer_options=transformer_options)
        x, y = fused("gate_norm", x, y, *rows, norm3.weight, norm3.bias, norm3.eps)
        y = block.cross_attn(y, context, **attending)
        x, y = fused("add_norm_modulate", x, y, *rows, block.norm2.eps)
        return fused("gate", x, feed_forward(block.ffn, y), *rows)

    return forward


def block_hindrance(block: nn.Module, x: torch.Tensor, hindrance: Hindrance) -> str | None:
    """Why functions cannot stand for what is between the linears of a block that gets `x`, or None."""
    modulation, attention = block.modulation, block.self_attn
    if modulation.dtype != x.dtype or modulation.device != x.device:
        return f"its modulation is {modulation.dtype} on {modulation.device}, to be cast to {x.dtype} on {x.device}"
    norms = {"norm1": block.norm1, "norm2": block.norm2, "norm3": block.norm3}
    norms |= {"self_attn.norm_q": attention.norm_q, "self_attn.norm_k": attention.norm_k}
    return next((f"its {name} {why}" for name, norm in norms.items() if (why := hindrance(norm, x))), None)


def self_attention_forward(
    module: nn.Module, layer: int, original: Callable[..., torch.Tensor], hindrance: Hindrance = _always
) -> Callable[..., Any]:
    """A `forward` for `blocks[layer].self_attn`; `freqs` is ignored within a session, which rotates by itself."""

    def forward(x: torch.Tensor, freqs: Any, transformer_options: dict[str, Any] = {}, **more: Any) -> torch.Tensor:  # noqa: B006
        session: CachedAttention | None = transformer_options.get(SESSION)
        if session is None:
            return original(x, freqs, transformer_options=transformer_options, **more)
        norm_q, norm_k = module.norm_q, module.norm_k
        if _can(session, "takes_unnormed", layer, x.dtype) and not (hindrance(norm_q, x) or hindrance(norm_k, x)):
            q, k, v = module.q(x), module.k(x), module.v(x)
            return module.o(session.attend_unnormed(layer, q, k, v, QueryKeyNorms.of(module)))
        q, k, v = norm_q(module.q(x)), norm_k(module.k(x)), module.v(x)
        return module.o(session.attend(layer, q, k, v))

    return forward


def cross_attention_forward(module: nn.Module, layer: int, original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A `forward` for `blocks[layer].cross_attn` that makes the text's keys and values once a prompt."""

    def forward(
        x: torch.Tensor,
        context: torch.Tensor,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **more: Any,
    ) -> torch.Tensor:
        session: CachedAttention | None = transformer_options.get(SESSION)
        if session is None:
            return original(x, context, transformer_options=transformer_options, **more)

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            return module.norm_k(module.k(context)), module.v(context)

        k, v = session.text(layer, transformer_options.get(TEXT_KEY), make)
        return module.o(session.kernel(module.norm_q(module.q(x)), k, v, module.num_heads))

    return forward
