"""Which blocks of a run's model use the compiled functions of attention/block.py, and what is compiled before its first pass."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..cache.byte_plan import CachePlan
from ..cache.rotated import RotatedSpec
from ..fused import COMPILED, PLAIN, Fused
from ..rope import Rope
from .block import FUNCTIONS

log = logging.getLogger("adastate")

ROTATIONS = ("norm_rotate", "norm_rotate_raw")


@dataclass(frozen=True)
class QueryKeyNorms:
    """The RMS norms of a self-attention's queries and keys."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: tuple[float, float]

    @staticmethod
    def of(attention: nn.Module) -> QueryKeyNorms:
        q, k = attention.norm_q, attention.norm_k
        return QueryKeyNorms(q.weight, k.weight, (q.eps, k.eps))


@dataclass(frozen=True)
class PassForm:
    """What decides a pass's shapes: its frames, its timesteps (1, or one a frame), and whether its raw keys are kept."""

    frames: int
    timesteps: int
    kept: bool


class FusedBlocks:
    """Which blocks use the functions, and which way these go. Mutable, private to one run."""

    def __init__(self, fused: Fused, layers: Iterable[int], why: Mapping[int, str] | None = None) -> None:
        """`layers` are those that use them; `why` says of others why they are plain."""
        self.fused, self._layers, self._why = fused, set(layers), dict(why or {})
        if not self._layers and fused.way == COMPILED:
            fused.go_plain(next(iter(self._why.values()), "no block of the model can use compiled functions"))

    @property
    def way(self) -> str:
        """COMPILED if any block is, else PLAIN."""
        return COMPILED if self.compiled_layers else PLAIN

    @property
    def compiled_layers(self) -> tuple[int, ...]:
        """The layers that are not plain, in order."""
        return tuple(sorted(self._layers)) if self.fused.way == COMPILED else ()

    @property
    def why(self) -> tuple[str, ...]:
        """Why blocks are plain, each reason once."""
        reasons = [self.fused.why] if self.fused.way == PLAIN else [self._why[i] for i in sorted(self._why)]
        return tuple(dict.fromkeys(reason for reason in reasons if reason))

    def use(self, layer: int) -> bool:
        """Whether a layer's block uses the functions, compiled."""
        return self.fused.way == COMPILED and layer in self._layers

    def leave(self, layer: int, why: str) -> None:
        """A block goes the plain way from now on."""
        self._layers.discard(layer)
        self._why[layer] = why
        log.warning("block %d goes the plain way from here on, with other last bits: %s", layer, why)

    def prepare(
        self, block: nn.Module, plan: CachePlan, forms: Iterable[PassForm], names: Collection[str] = tuple(FUNCTIONS)
    ) -> Iterator[tuple[int, int]]:
        """Compile what passes of these forms need, by running the functions `names` on a block's weights: before each of them,
        (how many are done, of how many). What cannot be compiled makes all blocks plain."""
        writes = plan.batch == 1 and any(isinstance(layer, RotatedSpec) for layer in plan.layers)
        asked: dict[tuple[str, PassForm], None] = {}
        for form in forms:
            rotation = ROTATIONS[form.kept] if writes else None
            # the other functions know nothing of raw keys
            asked |= {
                (n, form if n == rotation else replace(form, kept=False)): None
                for n in names
                if n not in ROTATIONS or n == rotation
            }
        for done, (name, form) in enumerate(asked):
            if self.fused.way == PLAIN:
                return
            arguments = arguments_of(name, block, plan, form)
            if not self.fused.prepared(name, *arguments):
                yield done, len(asked)
                self.fused.prepare(name, *arguments)


def arguments_of(name: str, block: nn.Module, plan: CachePlan, form: PassForm) -> tuple[Any, ...]:
    """What a pass of that form gives a function, with a block's own weights and zeros for activations."""
    device, tokens = block.modulation.device, form.frames * plan.tokens

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=plan.dtype, device=device)

    def x() -> torch.Tensor:
        return zeros(plan.batch, tokens, plan.width)

    rows = block.modulation, zeros(plan.batch, form.timesteps, 6, plan.width)
    if name in ROTATIONS:
        norms = QueryKeyNorms.of(block.self_attn)
        rope = Rope(plan.width // plan.heads, plan.tokens, 1, device)
        turn = rope.turn(None, range(form.frames))
        weights = norms.q_weight, norms.k_weight, norms.eps
        return x(), x(), x(), *weights, turn.parts, turn.tokens, plan.heads, x(), x()
    norm3 = block.norm3
    return {
        "norm_modulate": lambda: (x(), *rows, block.norm1.eps),
        "gate_norm": lambda: (x(), x(), *rows, norm3.weight, norm3.bias, norm3.eps),
        "add_norm_modulate": lambda: (x(), x(), *rows, block.norm2.eps),
        "gate": lambda: (x(), x(), *rows),
    }[name]()
