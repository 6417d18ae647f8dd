"""Which blocks of the host's Wan can use the compiled functions between their linears, and which are left as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model as wan
import folder_paths
import torch
from torch import nn

from ...adastate_core.attention.block import FUNCTIONS
from ...adastate_core.attention.fused_blocks import ROTATIONS, FusedBlocks, PassForm
from ...adastate_core.attention.wan import block_hindrance
from ...adastate_core.cache.byte_plan import CachePlan
from ...adastate_core.fused import PLAIN, Fused, compiler_for
from ...adastate_core.rollout import RolloutState
from .refusals import is_replaced

# torch before 2.4 has no RMS norm of its own
_NORMS = (nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm))
# weights of these types are numbers as they stand; packed ones (GGUF) are of others
_PLAIN_TENSORS: tuple[type, ...] = (nn.Parameter, torch.Tensor)
# what the block's forward takes that the functions were written for
_TAKES = ("self", "x", "e", "freqs", "context", "context_img_len", "transformer_options")


def compiles(device: torch.device) -> bool:
    """Whether anything is compiled for a model on `device`."""
    return compiler_for(device)[0] is not None


def host_fuses() -> bool:
    """Whether the host's block has parts of its own for norm and modulation, or is another than the functions stand for. They are
    left to it; queries and keys are still normed and rotated in one."""
    return hasattr(wan, "modulate") or tuple(inspect.signature(wan.WanAttentionBlock.forward).parameters) != _TAKES


def block_reason(patcher: Any, layer: int) -> str | None:
    """Why a block's forward is left as it is, or None."""
    name = f"diffusion_model.blocks.{layer}"
    block = patcher.get_model_object(name)
    kinds = [(block, wan.WanAttentionBlock)]
    if type(block) is wan.WanAttentionBlock:
        kinds += [(block.self_attn, wan.WanSelfAttention), (block.cross_attn, wan.WanT2VCrossAttention)]
    for module, kind in kinds:
        if type(module) is not kind:
            return f"it is a {type(module).__name__}, and compiled functions are for the host's {kind.__name__}"
    if is_replaced(patcher, f"{name}.forward"):
        return "another pack has replaced its forward"
    return "the host has fused parts of its own" if host_fuses() else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a weight's numbers are used as they stand."""
    return type(tensor) in _PLAIN_TENSORS


def norm_hindrance(norm: nn.Module, x: torch.Tensor) -> str | None:
    """Why a function cannot stand for the host's norm of `x`, or None (attention/wan.py, Hindrance)."""
    if not isinstance(norm, _NORMS) or "forward" in vars(norm):
        return f"is a {type(norm).__name__} that the functions do not stand for"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "has hooks"
    if getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None):
        return "is patched (a LoRA that is not merged)"
    for tensor in (norm.weight, getattr(norm, "bias", None)):
        if tensor is None:
            continue
        if not is_plain(tensor):
            return f"holds a {type(tensor).__name__}"
        if tensor.dtype != x.dtype or tensor.device != x.device:
            return f"is cast from {tensor.dtype} on {tensor.device}"
    return None


def block_reasons(patcher: Any) -> dict[int, str | None]:
    """`block_reason` of every block; nothing, where nothing is compiled."""
    if not compiles(patcher.load_device):
        return {}
    return {i: block_reason(patcher, i) for i in range(len(patcher.model.diffusion_model.blocks))}


def _layers(patcher: Any, reasons: dict[int, str | None], like: torch.Tensor) -> Iterator[tuple[int, str | None]]:
    """(layer, why it is plain or None) of every block of a loaded model, whose activations are as `like`."""
    for i, block in enumerate(patcher.model.diffusion_model.blocks):
        if not host_fuses():
            yield i, reasons[i] or block_hindrance(block, like, norm_hindrance)
            continue
        attention = getattr(block, "self_attn", None)
        if type(attention) is not wan.WanSelfAttention:
            yield i, f"its attention is a {type(attention).__name__}"
            continue
        norms = {name: getattr(attention, name) for name in ("norm_q", "norm_k")}
        yield i, next((f"its {n} {why}" for n, norm in norms.items() if (why := norm_hindrance(norm, like))), None)


def fused_blocks(
    patcher: Any, reasons: dict[int, str | None], dtype: torch.dtype, device: torch.device, state: RolloutState | None
) -> FusedBlocks:
    """The way that a run goes: as the `state` that it goes on from was made, as far as that can be; compiled, if there is none.

    `reasons`: what `block_reasons` said of the model before any forward was replaced for this run."""
    compiler, why = compiler_for(device)
    wanted = None if state is None else set(state.compiled_layers)
    if wanted is not None and not wanted:
        compiler, why = None, "the state that it goes on from was made the plain way"
    fused = Fused(FUNCTIONS, compiler, why, cache_folder())
    if fused.way == PLAIN:
        return FusedBlocks(fused, ())
    found = dict(_layers(patcher, reasons, torch.empty(0, dtype=dtype, device=device)))
    plain = {i: why for i, why in found.items() if why is not None}
    if wanted is not None:
        plain |= {i: "the state has it plain" for i in found.keys() - wanted - plain.keys()}
    return FusedBlocks(fused, found.keys() - plain.keys(), plain)


def compile_blocks(
    blocks: FusedBlocks, patcher: Any, plan: CachePlan, forms: Iterable[PassForm], told: Callable[[int, int], None]
) -> None:
    """Compile, before a rollout's first pass, what passes of these forms need; `told` hears (done, of how many) and may raise."""
    if blocks.way == PLAIN:
        return
    block = patcher.model.diffusion_model.blocks[blocks.compiled_layers[0]]
    names = ROTATIONS if host_fuses() else tuple(FUNCTIONS)
    for done, total in blocks.prepare(block, plan, forms, names):
        told(done, total)


def other_bits(blocks: FusedBlocks, state: RolloutState | None) -> str | None:
    """A sentence if a run cannot go on as its state was made, bit for bit."""
    if state is None or state.compiled_layers == blocks.compiled_layers:
        return None
    counts = [len(one) for one in (state.compiled_layers, blocks.compiled_layers)]
    because = f" ({'; '.join(blocks.why)})" if blocks.why else ""
    return (
        f"the state was made with compiled functions in {counts[0]} layers, and here they are in {counts[1]}{because}: the video "
        "goes on, but its last bits are not those of a run that had not been stopped"
    )


def cache_folder() -> Path:
    """Where what is compiled is kept for the next start of the host."""
    return Path(folder_paths.get_user_directory()) / "adastate" / "compiled"
