"""What docs/semantics.md says, written a second time: lists, cat, per-frame rotation, float64 angles.

Shares nothing with adastate_core but the model under test.
"""

from __future__ import annotations

import hashlib
import math

import torch


def rotate(x: torch.Tensor, position: float, rows: int, columns: int) -> torch.Tensor:
    """[B, rows * columns, heads, d] of one frame, channel pair by channel pair."""
    d = x.shape[-1]
    side = 2 * (d // 6)
    axes = [(d - 2 * side, None), (side, "row"), (side, "column")]
    out, start = x.clone(), 0
    row = torch.arange(rows).repeat_interleave(columns).double()
    column = torch.arange(columns).repeat(rows).double()
    for width, axis in axes:
        place = {"row": row, "column": column}.get(axis, torch.full_like(row, position))
        for j in range(width // 2):
            angle = place * 10000.0 ** (-2 * j / width)
            cos, sin = angle.cos().float()[None, :, None], angle.sin().float()[None, :, None]
            a, b = x[..., start + 2 * j], x[..., start + 2 * j + 1]
            out[..., start + 2 * j] = a * cos - b * sin
            out[..., start + 2 * j + 1] = a * sin + b * cos
        start += width
    return out


def gaussian(seed: int, chunk: int, step: int, shape: tuple, suffix: str = "") -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{chunk}/{step}{suffix}".encode("ascii")).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))


class SlowAttention:
    def __init__(self, heads: int, rows: int, columns: int) -> None:
        self.heads, self.rows, self.columns = heads, rows, columns
        self.past: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.past_positions: list[float] = []
        self.positions: list[float] = []
        self.frame = 0
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _turn(self, x: torch.Tensor, positions: list[float]) -> torch.Tensor:
        frames = x.unflatten(1, (len(positions), -1)).unflatten(-1, (self.heads, -1))
        return torch.cat([rotate(frames[:, i], p, self.rows, self.columns) for i, p in enumerate(positions)], 1)

    def read_beside(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys, turned, and values [B, n, width] of what is no frame."""
        return None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen[layer] = (k, v)
        past = self.past.get(layer, [])
        keys = torch.cat([pk for pk, _ in past] + [k], 1)
        values = torch.cat([pv for _, pv in past] + [v], 1)
        keys = self._turn(keys, self.past_positions + self.positions)
        if beside := self.read_beside(layer):
            keys = torch.cat([keys, beside[0].unflatten(-1, (self.heads, -1))], 1)
            values = torch.cat([values, beside[1]], 1)
        queries = self._turn(q, self.positions)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values.unflatten(-1, (self.heads, -1)))
        return out.flatten(2)


def slow_rollout(
    model,
    *,
    batch,
    h,
    w,
    F,
    W,
    seed,
    sigmas,
    length,
    mode="packed",
    anchor="none",
    A=0,
    decay=0.999,
    S=0,
    after_past=False,
    given=None,
    hold=lambda x: x,
    solve=None,
    attention=SlowAttention,
) -> dict:
    """Returns latents [B, C, >= length, h, w], the state latents of each pass, and the frames cached at the end.

    `solve(x, v, sigmas)`: takes a chunk's noise to its clean latents by velocities v(x, sigma); None: by re-noising.
    `hold`: what becomes of a frame's raw keys or values [B, P, width] while they are held; an anchor that blends holds exact ones.
    """
    c, layers = model.geometry.channels, model.geometry.layers
    tokens = (h // 2) * (w // 2)
    attention = attention(model.geometry.heads, h // 2, w // 2)
    sink: list[int] = []
    window: list[int] = []
    raw: dict[int, dict[int, tuple]] = {i: {} for i in range(layers)}
    slots: dict[int, list] = {i: [] for i in range(layers)}
    outputs, hidden = [], []

    def prepare(f: int, n: int) -> None:
        attention.frame = f
        a, w_ = (len(slots[0]), len(window))
        b = max(a, S)
        content = {"fixed": A + W, "packed": b + w_, "absolute": f}[mode]
        anchor_positions = [sink[i] if mode == "absolute" else i for i in range(a)]
        attention.past_positions = [float(p) for p in anchor_positions]
        attention.past_positions += [float(content - w_ + i) for i in range(w_)]
        state, content = (content, content + S) if after_past else (0, content)
        attention.positions = [float(state + i) for i in range(S)] + [float(content + i) for i in range(n)]
        for i in range(layers):
            attention.past[i] = slots[i] + [raw[i][frame] for frame in window]

    def cache(f: int, n: int) -> None:
        for j in range(n):
            frame = f + j
            for i in range(layers):
                k, v = attention.seen[i]
                part = slice((S + j) * tokens, (S + j + 1) * tokens)
                raw[i][frame] = (k[:, part].clone(), v[:, part].clone())
            if anchor in ("static", "ema") and frame < A:
                sink.append(frame)
                for i in range(layers):
                    entry = raw[i].pop(frame)
                    slots[i].append(entry if anchor == "ema" else tuple(hold(x) for x in entry))
                continue
            if W:
                for i in range(layers):
                    raw[i][frame] = tuple(hold(x) for x in raw[i][frame])
            window.append(frame)
            while len(window) > W:
                old = window.pop(0)
                for i in range(layers):
                    k, v = raw[i].pop(old)
                    if anchor == "ema":
                        sk, sv = slots[i][old % A]
                        slots[i][old % A] = (decay * sk + (1 - decay) * k, decay * sv + (1 - decay) * v)
        if anchor == "adaptive":
            for i in range(layers):
                k, v = attention.seen[i]
                slots[i] = [tuple(hold(x[:, s * tokens : (s + 1) * tokens].clone()) for x in (k, v)) for s in range(S)]

    f = 0
    if given is not None:
        while f < given.shape[2]:
            part = given[:, :, f : f + F]
            n = part.shape[2]
            prepare(f, n)
            x = torch.cat([part[:, :, -1:]] * S + [part], 2)
            model.velocity(x, 0.0, attention)
            cache(f, n)
            outputs.append(part)
            hidden.append(x[:, :, :S])
            f += n
    k = 0
    while f < length:
        prepare(f, F)

        def draw(step: int, chunk: int = k) -> torch.Tensor:
            content = gaussian(seed, chunk, step, (batch, c, F, h, w))
            if not S:
                return content
            return torch.cat([gaussian(seed, chunk, step, (batch, c, S, h, w), "/state"), content], 2)

        x = draw(0)
        if solve is not None:
            x0 = solve(x, lambda x, sigma: model.velocity(x, 1000 * sigma, attention), sigmas)
        for j, sigma in enumerate(sigmas if solve is None else ()):
            x0 = x - sigma * model.velocity(x, 1000 * sigma, attention)
            if j + 1 < len(sigmas):
                x = (1 - sigmas[j + 1]) * x0 + sigmas[j + 1] * draw(j + 1)
        model.velocity(x0, 0.0, attention)
        cache(f, F)
        outputs.append(x0[:, :, S:])
        hidden.append(x0[:, :, :S])
        f, k = f + F, k + 1
    return {"latents": torch.cat(outputs, 2), "hidden": hidden, "window": window, "sink": sink}
