"""The public systems' own inference loops, each in its own terms, over the model under test.

A layer's cache is a list of frames with their raw keys and values. Every pass writes its own frames into it, in place
after the first pass of a chunk, which also makes room; the clean pass comes last and stays. Shares nothing with
adastate_core but the model; the noise is the pack's (seed, chunk, step) noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from slow_rollout import gaussian


def warped(steps, shift) -> list[float]:
    """The family's step lists: entry 1000 - v of the table of 1000 shifted timesteps."""
    base = [1 - i / 1000 for i in range(1000)]
    table = [1000 * shift * u / (1 + (shift - 1) * u) for u in base]
    return [table[1000 - v] for v in steps]


@dataclass
class Held:
    """A frame in a cache: its index in the video, raw key and value [B, P, width]."""

    index: float
    key: torch.Tensor
    value: torch.Tensor


class Turner:
    """Rotation of frames in float64."""

    def __init__(self, head_dim, rows, columns):
        side = 2 * (head_dim // 6)
        self.widths, self.rows, self.columns, self.known = (head_dim - 2 * side, side, side), rows, columns, {}

    def table(self, position):
        if position not in self.known:
            rows = torch.arange(self.rows).double().repeat_interleave(self.columns)
            columns = torch.arange(self.columns).double().repeat(self.rows)
            angles = []
            for width, place in zip(self.widths, (torch.full_like(rows, position), rows, columns), strict=True):
                angles.append(place[:, None] / 10000.0 ** (torch.arange(0, width, 2).double() / width))
            self.known[position] = torch.exp(1j * torch.cat(angles, 1))
        return self.known[position]

    def __call__(self, x, positions):
        """[B, frames * P, heads, d], its frames at `positions`; float64."""
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.cat([self.table(p) for p in positions])[:, None]).flatten(-2)


class SelfForcing:
    """A cache of `size` frames, the current ones among them, of which the first `sink` stay; absolute positions."""

    size, sink, frames = 21, 0, 3
    steps, first_steps, told = warped((1000, 750, 500, 250), 5), None, {}
    context_noise, memories = 0.0, 0

    def __init__(self, model, *, seed=7, batch=1, h=4, w=6, prompts=None, **numbers):
        self.model, self.seed, self.heads = model, seed, model.geometry.heads
        self.shape, self.tokens = (batch, model.geometry.channels, self.frames, h, w), h * w // 4
        for name, value in numbers.items():
            setattr(self, name, value)
        self.shape = (*self.shape[:2], self.frames, h, w)
        self.turn = Turner(model.geometry.head_dim, h // 2, w // 2)
        self.cache = [[] for _ in range(model.geometry.layers)]
        self.start = self.chunk = 0
        self.end = [0] * model.geometry.layers
        self.clean, self.cut, self.again, self.out, self.prompts = False, False, False, [], prompts

    # --- attention

    def attend(self, layer, q, k, v):
        n, cache = q.shape[1] // self.tokens, self.cache[layer]
        if self.start + n > self.end[layer]:
            self.make_room(layer)
            cache += [None] * n
            self.end[layer] = self.start + n
        cache[-n:] = self.split(k, v)
        read, positions = self.read(layer)
        if self.cut:
            positions[-n:] = self.cut_positions(positions, n)
        return self.attention(q, positions[-n:], read, positions)

    def make_room(self, layer):
        """The oldest behind the sink go until a whole block has room."""
        cache = self.cache[layer]
        over = len(cache) + self.frames - self.size
        if over > 0:
            gone = cache[self.sink : self.sink + over]
            del cache[self.sink : self.sink + over]
            if not self.again:
                self.evicted(layer, gone)

    def split(self, k, v):
        pairs = zip(k.split(self.tokens, 1), v.split(self.tokens, 1), strict=True)
        return [Held(self.start + i, key, value) for i, (key, value) in enumerate(pairs)]

    def attention(self, q, at, read, positions):
        def heads(x):
            return x.unflatten(-1, (self.heads, -1))

        q = self.turn(heads(q), at)
        k = self.turn(heads(torch.cat([held.key for held in read], 1)), positions)
        v = heads(torch.cat([held.value for held in read], 1)).double()
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2).float()

    def read(self, layer):
        """The frames that a pass attends to and their positions, the current ones last."""
        return self.cache[layer], [held.index for held in self.cache[layer]]

    def evicted(self, layer, gone):
        pass

    def cut_positions(self, positions, n):
        """As far behind the past as Infinity-RoPE's 45 is behind its 3 frames."""
        return [p + 42 for p in positions[-n:]]

    # --- the loop

    def noise(self, chunk, step):
        return gaussian(self.seed, chunk, step, self.shape)

    def one_pass(self, x, t):
        return self.model.velocity(x, t, self)

    def clean_pass(self, x):
        self.clean = True
        self.one_pass(x, self.context_noise)
        self.clean = False

    def before_chunk(self):
        if self.prompts:
            self.prompts(self)

    def staying(self, layer):
        """The frames of the cache that no change of the prompt takes away."""
        return self.sink

    def flush(self):
        for layer, cache in enumerate(self.cache):
            self.make_room(layer)
            stay = self.staying(layer)
            del cache[stay : max(stay, len(cache) - 2)]

    def recache(self):
        """The pack's rule. The sink (and a memory) stays, what lies behind it goes; then the newest latents, as many as the
        cache has frames, pass once more at t=0, block by block. What the next block pushes out was merged before."""
        back, latents = self.start, torch.cat(self.out, 2)
        for layer, cache in enumerate(self.cache):
            self.make_room(layer)
            del cache[self.staying(layer) :]
        first = max(self.sink + self.memories, back - self.size - self.memories)
        self.again, self.start, self.end = True, first, [first] * len(self.end)
        for block in latents[:, :, first:].split(self.frames, 2):
            self.clean_pass(block)
            self.start += block.shape[2]
        for layer in range(len(self.cache)):
            self.make_room(layer)
        self.again = False
        assert self.start == back

    def roll(self, chunks):
        for _ in range(chunks):
            self.before_chunk()
            x, steps = self.noise(self.chunk, 0), self.steps
            if self.chunk == 0 and self.first_steps:
                steps = self.first_steps
            for j, t in enumerate(steps):
                x0 = (x.double() - t / 1000 * self.one_pass(x, self.told.get(j, t)).double()).float()
                if j + 1 < len(steps):
                    sigma = steps[j + 1] / 1000
                    x = (1 - sigma) * x0 + sigma * self.noise(self.chunk, j + 1)
            self.clean_pass(x0)
            self.out.append(x0)
            self.start, self.chunk, self.cut = self.start + self.frames, self.chunk + 1, False
        return torch.cat(self.out, 2)


