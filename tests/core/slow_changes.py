"""Prompts that change in a slow loop, and the slow loop of the pack's own adaptive anchor."""

from __future__ import annotations

import torch
from slow_rollout import gaussian
from slow_systems import CausVid, Held, SelfForcing


class Changes:
    """Prompts of a slow loop: `rows` of (first latent frame, context, transition, chunks of a soft one)."""

    def __init__(self, rows):
        self.rows, self.now, self.since = rows, 0, 0

    def __call__(self, loop):
        middle = loop.start + loop.frames / 2
        which = max([0, *(i for i, row in enumerate(self.rows) if row[0] < middle)])
        changed = which != self.now
        if changed:
            self.now, self.since = which, loop.start
        _, context, transition, chunks = self.rows[which]
        share = ((loop.start - self.since) / loop.frames + 1) / (chunks + 1)
        if which and transition == "soft" and share < 1:
            context = (1 - share) * self.rows[which - 1][1] + share * context
        loop.model.set_context(context)
        if changed and loop.start:
            loop.cut = transition == "rope cut"
            if transition in ("recache", "flush"):
                getattr(loop, transition)()


class Adaptive(SelfForcing):
    """A hidden state of S frames before the content, under the rules of the pack's adaptive anchor."""

    steps, told, S, W, fixed = CausVid.steps, CausVid.told, 1, 6, False
    strength, freeze_frame, reset_frames = 1.0, 0, 0

    def __init__(self, *args, **numbers):
        super().__init__(*args, **numbers)
        self.states = [[] for _ in self.cache]
        self.out_hidden = None

    def noise(self, chunk, step):
        state = gaussian(self.seed, chunk, step, (*self.shape[:2], self.S, *self.shape[3:]), "/state")
        return torch.cat([state, super().noise(chunk, step)], 2)

    def attend(self, layer, q, k, v):
        S, past, states = self.S, self.cache[layer], self.states[layer]
        current = self.split(k, v)
        begin = S + self.W if self.fixed else S + len(past)  # S slots are counted when they are empty too
        window = [begin - len(past) + i for i in range(len(past))]
        at = [*range(S), *range(begin, begin + len(current) - S)]
        out = self.attention(q, at, states + past + current, [*range(len(states)), *window, *at])
        if self.clean:
            self.cache[layer] = (past + current[S:])[-self.W :]
            self.states[layer] = self.moved(states, current[:S])
        return out

    def moved(self, old, to):
        end = self.start + self.frames
        now = self.now if self.again else self.start
        if old and self.freeze_frame and now >= self.freeze_frame:
            to = old
        elif old:
            to = [
                Held(0, a.key + self.strength * (b.key - a.key), a.value + self.strength * (b.value - a.value))
                for a, b in zip(old, to, strict=True)
            ]
        crossed = self.reset_frames and any(f % self.reset_frames == 0 for f in range(self.start + 1, end + 1))
        return [] if crossed else to

    def recache(self):
        """The same over the newest S + W + F latents, the last hidden state going along; a frozen one stays."""
        back, latents = self.start, torch.cat(self.out, 2)
        self.cache, hidden = [[] for _ in self.cache], self.out_hidden
        self.again, self.now = True, back
        self.start = max(0, back - self.S - self.W - self.frames)
        for block in latents[:, :, self.start :].split(self.frames, 2):
            self.clean_pass(torch.cat([hidden, block], 2))
            self.start += block.shape[2]
        self.again = False
        assert self.start == back

    def roll(self, chunks):
        out = []
        for _ in range(chunks):
            super().roll(1)
            both = self.out.pop()
            self.out_hidden = both[:, :, : self.S]
            self.out.append(both[:, :, self.S :])
            out.append(self.out[-1])
        return torch.cat(out, 2)
