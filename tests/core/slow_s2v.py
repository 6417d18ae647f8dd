"""Wan 2.2 S2V in float64 on a state dict, written out: one pass over a chunk, the condition tokens, the sound.

Facts from the published model and the host's; shares no code with either, nor with adastate_core. What attends to what is for the
caller to say: every part takes `attend(layer, q, k, v)`, q, k, v [B, N, D] before any rotation.

Every frame is P = (h / 2) * (w / 2) tokens. Positions are rows (time, row, column) of a float64 [N, 3].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

INJECTED_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
HEAD_WIDTH = 128
NOISY, REFERENCE, MOTION = 0, 1, 2  # rows of trainable_cond_mask
MOTION_FRAMES = 19
# times of the motion tokens: the newest frame, the two before it in one, the sixteen before those in four
MOTION_TIMES = ((-1,), (-3,), (-19, -14, -9, -4))
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Sound = tuple[torch.Tensor, torch.Tensor]  # of frames: tokens [n, 5, D], and one [n, D]


def norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm without weights."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turned(x: torch.Tensor, at: torch.Tensor, heads: int) -> torch.Tensor:
    """Tokens [B, N, D] rotated to the positions [N, 3]; pair after pair, first those of time."""
    x = x.unflatten(-1, (heads, -1, 2))
    d = 2 * x.shape[-2]
    side = 2 * (d // 6)
    angles = []
    for axis, width in enumerate((d - 2 * side, side, side)):
        speeds = torch.tensor([10000.0 ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
        angles.append(at[:, axis, None] * speeds)
    angle = torch.cat(angles, -1)[None, :, None]
    a, b = x.unbind(-1)
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(2)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k / sqrt d) v of [B, N, D] and [B, M, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def grid(times: Sequence[float], rows: Sequence[float], columns: Sequence[float]) -> torch.Tensor:
    """The positions of whole frames, time by time and row by row."""
    return torch.tensor([(t, y, x) for t in times for y in rows for x in columns], dtype=torch.float64).reshape(-1, 3)


def spread(size: int, count: int) -> list[int]:
    """`count` places of 0..size-1, as far apart as they go, each cut to a whole number."""
    return [int((size - 1) * i / (count - 1)) if count > 1 else 0 for i in range(count)]


class SlowS2V:
    """The parts of a model; `state` is the state dict of its file."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.w = {name: value.double() for name, value in state.items()}
        self.dim = state["patch_embedding.weight"].shape[0]
        self.heads = self.dim // HEAD_WIDTH
        self.layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        self.injected = {block: i for i, block in enumerate(INJECTED_BLOCKS) if block < self.layers}

    # ---- parts

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def patches(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[B, 16, n, h, w] in patches of the kernel's size, as tokens [B, N, D]; what is left over at an edge is left out."""
        weight = self.w[f"{name}.weight"]
        b, (_, c, *size) = x.shape[0], weight.shape
        for axis, width in enumerate(size, 2):
            x = x.narrow(axis, 0, x.shape[axis] // width * width).unfold(axis, width, width)
        cells = x.flatten(2, 4).transpose(1, 2).reshape(b, -1, c * math.prod(size))
        return cells @ weight.flatten(1).T + self.w[f"{name}.bias"]

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def words(self, context: torch.Tensor) -> torch.Tensor:
        """Text [B, n, 4096] as the blocks read it."""
        return self.linear(
            "text_embedding.2", F.gelu(self.linear("text_embedding.0", context.double()), approximate="tanh")
        )

    def time(self, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of timesteps [...] what the head takes [..., D], and the six of the blocks [..., 6, D]."""
        half = self.w["time_embedding.0.weight"].shape[1] // 2
        speeds = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = told.double()[..., None] * speeds
        e = self.linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], -1))
        e = self.linear("time_embedding.2", F.silu(e))
        return e, self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, self.dim))

    def cross(self, name: str, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k = (
            self.rms(f"{name}.norm_q", self.linear(f"{name}.q", x)),
            self.rms(f"{name}.norm_k", self.linear(f"{name}.k", context)),
        )
        v = self.linear(f"{name}.v", context)
        b = max(len(q), len(k))
        out = attention(q.expand(b, -1, -1), k.expand(b, -1, -1), v.expand(b, -1, -1), self.heads)
        return self.linear(f"{name}.o", out)

    def block(self, i: int, x: torch.Tensor, six: torch.Tensor, words: torch.Tensor, attend: Attend) -> torch.Tensor:
        """`six` [.., N, 6, D] for each token."""
        name = f"blocks.{i}"
        six = (six + self.w[f"{name}.modulation"]).unbind(-2)
        y = norm(x) * (1 + six[1]) + six[0]
        q, k = (self.rms(f"{name}.self_attn.norm_{each}", self.linear(f"{name}.self_attn.{each}", y)) for each in "qk")
        y = attend(i, q, k, self.linear(f"{name}.self_attn.v", y))
        x = x + six[2] * self.linear(f"{name}.self_attn.o", y)
        y = norm(x) * self.w[f"{name}.norm3.weight"] + self.w[f"{name}.norm3.bias"]
        x = x + self.cross(f"{name}.cross_attn", y, words)
        y = norm(x) * (1 + six[4]) + six[3]
        y = self.linear(f"{name}.ffn.2", F.gelu(self.linear(f"{name}.ffn.0", y), approximate="tanh"))
        return x + six[5] * y

    # ---- sound

    def folded(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The hidden states of an ear, each [1, T, 1024], as one [T, 1024]."""
        weights = F.silu(self.w["casual_audio_encoder.weights"].flatten())
        return sum(w * layer[0].double() for w, layer in zip(weights, layers, strict=True)) / weights.sum()

    def hears(self, frames: torch.Tensor) -> Sound:
        """[4n, 1024], one for each picture, as n frames hear it: frame j what belongs to 4j and the eight before it, of which those
        before the first are as the first."""
        name = "casual_audio_encoder.encoder"

        def strided(part: str, x: torch.Tensor, stride: int) -> torch.Tensor:
            """x [groups, T, c]; each place reads itself and the two before it."""
            x = torch.cat([x[:, :1], x[:, :1], x], 1)
            places = range(0, x.shape[1] - 2, stride)
            read = torch.stack([x[:, p : p + 3] for p in places], 1)
            return (
                torch.einsum("gtkc,ock->gto", read, self.w[f"{name}.{part}.conv.weight"])
                + self.w[f"{name}.{part}.conv.bias"]
            )

        def tower(x: torch.Tensor) -> torch.Tensor:
            for part in ("conv2", "conv3"):
                x = strided(part, F.silu(norm(x)), 2)
            return F.silu(norm(x))

        frames = frames.double()[None]
        local = tower(torch.cat(strided("conv1_local", frames, 1).chunk(4, -1), 0)).transpose(0, 1)
        padding = self.w[f"{name}.padding_tokens"][0].expand(len(local), 1, -1)
        whole = self.linear(f"{name}.final_linear", tower(strided("conv1_global", frames, 1)))[0]
        return torch.cat([local, padding], 1), whole

    def inject(self, i: int, x: torch.Tensor, sound: Sound) -> torch.Tensor:
        """What sound adds behind block i to the frames [B, n * P, D]."""
        if i not in self.injected:
            return x
        number, out = self.injected[i], []
        for frame, tokens, whole in zip(x.chunk(len(sound[0]), 1), *sound, strict=True):
            adain = self.linear(f"audio_injector.injector_adain_layers.{number}.linear", F.silu(whole))
            shift, scale = adain.chunk(2)
            y = norm(frame, 1e-5) * (1 + scale) + shift
            out.append(frame + self.cross(f"audio_injector.injector.{number}", y, tokens[None]))
        return torch.cat(out, 1)

    # ---- passes

    def conditions(self, reference: torch.Tensor, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, N, D] of a picture [B, 16, 1, h, w] and of the frames before [B, 16, 19, h, w], and their positions [N, 3].

        The picture's are the first, at time 0.
        """
        rows, columns = reference.shape[3] // 2, reference.shape[4] // 2
        mask = self.w["trainable_cond_mask.weight"]
        motion = motion.double()
        parts = [self.patches("patch_embedding", reference.double()) + mask[REFERENCE]]
        at = [grid([0], range(rows), range(columns))]
        far, near, last = motion.split([16, 2, 1], 2)
        for (name, x), times, width in zip(
            (("proj", last), ("proj_2x", near), ("proj_4x", far)), MOTION_TIMES, (1, 2, 4), strict=True
        ):
            parts.append(self.patches(f"frame_packer.{name}", x) + mask[MOTION])
            places = [spread(size, size // width) for size in (rows, columns)]
            at.append(grid(times, *places))
        return torch.cat(parts, 1), torch.cat(at)

    def prefill(self, reference: torch.Tensor, motion: torch.Tensor, context: torch.Tensor, attend: Attend) -> None:
        """The condition tokens through all blocks, at timestep 0 and without sound; what comes out is of no use."""
        x, _ = self.conditions(reference, motion)
        six = self.time(torch.zeros(1))[1]
        words = self.words(context)
        for i in range(self.layers):
            x = self.block(i, x, six, words, attend)

    def velocity(
        self,
        x: torch.Tensor,
        told: float | Sequence[float] | torch.Tensor,
        context: torch.Tensor,
        attend: Attend,
        sound: Sound | None = None,
        pose: bool = True,
    ) -> torch.Tensor:
        """One pass over [B, 16, n, h, w] at one timestep or each frame at its own; without `pose` nothing is said of a pose, not
        even that there is none."""
        n = x.shape[2]
        tokens = self.patches("patch_embedding", x.double()) + self.w["trainable_cond_mask.weight"][NOISY]
        if pose:
            tokens = tokens + self.w["cond_encoder.bias"]
        e, six = self.time(torch.as_tensor(told, dtype=torch.float64).expand(n).repeat_interleave(tokens.shape[1] // n))
        words = self.words(context)
        for i in range(self.layers):
            tokens = self.block(i, tokens, six, words, attend)
            if sound is not None:
                tokens = self.inject(i, tokens, sound)
        return self.head(tokens, e, x.shape)

    def head(self, tokens: torch.Tensor, e: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Tokens [B, n * P, D] as latents of that shape; `e` [.., n * P, D] is what `time` gave."""
        b, c, n, h, w = shape
        shift, scale = (self.w["head.modulation"][0] + e[..., None, :]).unbind(-2)
        y = self.linear("head.head", norm(tokens) * (1 + scale) + shift)
        return y.view(b, n, h // 2, w // 2, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, n, h, w)


def at_pictures(heard: torch.Tensor, fps: float, count: int, first: int = 0) -> torch.Tensor:
    """Of what was heard [T, C], 50 a second, what belongs to the pictures first .. first + count - 1: [count, C].

    Through 30 a second, straight lines from its first to its last; nothing beyond its end; before it the first.
    """
    length = int(len(heard) / 50 * 30)
    rows = []
    for i in range(length):
        place = i * (len(heard) - 1) / (length - 1) if length > 1 else 0.0
        low = min(int(place), len(heard) - 1)
        high = min(low + 1, len(heard) - 1)
        rows.append((1 - (place - low)) * heard[low] + (place - low) * heard[high])
    nothing = torch.zeros_like(heard[0])
    places = [round(max(0, n) / fps * 30) for n in range(first, first + count)]  # halves to the even one
    return torch.stack([rows[place] if place < length else nothing for place in places])