class FrameWise(SelfForcing):
    """Causal-Forcing and Causal-Forcing++."""

    frames = 1


class TwoSteps(FrameWise):
    steps, first_steps = warped((1000, 500), 5), warped((1000, 750, 500, 250), 5)


class OneStep(FrameWise):
    steps, first_steps = warped((1000,), 5), warped((1000, 750, 500, 250), 5)


class CausVid(SelfForcing):
    """Clips of 21 frames; each after the first begins with the last 3 of the one before, as clean context."""

    steps, told = [1000 * 8 * u / (1 + 7 * u) for u in (1, 0.28, 0.12)], {0: 1000.0, 1: 757.0, 2: 522.0}
    clip, overlap = 21, 3

    def before_chunk(self):
        if self.start < self.clip:
            return
        context = torch.cat(self.out, 2)[:, :, -self.overlap :]
        self.cache, self.end = [[] for _ in self.cache], [0] * len(self.cache)
        self.start = 0
        self.clean_pass(context)
        self.start = self.overlap


class LongLive(SelfForcing):
    """Its recache is one pass over as many of the newest frames as the cache has room for. Once the first has left, the sink stays,
    and what the pass makes of as many frames as the sink has is not cached; so nobody sees it."""

    size, sink = 12, 3
    whole = False

    def recache(self):
        back, frames = self.start, min(self.size, self.start)
        self.whole, self.start = True, back - frames
        self.clean_pass(torch.cat(self.out, 2)[:, :, -frames:])
        self.whole, self.start, self.end = False, back, [back] * len(self.end)

    def attend(self, layer, q, k, v):
        if not self.whole:
            return super().attend(layer, q, k, v)
        frames = self.split(k, v)
        self.cache[layer] = self.cache[layer][: self.sink] + frames[self.sink :] if self.start else frames
        read, positions = self.read(layer)
        return self.attention(q, positions[-len(frames) :], read, positions)


class InfinityRope(SelfForcing):
    """Positions of a frame are its place in the cache; a cut puts the block after it at 45, 46, 47."""

    size, sink = 6, 1

    def read(self, layer):
        return self.cache[layer], list(range(len(self.cache[layer])))

    def cut_positions(self, positions, n):
        return [45 + i for i in range(n)]


class RewardForcing(InfinityRope):
    size, sink, decay = 9, 3, 0.999

    def evicted(self, layer, gone):
        for old in gone:
            i = old.index % self.sink
            slot = self.cache[layer][i]
            merged = [self.decay * a + (1 - self.decay) * b for a, b in ((slot.key, old.key), (slot.value, old.value))]
            self.cache[layer][i] = Held(slot.index, *merged)


