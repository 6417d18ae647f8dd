"""How the published systems generate, in their own terms, by whole histories in float64.

Every layer keeps the raw query, key and value of every frame that was ever made; nothing leaves. Before a pass a system says
which of these it reads and at what times, as a rule over the frame at which its chunk begins. Shares nothing with adastate_core
or the other slow loops but the model under test and the pack's noise.

`Mistake`s are the rules with one thing wrong, to show what a comparison with these loops would notice.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field

import torch


def drawn(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The pack's noise (docs/semantics.md, Noise), in float64."""
    digest = hashlib.sha256(f"{seed}/{chunk}/{step}".encode("ascii")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()


def shifted(t: float, shift: float) -> float:
    """The noise level of 1000 that is `t` before the shift."""
    return 1000 * shift * t / (1000 + (shift - 1) * t)


@contextlib.contextmanager
def in_float64(model):
    """The model computes in float64, and what it makes on its own, too; one that is no module of torch stays as it is."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    before, back = torch.get_default_dtype(), next(model.parameters()).dtype
    torch.set_default_dtype(torch.float64)
    model.double()
    if model.context is not None:
        model.context = model.context.double()
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        model.to(back)


@dataclass
class Frame:
    """What one layer made of one frame in its clean pass: raw q, k, v [B, P, width]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass
class Seen:
    """What a pass reads beside its own frames: keys and values [B, N, width], the time [B, N] and place in its frame [B, N]
    of each token; and the times of the pass's own frames."""

    k: torch.Tensor
    v: torch.Tensor
    times: torch.Tensor
    places: torch.Tensor
    own: list[float]


class Published:
    """The loop that all of them share: chunks of F frames, each taken down its levels with fresh noise in between, then passed
    once more, clean, at t = 0. `levels` are (sigma, what the model is told)."""

    F = 3
    levels = [(shifted(t, 5.0) / 1000, shifted(t, 5.0)) for t in (1000, 750, 500, 250)]

    def __init__(self, model, *, seed=7, batch=1, h=4, w=6, before_chunk=None, **numbers):
        self.model, self.seed, self.before_chunk = model, seed, before_chunk
        self.heads, self.rows, self.columns = model.geometry.heads, h // 2, w // 2
        self.P = self.rows * self.columns
        for name, value in numbers.items():
            setattr(self, name, value)
        self.shape = (batch, model.geometry.channels, self.F, h, w)
        self.history: list[list[Frame]] = [[] for _ in range(model.geometry.layers)]
        self.f = 0  # the frame at which the chunk begins
        self.first_pass = True
        self.out: list[torch.Tensor] = []
        self.last: dict[int, Frame] = {}

    # ---- what a system says

    def seen(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Seen:
        """The rule; q, k, v [B, n * P, width] are the pass's own."""
        raise NotImplementedError

    # ---- attention

    def turned(self, x: torch.Tensor, times: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, width] rotated to their times [B, N] and the rows and columns of their places [B, N]."""
        x = x.double().unflatten(-1, (self.heads, -1, 2))
        d = 2 * x.shape[-2]
        side = 2 * (d // 6)
        angles = []
        for width, at in ((d - 2 * side, times), (side, places // self.columns), (side, places % self.columns)):
            speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles.append(at.double()[..., None] * speeds)
        angle = torch.cat(angles, -1)[:, :, None]
        a, b = x.unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def of_frames(self, times: list[float], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and places of the tokens of whole frames."""
        at = torch.tensor(times, dtype=torch.float64).repeat_interleave(self.P)
        return at.expand(batch, -1), torch.arange(self.P).repeat(len(times)).expand(batch, -1)

    def whole(self, frames: list[tuple[torch.Tensor, torch.Tensor]], times: list[float], own: list[float]) -> Seen:
        """Whole frames (k, v), each at one time."""
        batch = self.shape[0]
        nothing = torch.zeros(batch, 0, self.model.geometry.heads * self.model.geometry.head_dim, dtype=torch.float64)
        k = torch.cat([nothing, *(frame[0] for frame in frames)], 1)
        v = torch.cat([nothing, *(frame[1] for frame in frames)], 1)
        return Seen(k, v, *self.of_frames(times, batch), own)

    def attend(self, layer, q, k, v):
        self.last[layer] = Frame(q, k, v)
        past = self.seen(layer, q, k, v)
        at = self.of_frames(past.own, len(q))
        queries = self.turned(q, *at)
        keys = torch.cat([self.turned(past.k, past.times, past.places), self.turned(k, *at)], 1)
        values = torch.cat([past.v, v], 1).double().unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)

    def kv(self, layer: int, frames) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(self.history[layer][i].k, self.history[layer][i].v) for i in frames]

    # ---- the loop

    def one_pass(self, x: torch.Tensor, told: float) -> torch.Tensor:
        v = self.model.velocity(x, told, self)
        self.first_pass = False
        return v

    def keep(self, x: torch.Tensor) -> None:
        """The clean pass over [B, C, n, h, w], whose tokens become history."""
        self.one_pass(x, 0.0)
        for layer, made in self.last.items():
            for parts in zip(*(t.split(self.P, 1) for t in (made.q, made.k, made.v)), strict=True):
                self.history[layer].append(Frame(*parts))

    def chunk(self, number: int) -> torch.Tensor:
        x = drawn(self.seed, number, 0, self.shape)
        for step, (sigma, told) in enumerate(self.levels):
            x0 = x - sigma * self.one_pass(x, told)
            if step + 1 < len(self.levels):
                lower = self.levels[step + 1][0]
                x = (1 - lower) * x0 + lower * drawn(self.seed, number, step + 1, self.shape)
        self.keep(x0)
        return x0

    def roll(self, chunks: int) -> torch.Tensor:
        """[B, C, chunks * F, h, w] float32."""
        with in_float64(self.model):
            for number in range(chunks):
                if self.before_chunk is not None:
                    self.before_chunk(self)
                self.first_pass = True
                self.out.append(self.chunk(number))
                self.f += self.F
        return torch.cat(self.out, 2).float()


