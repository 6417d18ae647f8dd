"""How S2V models are rolled out, by whole histories in float64 on a state dict: LiveAvatar's way, and the pack's plain one.

Every pass that is read later leaves the raw keys and values of its frames, for each noise level its own; nothing leaves, and a pass
takes from the lists what its rule says and turns it to where it stands. Shares nothing with adastate_core but the pack's noise.

The attributes that are named as mistakes are the rules with one thing wrong, to show what a comparison would notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from slow_rollout import SlowAttention, slow_rollout
from slow_s2v import MOTION_FRAMES, SlowS2V, Sound, at_pictures, attention, grid, turned

FAR, LEAST, MOST = 30, 4, 30  # where the reference stands at least; how far it is from a chunk
PADDED, DROPPED = 73, 19  # pictures of a still before the first, and the frames that they are


def drawn(seed: int, chunk: int, step: int, shape: Sequence[int], suffix: str = "") -> torch.Tensor:
    """The pack's noise (docs/semantics.md, Noise), in float64."""
    digest = hashlib.sha256(f"{seed}/{chunk}/{step}{suffix}".encode("ascii")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).double()


def levels_of(steps: int, shift: float = 3.0) -> list[float]:
    """The noise levels of so many steps, and 0 behind them, as float32 holds them: shifted, from those shifted already."""
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)
    even = [1 + (last - 1) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    return torch.tensor([*(shift * u / (1 + (shift - 1) * u) for u in even), 0.0], dtype=torch.float32).tolist()


class S2VLoop:
    """What both ways share: the model, its words, what it hears and the picture that it is shown.

    `heard` [T, 1024] are the folded features of the sound, 50 a second (None: silence in the sense of no sound at all), `reference`
    [1 or B, 16, 1, h, w] is the latent of the picture, `context` [1, n, 4096] the words.
    """

    first_picture = 0  # of the sound, where the video begins
    F, fps, motion_rolls, motion_shown, uncut_places, host_motion_times = 3, 25.0, False, True, False, False

    def __init__(self, state, context, *, seed, h, w, batch=1, heard=None, reference=None, **numbers) -> None:
        self.model = state if isinstance(state, SlowS2V) else SlowS2V(state)
        self.context, self.seed, self.heard = context, seed, heard
        for name, value in numbers.items():
            setattr(self, name, value)
        self.shape, self.rows, self.columns = (batch, 16, self.F, h, w), h // 2, w // 2
        self.reference = None if reference is None else reference.double().expand(batch, -1, -1, -1, -1)
        # the frames before the first: the picture, again and again
        self.motion = None if reference is None else self.reference.expand(-1, -1, MOTION_FRAMES, -1, -1)
        self.conditions: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer, raw
        self.out: list[torch.Tensor] = []
        self.f, self.number = 0, 0

    def own(self, times: Sequence[float]) -> torch.Tensor:
        return grid(times, range(self.rows), range(self.columns))

    # ---- the picture

    def show(self, reference: torch.Tensor | None) -> None:
        """The condition tokens through the model, once; each layer's raw keys and values are kept."""
        self.conditions = []
        if reference is None:
            return
        at = self.standing(FAR)

        def attend(layer, q, k, v):
            q, k, v = q[:, : len(at)], k[:, : len(at)], v[:, : len(at)]
            self.conditions.append((k, v))
            return attention(turned(q, at, self.model.heads), turned(k, at, self.model.heads), v, self.model.heads)

        if self.motion_shown:
            self.model.prefill(reference, self.motion, self.context, attend)
        else:
            self.alone(reference, attend)

    def alone(self, reference, attend) -> None:
        """The picture's tokens and none of the frames before."""
        x, at = self.model.conditions(reference, self.motion)
        x = x[:, : self.rows * self.columns]
        six, words = self.model.time(torch.zeros(1))[1], self.model.words(self.context)
        for i in range(self.model.layers):
            x = self.model.block(i, x, six, words, attend)

    def standing(self, time: float) -> torch.Tensor:
        """The positions of the condition tokens, the picture at that time."""
        _, at = self.model.conditions(self.reference, self.motion)
        tokens = self.rows * self.columns
        at[:tokens, 0] = time
        if self.host_motion_times:
            at[-(tokens // 4) :, 0] = torch.tensor([-19.0, -18, -17, -16], dtype=torch.float64).repeat_interleave(
                tokens // 16
            )
        if self.uncut_places:
            at[2 * tokens :, 1:] = self._uncut(at[2 * tokens :])
        if self.motion_rolls:
            at[tokens:, 0] += time - FAR
        return at if self.motion_shown else at[:tokens]

    def _uncut(self, at: torch.Tensor) -> torch.Tensor:
        parts = []
        for width, frames in ((2, 1), (4, 4)):
            rows, columns = self.rows // width, self.columns // width
            even = [torch.linspace(0, size - 1, n, dtype=torch.float64).tolist() for size, n in
                    ((self.rows, rows), (self.columns, columns))]  # fmt: skip
            parts.append(grid([0] * frames, *even)[:, 1:])
        return torch.cat(parts)

    # ---- attention

    def read(self, past, own, layer, q, k, v, condition_at) -> torch.Tensor:
        """Of a pass whose frames stand at the times `own`: attention to `past` [(time, k, v)], itself and the picture."""
        at = self.own(own)
        keys = [turned(key, self.own([time]), self.model.heads) for time, key, _ in past]
        values = [value for _, _, value in past]
        keys.append(turned(k, at, self.model.heads))
        values.append(v)
        if self.conditions:
            key, value = self.conditions[layer]
            keys.append(turned(key, condition_at, self.model.heads))
            values.append(value)
        return attention(turned(q, at, self.model.heads), torch.cat(keys, 1), torch.cat(values, 1), self.model.heads)

    def frames_of(self, k: torch.Tensor, v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = self.rows * self.columns
        return list(zip(k.split(tokens, 1), v.split(tokens, 1), strict=True))


class LiveAvatar(S2VLoop):
    """LiveAvatar: Euler steps without fresh noise, a history for each of them, absolute times; nothing is passed clean.

    A chunk hears its own pictures alone, the first of them as if it had always been. From frame `rolls_at` on the picture is the
    first frame that was made (None: never). It stands at max(30, f0 + rd); rd is drawn for every pass.
    """

    ring, steps, rolls_at, sink = 12, 4, 12, 0  # the ring without the sink, which the published code has none of
    before_chunk = None  # called with the loop before each chunk
    one_history = False  # all steps read what the last one made: the cheaper kind, of one window
    packed = False  # a frame's time is its place among those that a chunk reads
    far = 0  # frames by which all of the video stands later in time
    # what becomes of a frame's raw keys or values [B, P, D] once a later chunk reads them
    hold = staticmethod(lambda x: x)
    # mistakes: the picture stands still, or 30 away; sound with what was before, or as the host aligns it; no end of the ring
    still, thirty_away, true_context, host_aligned, endless = False, False, False, False, False

    def __init__(self, *args, **numbers) -> None:
        super().__init__(*args, **numbers)
        self.levels = levels_of(self.steps)
        self.history = [[[] for _ in range(self.model.layers)] for _ in range(self.steps)]

    def distance(self, chunk: int, step: int) -> int:
        """rd, 4 .. 30."""
        digest = hashlib.sha256(f"{self.seed}/{chunk}/{step}/reference".encode("ascii")).digest()
        return LEAST + int.from_bytes(digest[:8], "big") % (MOST - LEAST + 1)

    def sound(self) -> Sound | None:
        if self.heard is None:
            return None
        count, first = 4 * self.F, 4 * self.f
        if self.true_context:
            first, count = 0, first + count
        if self.host_aligned:
            tokens, whole = self.model.hears(at_pictures(self.heard, self.fps, count, first + self.first_picture))
            return tokens[-self.F :], whole[-self.F :]
        own = at_pictures(self.heard, self.fps, count, first + self.first_picture)
        tokens, whole = self.model.hears(torch.cat([own[:1].expand(PADDED, -1), own])[: 4 * DROPPED + count])
        return tokens[DROPPED:][-self.F :], whole[DROPPED:][-self.F :]

    def chunk(self) -> torch.Tensor:
        if self.f == 0:
            self.show(self.reference)
        elif self.f == self.rolls_at and self.reference is not None:
            self.show(self.out[0][:, :, :1])
        sound, x = self.sound(), drawn(self.seed, self.number, 0, self.shape)
        left = 0 if self.endless else max(0, self.f - self.ring + self.F)
        past = [frame for frame in range(self.f) if frame < self.sink or frame >= left]
        places = list(range(len(past) + self.F))
        if not self.packed:
            places = [frame + self.far for frame in (*past, *range(self.f, self.f + self.F))]
        before, times = places[: len(past)], places[len(past) :]
        for step, sigma in enumerate(self.levels[:-1]):
            away = 30 if self.thirty_away else self.distance(self.number, step)
            at = None if self.reference is None else self.standing(FAR if self.still else max(FAR, times[0] + away))
            made = []

            def attend(layer, q, k, v, made=made, step=step, at=at):
                made.append(self.frames_of(k, v))
                held = self.history[-1 if self.one_history else step][layer]
                read = [(time, *held[frame]) for time, frame in zip(before, past, strict=True)]
                return self.read(read, times, layer, q, k, v, at)

            v = self.model.velocity(x, 1000 * sigma, self.context, attend, sound)
            for held, frames in zip(self.history[step], made, strict=True):
                held.extend((self.hold(k), self.hold(v)) for k, v in frames)
            x = x + (self.levels[step + 1] - sigma) * v
        return x

    def roll(self, chunks: int) -> torch.Tensor:
        """[B, 16, chunks * F, h, w], from where it is."""
        for _ in range(chunks):
            if self.before_chunk is not None:
                self.before_chunk(self)
            self.out.append(self.chunk())
            self.f, self.number = self.f + self.F, self.number + 1
        return torch.cat(self.out, 2)


class BesidePicture(SlowAttention):
    """The plain rollout's attention (slow_rollout.py), and the condition tokens behind what it reads."""

    beside: tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor] | None = None

    def read_beside(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.beside is None:
            return None
        key, value = self.beside[0][layer]
        return turned(key, self.beside[1], self.heads), value


class Plain(S2VLoop):
    """A CausalModel for slow_rollout.py: the pack's own way, with sound and a picture.

    Latent frame f hears pictures 4f - 8 .. 4f of all the sound. The picture stands at max(30, p + 4), p being the position of the
    pass's first frame. `states` frames stand in front of a chunk, and hear what its first frame hears.
    """

    fps, states, rolls_at = 16.0, 0, None

    def __init__(self, *args, **numbers) -> None:
        super().__init__(*args, **numbers)
        self.geometry = SimpleNamespace(channels=16, layers=self.model.layers, heads=self.model.heads)
        self._all: Sound | None = None
        self.show(self.reference)

    def sound_of(self, f: int, frames: int) -> Sound | None:
        """What `frames` frames from f on hear, the states first."""
        if self.heard is None:
            return None
        if self._all is None or len(self._all[0]) < f + frames:
            self._all = self.model.hears(at_pictures(self.heard, self.fps, 4 * (f + frames + 12)))
        places = [f] * self.states + list(range(f, f + frames))
        return self._all[0][places], self._all[1][places]

    def velocity(self, x: torch.Tensor, timestep, attention: BesidePicture) -> torch.Tensor:
        if attention.frame == self.rolls_at and timestep != 0:
            self.show(self.first)
        if attention.frame == 0 and timestep == 0.0:  # the clean pass
            self.first = x[:, :, self.states : self.states + 1]
        first = attention.positions[self.states]
        attention.beside = (self.conditions, self.standing(max(FAR, first + LEAST))) if self.conditions else None
        sound = self.sound_of(attention.frame, x.shape[2] - self.states)
        return self.model.velocity(x, timestep, self.context, attention.attend, sound)

    def roll(self, length: int, sigmas: Sequence[float], **more) -> dict:
        """What `slow_rollout` returns of it."""
        batch, _, _, h, w = self.shape
        return slow_rollout(
            self, batch=batch, h=h, w=w, F=self.F, S=self.states, seed=self.seed, sigmas=list(sigmas), length=length,
            attention=BesidePicture, **more,
        )  # fmt: skip