class MemRope(InfinityRope):
    """Sink 3, two memories, 4 recent, 3 new: the cache without the memories has room for 10. Until there are memories, it has room
    for all 12, and then the two frames behind the sink go unseen."""

    size, sink, rates, memories = 10, 3, (0.01, 0.1), 2

    def __init__(self, *args, **numbers):
        super().__init__(*args, **numbers)
        self.memory = [[] for _ in self.cache]

    def staying(self, layer):
        return self.sink if self.memory[layer] else self.sink + self.memories

    def make_room(self, layer):
        cache = self.cache[layer]
        if not self.memory[layer]:
            if len(cache) + self.frames <= self.size + self.memories:
                return
            del cache[self.sink : self.sink + self.memories]
        super().make_room(layer)

    def evicted(self, layer, gone):
        means = [
            torch.cat(parts, 1).mean(1, keepdim=True) for parts in zip(*((g.key, g.value) for g in gone), strict=True)
        ]
        e = Held(0, *(mean.expand(-1, self.tokens, -1) for mean in means))
        if not self.memory[layer]:
            self.memory[layer] = [e, e]
        self.memory[layer] = [
            Held(0, rate * e.key + (1 - rate) * m.key, rate * e.value + (1 - rate) * m.value)
            for rate, m in zip(self.rates, self.memory[layer], strict=True)
        ]

    def read(self, layer):
        cache = self.cache[layer]
        held = cache[: self.sink] + self.memory[layer] + cache[self.sink :]
        return held, list(range(len(held)))


class RollingSink(SelfForcing):
    """The first 21 frames are kept. At the clean pass of a block from frame 21 on, the block before it becomes what a
    reader sees who goes through the first 18 frames forwards, backwards, forwards, ... one frame an index of the video."""

    def __init__(self, *args, **numbers):
        super().__init__(*args, **numbers)
        self.original = [[] for _ in self.cache]

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if self.clean:
            current, turning = self.cache[layer][-3:], 18
            if self.start < 21:
                self.original[layer] += current
            else:
                for i in range(3):
                    index = self.start - 3 + i
                    sweep, place = divmod(index, turning)
                    source = self.original[layer][turning - 1 - place if sweep % 2 else place]
                    self.cache[layer][i - 6] = replace(source, index=index)
        return out


class RollingForcing(SelfForcing):
    """Blocks at rising noise in one pass; the cache holds finished frames. Keys: the first block, put just before the
    past, at most `past` frames before the window, the window. The clean pass reads the same past as the noisy one."""

    steps, past, window = warped((1000, 800, 600, 400, 200), 5), 3, 5

    def attend(self, layer, q, k, v):
        cache, current = self.cache[layer], self.split(k, v)
        anchor, recent = cache[:3], cache[3:][-self.past :]
        before = self.start - len(recent) - 3
        positions = [before + i for i in range(len(anchor))] + [held.index for held in recent + current]
        if self.clean:
            cache += current
        return self.attention(q, positions[-len(current) :], anchor + recent + current, positions)

    def roll(self, chunks):
        """`chunks` blocks in all: the window grows at the front of the video and shrinks at its end."""
        n, last = self.frames, len(self.steps) - 1
        noisy = [self.noise(k, 0) for k in range(chunks)]
        for newest in range(chunks + self.window - 1):
            oldest = max(0, newest - self.window + 1)
            blocks = list(range(oldest, min(newest, chunks - 1) + 1))
            step = {k: newest - k for k in blocks}
            levels = [self.steps[step[k]] for k in blocks]
            self.start = oldest * n
            self.before_chunk()
            x = torch.cat([noisy[k] for k in blocks], 2)
            v = self.one_pass(x, [t for t in levels for _ in range(n)])
            for i, k in enumerate(blocks):
                part = slice(i * n, (i + 1) * n)
                x0 = x[:, :, part] - levels[i] / 1000 * v[:, :, part]
                if step[k] < last:
                    sigma = self.steps[step[k] + 1] / 1000
                    noisy[k] = (1 - sigma) * x0 + sigma * self.noise(k, step[k] + 1)
                else:
                    self.out.append(x0)
            if step[oldest] == last:
                self.clean_pass(self.out[-1])
        return torch.cat(self.out, 2)


SYSTEMS = {
    "self_forcing": SelfForcing,
    "causal_forcing": SelfForcing,
    "causal_forcing_frame": FrameWise,
    "causal_forcing_frame_2step": TwoSteps,
    "causal_forcing_frame_1step": OneStep,
    "causvid": CausVid,
    "longlive": LongLive,
    "rolling_forcing": RollingForcing,
    "reward_forcing": RewardForcing,
    "infinity_rope": InfinityRope,
    "memrope": MemRope,
    "rolling_sink": RollingSink,
    "krea_14b": SelfForcing,
}