class MemRope(Published):
    """MemRoPE. While all frames fit into the room, a chunk reads them in order. Then it reads the sink, two memories, the newest
    `recent` frames and itself, side by side.

    A memory is a mean over tokens, the same at each of them. It begins with the frames that leave at the first overflow, which are
    those behind the memories' own places; the frames that stood in these places are dropped.
    """

    sink, recent, rates = 3, 4, (0.01, 0.1)
    begins_early = False  # a mistake
    hold = staticmethod(
        lambda x: x
    )  # what becomes of a frame [B, P, width] behind the memories' places while it is held

    @property
    def room(self) -> int:
        return self.sink + len(self.rates) + self.recent + self.F

    def kv(self, layer, frames):
        exact = self.sink + len(self.rates)
        pairs = zip(frames, super().kv(layer, frames), strict=True)
        return [pair if i < exact else (self.hold(pair[0]), self.hold(pair[1])) for i, pair in pairs]

    def leaving(self) -> list[list[int]]:
        """The frames that left at each overflow so far."""
        groups: list[list[int]] = []
        for g in range(0, self.f + 1, self.F):
            places = self.sink + (0 if self.begins_early else len(self.rates))
            if not groups and g + self.F <= (places + self.recent + self.F):
                continue
            groups.append(list(range(g - self.recent - self.F if groups else places, g - self.recent)))
        return groups

    def memories(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        held: list[list[torch.Tensor]] = []
        for group in self.leaving():
            frames = self.kv(layer, group)
            mean = [torch.cat([frame[i] for frame in frames], 1).mean(1, keepdim=True) for i in (0, 1)]
            if not held:
                held = [mean, mean]
            else:
                held = [
                    [(1 - rate) * old + rate * new for old, new in zip(memory, mean, strict=True)]
                    for rate, memory in zip(self.rates, held, strict=True)
                ]
        return [(k.expand(-1, self.P, -1), v.expand(-1, self.P, -1)) for k, v in held]

    def seen(self, layer, q, k, v):
        memories = self.memories(layer)
        if not memories:
            read = self.kv(layer, range(self.f))
        else:
            newest = range(self.f - self.recent, self.f)
            read = self.kv(layer, range(self.sink)) + memories + self.kv(layer, newest)
        places = list(range(len(read) + self.F))
        return self.whole(read, places[: len(read)], places[len(read) :])


@dataclass
class Cut:
    """What a layer has left of the past of one batch item since its last cut: chosen tokens (frame, place, how often), and the
    first frame that is whole again."""

    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    whole_from: int = 0


class DeepForcingCode(Published):
    """Deep Forcing as its authors' code has it: everything stands at its own time in the video.

    A chunk that would make the past and itself more than `room` frames first cuts the past, in every layer: of the tokens that are
    neither sink nor in the `recent` newest frames (its own are among these), those stay to which the newest frames' queries attend
    most, worth `budget` frames with sink and recent ones. The same token stays at most `most` times. At a cut the sink is moved to
    just in front of as many frames as are then held beside it, counted back from the chunk.
    """

    sink, recent, budget, room, most = 10, 4, 16, 21, 7
    sink_off = 0  # a mistake: frames by which the sink is off
    shifts = True  # or a mistake: the sink stays

    def __init__(self, *args, **numbers):
        super().__init__(*args, **numbers)
        self.cuts = [[Cut(whole_from=self.sink) for _ in range(self.shape[0])] for _ in self.history]
        self.sink_at: float = 0
        self.cut_chunks: list[int] = []

    def worth(self, cut: Cut) -> int:
        """Frames that a past with this cut is worth, without the sink."""
        return len(cut.chosen) // self.P + max(0, self.f - cut.whole_from)

    def tokens(self, cut: Cut, until: int) -> list[tuple[int, int, int]]:
        return cut.chosen + [(i, p, 0) for i in range(cut.whole_from, until) for p in range(self.P)]

    def gather(self, layer: int, b: int, tokens: list[tuple[int, int, int]], own: torch.Tensor | None, name: str):
        """[N, width] of tokens of the history, and from frame f on of `own` [n * P, width]."""
        width = self.model.geometry.heads * self.model.geometry.head_dim
        every = [
            torch.zeros(0, width, dtype=torch.float64),
            *(getattr(frame, name)[b] for frame in self.history[layer]),
        ]
        rows = torch.cat(every if own is None else [*every, own])
        return rows[torch.tensor([i * self.P + p for i, p, _ in tokens], dtype=torch.int64)]

    def make_cut(self, layer: int, b: int, q: torch.Tensor, k: torch.Tensor) -> Cut:
        """q, k [n * P, width] of the chunk's first pass."""
        end = self.f + self.F - self.recent
        candidates = self.tokens(self.cuts[layer][b], end)
        asking = [(i, p, 0) for i in range(end, self.f + self.F) for p in range(self.P)]

        def standing(name: str, tokens, own):
            x = self.gather(layer, b, tokens, own, name)[None]
            times = torch.tensor([[t[0] for t in tokens]])
            return self.turned(x, times, torch.tensor([[t[1] for t in tokens]])).flatten(2)[0]

        scores = (standing("k", candidates, k) @ standing("q", asking, q).sum(0)).tolist()
        allowed = [i for i, token in enumerate(candidates) if token[2] < self.most]
        wanted = (self.budget - self.sink - self.recent) * self.P
        best = sorted(sorted(allowed, key=lambda i: -scores[i])[:wanted])
        return Cut([(i, p, n + 1) for i, p, n in (candidates[j] for j in best)], end)

    def seen(self, layer, q, k, v):
        batch, sink = self.shape[0], min(self.sink, self.f)
        cuts = self.cuts[layer]
        if self.first_pass and sink + self.worth(cuts[0]) + self.F > self.room:
            self.cuts[layer] = cuts = [self.make_cut(layer, b, q[b], k[b]) for b in range(batch)]
            if layer == 0:
                self.cut_chunks.append(self.f)
                if self.shifts:
                    self.sink_at = self.f - (self.budget - self.sink) - self.sink + self.sink_off
        tokens = [[(i, p, 0) for i in range(sink) for p in range(self.P)] + self.tokens(cut, self.f) for cut in cuts]
        keys = torch.stack([self.gather(layer, b, tokens[b], None, "k") for b in range(batch)])
        values = torch.stack([self.gather(layer, b, tokens[b], None, "v") for b in range(batch)])
        places = torch.tensor([[p for _, p, _ in row] for row in tokens]).reshape(batch, -1)
        times = torch.tensor(
            [[i + (self.sink_at if i < self.sink else 0) for i, _, _ in row] for row in tokens]
        ).reshape(batch, -1)
        return Seen(keys, values, times, places, list(range(self.f, self.f + self.F)))


class CausVid(Published):
    """CausVid: clips of 21 frames; each after the first begins with the newest 3 of the one before, passed clean. The model is told
    whole timesteps; the levels are the nearest ones of a table of 1000 at shift 8."""

    levels = [
        (min((shifted(1000 - i, 8.0) for i in range(1000)), key=lambda level, t=t: abs(level - t)) / 1000, float(t))
        for t in (1000, 757, 522)
    ]
    clip, overlap = 21, 3

    def seen(self, layer, q, k, v):
        held = self.kv(layer, range(len(self.history[layer])))
        own = q.shape[1] // self.P
        return self.whole(held, list(range(len(held))), list(range(len(held), len(held) + own)))

    def chunk(self, number):
        if len(self.history[0]) == self.clip:
            self.history = [[] for _ in self.history]
            self.keep(torch.cat(self.out, 2)[:, :, -self.overlap :])
        return super().chunk(number)


class LongLive(Published):
    """LongLive: the first 3 frames and the 6 newest, each at its own time. A recache passes the newest min(12, f) frames once, all
    of them seeing each other and, once it has gone out of reach, the sink as it was; a sink among them is made again."""

    sink, room = 3, 12
    hold = staticmethod(lambda x: x)  # what becomes of a frame [B, P, width] while it is held
    again = 12  # or a mistake: how many frames are passed
    keeps_sink = False  # a mistake: a sink among them stays

    def kv(self, layer, frames):
        return [(self.hold(k), self.hold(v)) for k, v in super().kv(layer, frames)]

    def seen(self, layer, q, k, v):
        frames = [
            *range(min(self.sink, self.f)),
            *range(max(self.sink, self.f - (self.room - self.sink - self.F)), self.f),
        ]
        return self.whole(self.kv(layer, frames), frames, list(range(self.f, self.f + self.F)))

    def recache(self) -> None:
        """Before a chunk, after the words have changed."""
        latents, end = torch.cat(self.out, 2), self.f
        first = max(0, end - self.again)
        if first:
            first = end - (self.again - self.sink)
        self.f, held = first, self.history
        self.history = [layer[: self.sink if first else 0] for layer in held]
        sink = range(len(self.history[0]))
        self.seen = lambda layer, q, k, v: self.whole(self.kv(layer, sink), list(sink), list(range(first, end)))
        kept = [list(layer) for layer in held]
        self.one_pass(latents[:, :, first:end], 0.0)
        del self.seen
        for layer, made in self.last.items():
            again = [
                Frame(*parts) for parts in zip(*(t.split(self.P, 1) for t in (made.q, made.k, made.v)), strict=True)
            ]
            kept[layer][first:end] = again
            if self.keeps_sink:
                kept[layer][: self.sink] = held[layer][: self.sink]
        self.history, self.f = kept, end


class SelfForcing(Published):
    """Self-Forcing and Causal-Forcing: the newest frames that fit beside the chunk, each at its own time."""

    window = 18

    def seen(self, layer, q, k, v):
        frames = list(range(max(0, self.f - self.window), self.f))
        return self.whole(self.kv(layer, frames), frames, list(range(self.f, self.f + self.F)))


class FrameWise(SelfForcing):
    """Causal-Forcing, frame-wise."""

    F, window = 1, 20


class FewSteps(FrameWise):
    """Causal-Forcing++: the first frame takes Self-Forcing's four steps, the others `levels`."""

    levels = [(shifted(t, 5.0) / 1000, shifted(t, 5.0)) for t in (1000, 500)]

    def chunk(self, number):
        if number == 0:
            own, self.levels = self.levels, Published.levels
            x0 = super().chunk(number)
            self.levels = own
            return x0
        return super().chunk(number)


class OneStep(FewSteps):
    levels = FewSteps.levels[:1]


class InfinityRope(Published):
    """Infinity-RoPE: the first frame and the 2 newest, at places 0, 1, 2, ... The chunk behind a cut stands at 45, 46, 47."""

    cuts: tuple[int, ...] = ()

    def seen(self, layer, q, k, v):
        frames = [*range(min(1, self.f)), *range(max(1, self.f - 2), self.f)]
        begin = 45 if self.f in self.cuts else len(frames)
        return self.whole(self.kv(layer, frames), list(range(len(frames))), list(range(begin, begin + self.F)))


class RewardForcing(Published):
    """Reward Forcing: a sink of 3, the 3 newest frames and the chunk, at places 0, 1, 2, ... Of the 3 frames that leave at an
    overflow each moves the sink frame of its own number a little."""

    decay = 0.999

    def seen(self, layer, q, k, v):
        if self.f < 9:
            frames = self.kv(layer, range(self.f))
        else:
            sink = self.kv(layer, range(3))
            for g in range(9, self.f + 1, 3):
                leaving = self.kv(layer, range(g - 6, g - 3))
                sink = [
                    tuple(self.decay * a + (1 - self.decay) * b for a, b in zip(*pair, strict=True))
                    for pair in zip(sink, leaving, strict=True)
                ]
            frames = sink + self.kv(layer, range(self.f - 3, self.f))
        places = list(range(len(frames) + self.F))
        return self.whole(frames, places[: len(frames)], places[len(frames) :])


class RollingSink(SelfForcing):
    """Rolling Sink: as Self-Forcing, but once the room of 21 has been full, a chunk that is passed clean turns the one before it
    into early frames: those of a reader who walks through the first 18 forwards, backwards, ..., one a frame of the video."""

    def seen(self, layer, q, k, v):
        frames = list(range(max(0, self.f - self.window), self.f))

        def shown(i: int) -> int:
            sweep, place = divmod(i, 18)
            return i if i < 18 or i >= self.f - 3 else (17 - place if sweep % 2 else place)

        read = self.kv(layer, [shown(i) for i in frames])
        return self.whole(read, frames, list(range(self.f, self.f + self.F)))


class KreaRealtime(Published):
    """Krea Realtime: nothing that a layer made outlives a block. Before a block the server passes 3 past frames as clean ones at
    0, 1, 2, which all see each other and nothing else; the block stands behind them, and is passed five times, the last time
    told 0. Nothing is passed behind a block.

    The past frames of the second block are the first one; later they are the newest block, whose first frame is its last
    picture encoded alone, by `encoded` (of all latents and the frame's number; None: its latent is taken). With
    `keep_first_frame` they are the first frame of the video and the two newest. `words` [(frame, text)] change for the block
    from that frame on, behind its past.
    """

    levels = [*Published.levels, (0.005 / 1.004, 0.0)]
    past, encoded, keep_first_frame, start = 3, None, False, None
    words: tuple = ()
    hold = staticmethod(lambda x: x)  # what becomes of what a pass over past frames leaves, while it is held
    # mistakes: the past also sees the block before it; its newest frame is missing; the words change before it is passed
    looks_back, stale, words_first = False, 0, False

    def seen(self, layer, q, k, v):
        frames = self.kv(layer, range(len(self.history[layer])))
        frames = [(self.hold(k), self.hold(v)) for k, v in frames]
        places = list(range(len(frames) + q.shape[1] // self.P))
        return self.whole(frames, places[: len(frames)], places[len(frames) :])

    def past_frames(self, number: int) -> list[torch.Tensor]:
        """[B, C, 1, h, w] each."""
        every = list(torch.cat(self.out, 2).split(1, 2))
        every = every[: len(every) - self.stale]
        rest = every[1:][-(self.past - 1) :] if self.past > 1 else []
        if self.keep_first_frame or (number - 1) * self.F < self.past:
            return [every[0], *rest]
        first = (
            every[-self.past]
            if self.encoded is None
            else self.encoded(torch.cat(self.out, 2).float(), self.f - self.past).double()
        )
        return [first, *rest]

    def speak(self) -> None:
        for frame, text in self.words:
            if frame == self.f:
                self.model.set_context(text.double())

    def chunk(self, number: int) -> torch.Tensor:
        if self.words_first:
            self.speak()
        self.history = [layer[-3:] if self.looks_back else [] for layer in self.history]
        if self.out:
            for part in torch.cat(self.past_frames(number), 2).split(self.F, 2):
                self.keep(part)
        self.speak()
        x = drawn(self.seed, number, 0, self.shape)
        for step, (sigma, told) in enumerate(self.levels):
            x0 = x - sigma * self.one_pass(x, told)
            if step + 1 < len(self.levels):
                lower = self.levels[step + 1][0]
                x = (1 - lower) * x0 + lower * drawn(self.seed, number, step + 1, self.shape)
        return x0

    def roll(self, chunks):
        if self.start is not None and not self.out:
            self.out, self.f = [self.start.double()], self.start.shape[2]
        return super().roll(chunks)


PUBLISHED = {
    "self_forcing": SelfForcing,
    "causal_forcing": SelfForcing,
    "causal_forcing_frame": FrameWise,
    "causal_forcing_frame_2step": FewSteps,
    "causal_forcing_frame_1step": OneStep,
    "causvid": CausVid,
    "longlive": LongLive,
    "reward_forcing": RewardForcing,
    "infinity_rope": InfinityRope,
    "memrope": MemRope,
    "rolling_sink": RollingSink,
    "krea_14b": KreaRealtime,
}
