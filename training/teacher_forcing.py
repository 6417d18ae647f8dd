"""A whole clip in one forward: every chunk denoised against its own clean past, with a window and a sink.

Frames are laid out [clean | noisy] on the time axis. Chunk i's noisy tokens attend to the sink, to the clean window
before it and to themselves; its clean tokens to the same past and to themselves, which is what the rollout's clean
pass caches. Positions are those of the rollout's `packed` mode: only distances matter, so everything is rotated at
its own index and the sink is moved up to the window. Equals the product's rollout pass by pass
(tests/training/test_training.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adastate_core.rope import Rope

KEY = "adastate_clip"


# queries times keys up to which two matrix products are faster on a CPU than torch's kernel with its backward: by a tenth, and
# by a third to two thirds where factors are taken in bfloat16 (`matmul_precision = "medium"`)
_FEW = 2**17


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of [B, N, heads, head_dim] each, to [B, N, width]; `mask`, bool, says which keys a query sees."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= _FEW:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def flat_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """`attended` as a cache's kernel: [B, tokens, heads * head_dim] each, to the same shape."""
    return attended(*(t.unflatten(-1, (heads, -1)) for t in (q, k, v)))


@dataclass
class ClipText:
    """The words of a clip's chunks: every chunk's tokens, in each of `copies` of the clip, see their own."""

    rope: Rope
    tokens: int
    frames: int
    chunk_frames: int
    text_mask: torch.Tensor | None  # [B, chunks, tokens] bool: what each chunk sees of the context; None: all

    copies: ClassVar[int] = 1

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk_frames

    def chunks_of(self, tokens: int) -> torch.Tensor:
        """[tokens] int64: the chunk that each of them belongs to."""
        return torch.arange(tokens) // (tokens // (self.copies * self.chunks)) % self.chunks

    def cross_attention(self, module: nn.Module, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = module.num_heads
        q, k, v = module.norm_q(module.q(x)), module.norm_k(module.k(context)), module.v(context)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        mask = None
        if self.text_mask is not None:
            mask = self.text_mask[:, None, self.chunks_of(q.shape[1]).to(q.device)]
        return module.o(attended(q, k, v, mask))


@dataclass
class WholeClipAttention(ClipText):
    """No causality at all: every frame of the clip sees every other, as in the models that score whole videos."""

    def self_attention(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[B, T P, width] -> the same, through the module's own projections."""
        q, k, v = module.norm_q(module.q(x)), module.norm_k(module.k(x)), module.v(x)
        q, k, v = (t.unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))
        turn = self.rope.turn(None, range(self.frames))
        q, k = self.rope.rotate(q, turn), self.rope.rotate(k, turn)
        return module.o(attended(q, k, v))


@dataclass
class ClipAttention(ClipText):
    """How the chunks of one clip see each other, and the rotation of its frames."""

    window_frames: int
    sink_frames: int

    copies: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.turn = self.rope.turn(None, [*range(self.frames)] * 2)

    def past(self, chunk: int) -> tuple[range, range]:
        """The sink frames and window frames that chunk `chunk` may see."""
        first = chunk * self.chunk_frames
        sink = range(min(self.sink_frames, first))
        return sink, range(max(first - self.window_frames, len(sink)), first)

    def self_attention(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[B, 2 T P, width] -> the same, through the module's own projections."""
        q, k, v = module.norm_q(module.q(x)), module.norm_k(module.k(x)), module.v(x)
        return module.o(self.attend(*(t.unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))))

    def attend(
        self,
        q: torch.Tensor,
        raw: torch.Tensor,
        v: torch.Tensor,
        beside: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Queries, keys that are not rotated and values [B, 2 T P, heads, head_dim] to [B, 2 T P, width]. `beside`: the
        rotated keys and the values that a chunk sees besides the clip's, [B, n, heads, head_dim] each."""
        batch, q, k = q.shape[0], self.rope.rotate(q, self.turn), self.rope.rotate(raw, self.turn)

        def by_frame(t: torch.Tensor) -> torch.Tensor:  # [B, 2, T, P, heads, head_dim]
            return t.unflatten(1, (2, self.frames, self.tokens))

        q, k, v, raw = by_frame(q), by_frame(k), by_frame(v), by_frame(raw)
        outs = []
        for i in range(self.chunks):
            own = slice(i * self.chunk_frames, (i + 1) * self.chunk_frames)
            sink, window = self.past(i)
            keys = [k[:, 0, list(window)].flatten(1, 2)]
            values = [v[:, 0, list(window)].flatten(1, 2)]
            if len(sink):
                shift = (window.start if window else own.start) - len(sink)
                turn = self.rope.turn(None, [shift + j for j in sink])
                keys.append(self.rope.rotate(raw[:, 0, : len(sink)].flatten(1, 2), turn))
                values.append(v[:, 0, : len(sink)].flatten(1, 2))
            if beside is not None:
                for parts, part in zip((keys, values), beside(i), strict=True):
                    parts.append(part)
            past_k, past_v = (torch.cat(parts, 1)[:, None].expand(-1, 2, -1, -1, -1) for parts in (keys, values))
            chunk_k = torch.cat([past_k, k[:, :, own].flatten(2, 3)], 2).flatten(0, 1)
            chunk_v = torch.cat([past_v, v[:, :, own].flatten(2, 3)], 2).flatten(0, 1)
            chunk_q = q[:, :, own].flatten(2, 3).flatten(0, 1)
            outs.append(attended(chunk_q, chunk_k, chunk_v).unflatten(0, (batch, 2)))
        return torch.cat(outs, 2).flatten(1, 2)


def install(model: nn.Module) -> None:
    """Route a bare Wan model's attention through the ClipAttention in `transformer_options`, where there is one."""

    def patch(block: nn.Module) -> None:
        self_attention, cross_attention = block.self_attn.forward, block.cross_attn.forward

        def self_forward(x, freqs, transformer_options={}, **more):  # noqa: B006
            clip = transformer_options.get(KEY)
            if clip is None:
                return self_attention(x, freqs, transformer_options=transformer_options, **more)
            return clip.self_attention(block.self_attn, x)

        def cross_forward(x, context, transformer_options={}, **more):  # noqa: B006
            clip = transformer_options.get(KEY)
            if clip is None:
                return cross_attention(x, context, transformer_options=transformer_options, **more)
            return clip.cross_attention(block.cross_attn, x, context)

        block.self_attn.forward, block.cross_attn.forward = self_forward, cross_forward

    for block in model.blocks:
        patch(block)


def velocity(
    model: nn.Module,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    context: torch.Tensor,
    clip: ClipAttention,
) -> torch.Tensor:
    """v of the noisy half [B, 16, T, h, w], at `sigma` [B, T]; the clean half is told timestep 0."""
    x = torch.cat([clean, noisy], 2)
    timesteps = torch.cat([torch.zeros_like(sigma), 1000 * sigma], 1)
    context = context.to(x).expand(x.shape[0], -1, -1)
    out = model.forward_orig(x, timesteps, context, freqs=None, transformer_options={KEY: clip})
    return out[:, :, clean.shape[2] :]
