"""The two attention forwards of a Wan block, rewritten to attend through a rollout's cache.

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

SESSION = "adastate_session"
TEXT_KEY = "adastate_text_key"


def self_attention_forward(module: nn.Module, layer: int, original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A `forward` for `blocks[layer].self_attn`; `freqs` is ignored within a session, which rotates by itself."""

    def forward(x: torch.Tensor, freqs: Any, transformer_options: dict[str, Any] = {}, **more: Any) -> torch.Tensor:  # noqa: B006
        session: CachedAttention | None = transformer_options.get(SESSION)
        if session is None:
            return original(x, freqs, transformer_options=transformer_options, **more)
        q, k, v = module.norm_q(module.q(x)), module.norm_k(module.k(x)), module.v(x)
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
