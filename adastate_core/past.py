"""The past of a rollout as one thing with one owner: its caches, what it counts, and what absorbs part of it.

    undo = past.mark(); ...; past.rewind(undo)      # around what comes before a chunk and may fail
    past.commit_chunk(x0, frames)                   # after a clean pass: the only way in which a chunk becomes past
    state = past.snapshot()

A commit has three parts. First it prepares all that can fail (copies to the CPU, blended anchors, books: which frame lies in which
slot) and changes nothing. Then it runs a list of writes, and remembers how many are done. Then all counters move at once. The data
that the writes read stays staged until the next pass. So a commit that failed between its writes can be finished: the next caller
goes on from the write that failed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from .absorption.absorber import Absorber
from .absorption.prior import Prior
from .absorption.saved import absorber_state, restore_absorber
from .absorption.solve import Solution
from .anchors import Anchor
from .cache.kv_cache import KVCache
from .cache.one_pass import OnePass
from .cache.reference_tokens import ReferenceTokens
from .cache.steps import Step, Steps
from .given import BEFORE
from .rollout_state import RolloutState
from .rope import Layout, Rope
from .schedules import rolling
from .shot_check import damage
from .shots import pinned_by
from .spec import RolloutSpec
from .standing import Standing
from .undo import Exchange, Undo


class UnfinishedError(RuntimeError):
    """A write that brings the cache to a whole chunk failed twice, so there is no state to go on from."""


# makes a pass over x [B, C, frames, h, w] at a timestep, changes nothing by it, and returns the velocity
Look = Callable[[torch.Tensor, float], torch.Tensor]


class Observer(Protocol):
    """Follows a past, and is told when the past's counters have moved. Absorber is one."""

    def start_chunk(self) -> None: ...

    def stand_aside(self) -> None:
        """The passes that follow are not a chunk's."""
        ...

    def joins(self) -> Iterable[tuple[int, Callable[[], object]]]:
        """(layer, write) that a commit runs as well; each may be run again."""
        ...

    def moved(self) -> None:
        """The chunk is past. Must not fail."""
        ...

    def catch_up(self, next_frame: int, look: Look) -> None:
        """Do what is due, or nothing. If it fails, it is called again. It may call `look` as often as it wants."""
        ...

    def flushed(self, keep: int) -> None: ...

    def mark(self) -> Any: ...

    def rewind(self, mark: Any) -> None: ...


@dataclass
class _Work:
    """Work under way: its `steps`; `then`, called when all steps are done; `commits`: whether the steps cache a chunk."""

    steps: Steps
    then: Callable[[], None]
    commits: bool


class Past:
    """Mutable, private to one run. The state from which it starts is never written to.

    `caches` holds the cache of the clean passes, and one more for each noise level that has a cache of its own; or, where no clean
    passes are made, those of history.py.
    """

    def __init__(
        self,
        spec: RolloutSpec,
        device: torch.device,
        text_tokens: int = 0,
        solution: Solution | None = None,
        levels: int = 1,
        keep_latents: bool = False,
        length: int | None = None,
        state: RolloutState | None = None,
        prior: Prior | None = None,
    ) -> None:
        """`length`: latent frames of the video, as far as it is known. `state`: what will be restored; nothing is allocated that it
        does not need."""
        patch = spec.geometry.patch
        self.spec = spec
        self.rope = Rope(spec.geometry.head_dim, spec.height // patch, spec.width // patch, device)
        plan = spec.plan(text_tokens, length=length, solution=solution, resumed=state)
        self.rope.most_bytes = self.rope.bytes_of(plan.table_frames)
        self.caches = [KVCache(plan, spec.geometry.heads, device)]
        while len(self.caches) < levels:
            self.caches.append(KVCache(plan, spec.geometry.heads, device, self.cache.workspace))
        self.reference = ReferenceTokens(plan, self.rope, device) if spec.reference is not None else None
        self.absorber: Absorber | None = None
        if spec.absorption is not None:
            self.absorber = Absorber(spec.absorption, self.cache, spec.anchor, self.rope, solution, prior)
        self.observer: Observer | None = self.absorber
        # the anchor's policy when the chunk from a frame on is cached
        self.anchor_at: Callable[[int], Anchor] = lambda first_frame: spec.anchor
        nothing = torch.zeros(self.shape(0))
        self.now = Standing(0, 0, 0, 0, nothing, nothing, nothing, nothing, nothing)
        self.kept: list[torch.Tensor] | None = [] if keep_latents else None
        # how far a rope cut puts the chunk under way ahead
        self.jump = 0
        # whether the chunk under way begins a shot (shots.py)
        self.opens_shot = False
        self._work: _Work | None = None
        # what is kept for `rewind`, while something may be undone
        self._undo: Undo | None = None

    @property
    def cache(self) -> KVCache:
        """The cache of the clean passes, or the first one there is."""
        return self.caches[0]

    @property
    def peak_nbytes(self) -> tuple[int, int]:
        """The most bytes of anchor, windows and current that were ever allocated, on the device and in host memory."""
        return sum(cache.peak_nbytes for cache in self.caches), sum(cache.peak_host_nbytes for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes of anchor, windows and current, wherever they are."""
        return sum(cache.nbytes + cache.host_nbytes for cache in self.caches)

    @property
    def given_frames(self) -> int:
        """Frames that were there before the first chunk: committed or still to be."""
        return self.now.next_frame - self.now.next_chunk * self.spec.chunk_frames + self.now.to_take

    @property
    def committing(self) -> bool:
        """Whether a commit has begun its writes, so that it has to be finished and cannot be undone."""
        return self._work is not None and self._work.commits

    def shape(self, frames: int) -> tuple[int, ...]:
        """[B, C, frames, h, w]."""
        return (self.spec.batch, self.spec.geometry.channels, frames, self.spec.height, self.spec.width)

    @property
    def shots(self) -> tuple[int, ...]:
        """The first frames of all shots, that of the chunk under way among them."""
        return self.now.shots + ((self.now.next_frame,) if self.opens_shot else ())

    def pin(self, end: int) -> range:
        """The frames that a shot keeps in the window when all before `end` are cached."""
        return pinned_by(self.shots, end, self.spec.chunk_frames)

    def layout(self, frames: int = 0, clean: bool = False) -> Layout:
        """Positions of the pass to come, over `frames` content frames; `clean`: of a finished chunk."""
        layout = Layout(
            mode=self.spec.positions,
            anchor_capacity=self.spec.anchor.frames,
            window_capacity=self.spec.window_frames,
            state_frames=self.spec.anchor.state_frames,
            anchor_present=self.cache.anchor_present,
            window_present=self.cache.window_present,
            first_frame=self.now.next_frame,
            state_after_past=self.spec.anchor.state_after_past,
            jump=self.jump,
            shots=self.shots,
            pin=self.pin(self.now.next_frame),
        )
        return rolling.shared(layout, self.spec.chunk_frames, frames, clean) if self.spec.shares_window else layout

    # ---- what is under way

    def _do(self, steps: Iterable[Step], then: Callable[[], None] = lambda: None, commits: bool = False) -> None:
        self._work = _Work(Steps(steps), then, commits)
        self._work.steps.run()
        self._end_work()

    def _end_work(self) -> None:
        then, self._work = self._work.then, None
        then()

    def finish(self) -> None:
        """Finish what failed in the middle. UnfinishedError, naming the layer, if it fails again."""
        if self._work is None:
            return
        try:
            self._work.steps.run()
        except Exception as error:
            raise UnfinishedError(
                f"the cache of layer {self._work.steps.layer} could not be brought to a whole chunk, tried twice ({error}), so "
                f"the rollout has no state after frame {self.now.next_frame}; go on from the last one that was saved"
            ) from error
        self._end_work()

    # ---- passes

    def start_chunk(self, told: bool = True) -> None:
        """Before the passes of a chunk, or (not `told`) of frames that are committed again."""
        self.finish()
        for cache in self.caches:
            cache.start_chunk()
        if self.observer is not None:
            self.observer.start_chunk() if told else self.observer.stand_aside()

    def place(self, layout: Layout) -> None:
        """Bring every cached key to its position in `layout`."""
        for cache in self.caches:
            for step in cache.turns(layout, self.rope):
                if self._undo is not None:
                    self._undo.turns(step.layer, cache.layers[step.layer], step.write)
                self._do([step])

    # ---- commits

    def give(self, latents: torch.Tensor, start: str = BEFORE) -> None:
        """Frames [B, C, n, h, w] that become the video's first ones: by `commit_given`, or inside the first chunk."""
        self.now = replace(self.now, given=latents.float().cpu(), start=start)

    def show(self, picture: torch.Tensor | None) -> None:
        """The latent [B, C, 1, h, w] of what the video shows (reference.py). ValueError for anything else."""
        if picture is None or picture.shape != self.shape(1):
            found = "there is none" if picture is None else f"it is {list(picture.shape)}"
            raise ValueError(f"the rollout needs the latent of a reference, {list(self.shape(1))}, and {found}")
        self.now = replace(self.now, reference=picture.float().cpu())

    def commit_given(self, frames: int) -> None:
        """The next `frames` given ones, after their clean pass."""
        self.finish()
        content, rest = self.now.given[:, :, :frames], self.now.given[:, :, frames:]
        states = self.spec.anchor.state_frames
        hidden = content[:, :, -1:].expand(-1, -1, states, -1, -1).clone() if states else None
        anchor = self.anchor_at(self.now.next_frame)
        self._commit(anchor, frames, replace(self._after(content), hidden=hidden, given=rest))

    def commit_chunk(self, x0: torch.Tensor, frames: int, blocks: tuple[rolling.Block, ...] = ()) -> None:
        """A chunk [state | content] float32, after its clean pass; `blocks` are the chunks that are still being denoised."""
        self.finish()
        now, states = self.now, self.spec.anchor.state_frames
        after = replace(
            self._after(x0[:, :, states:].cpu()),
            next_chunk=now.next_chunk + 1,
            before=now.next_frame,
            given=now.given[:, :, :0],
            start=BEFORE,
            hidden=x0[:, :, :states].cpu().clone() if states else None,
            blocks=tuple(replace(block, x=block.x.cpu()) for block in blocks),
            shots=self.shots,
        )
        self._commit(self.anchor_at(now.next_frame), frames, after)

    def commit_uncached(self, content: torch.Tensor, given: int = 0) -> None:
        """A chunk [B, C, F, h, w] of which no key is kept, because the window is made anew before every chunk: it is empty then.
        `given`: these are the next so many given frames instead."""
        self.finish()
        now, window = self.now, self.spec.window_frames
        after = self._after(content.cpu())
        if given:
            after = replace(after, given=now.given[:, :, given:])
        else:
            after = replace(after, next_chunk=now.next_chunk + 1, before=now.next_frame)
        after = replace(after, again=min(window, after.next_frame))
        steps = [
            Step(i, partial(layer.take_window, OrderedDict())) for cache in self.caches for i, layer in enumerate(cache)
        ]

        def move() -> None:
            self.now = after

        self._do(steps, move, commits=True)

    def commit_again(self, frames: int, anchor: Anchor) -> None:
        """Frames that were in the cache before, after another clean pass over them. Only the clean passes' cache gets them:
        what a noise level made itself cannot be made again, and its window begins anew."""
        after = replace(self.now, next_frame=self.now.next_frame + frames)
        self._commit(anchor, frames, after, self.caches[:1], told=False)

    def commit_one_pass(self, one_pass: OnePass) -> None:
        """Frames that were in the cache before, after the one pass that made anchor and window again."""
        after = replace(self.now, next_frame=one_pass.end)
        steps = [
            Step(index, partial(layer.take_books, *one_pass.of(layer).books()))
            for index, layer in enumerate(self.cache)
        ]

        def move() -> None:
            self.now = after

        self._do(steps, move, commits=True)

    def _after(self, content: torch.Tensor) -> Standing:
        """Where the rollout stands once `content` has been made."""
        now = self.now
        recent = torch.cat([now.recent, content], 2)[:, :, -self.spec.recent_frames :]
        pending = torch.cat([now.pending, content], 2) if now.pending.shape[2] else content
        first = content[:, :, :1].clone() if self.spec.first_kept and not now.next_frame else now.first
        return replace(
            now, next_frame=now.next_frame + content.shape[2], pending=pending, recent=recent, first=first, again=0
        )

    def _commit(
        self, anchor: Anchor, frames: int, after: Standing, caches: list[KVCache] | None = None, told: bool = True
    ) -> None:
        steps, left = [], []
        for cache in caches or self.caches:
            first = self.now.next_frame
            more, leaving = cache.prepared(anchor, first, frames, self.pin(first + frames))
            steps, left = steps + more, left + leaving
        observer = self.observer if told else None
        if observer is not None:
            steps += [Step(layer, write) for layer, write in observer.joins()]

        def move() -> None:
            for remember in left:
                remember()
            if observer is not None:
                observer.moved()
                self.jump = 0
            self.now, self.opens_shot = after, False

        self._do(steps, move, commits=True)

    def reach(self, length: int) -> None:
        """The video will have `length` latent frames; the next `catch_up` makes room for them."""
        for cache in self.caches:
            cache.reach(self.spec.made_frames(length))

    def catch_up(self, look: Look) -> None:
        """Give the cache the size that it is to have, and let the observer do what is due. Comes before the passes of a chunk."""
        self.finish()
        for cache in self.caches:
            cache.fit()
        if self.observer is not None:
            self.observer.catch_up(self.now.next_frame, look)

    # ---- transitions

    def mark(self) -> Undo:
        """What `rewind` goes back to. It keeps up with what is changed until it is used or forgotten; there is one at a time."""
        self.finish()
        self._undo = Undo(self.now, None if self.observer is None else self.observer.mark())
        return self._undo

    def forget_mark(self) -> None:
        """Nothing is to be undone any more."""
        self._undo = None

    def rewind(self, undo: Undo) -> None:
        """Back to where `mark` was called, whatever is under way. Frames that were to be committed again are not in the window
        then: `now.again` says how many of the newest latents have to be, before the next chunk."""
        self._undo = None

        def move() -> None:
            if self.observer is not None and undo.again:
                self.observer.flushed(0)
            elif self.observer is not None:
                self.observer.rewind(undo.observer)
            self.now, self.jump = replace(undo.now, again=undo.again or undo.now.again), 0

        self._do(undo.steps(self.caches), move)

    def flush(self, keep: int) -> None:
        """Forget the window but for its `keep` newest frames."""
        for cache in self.caches:
            for index, layer in enumerate(cache):
                exchange = Exchange(index, layer, keep)
                if self._undo is not None:
                    self._undo.moves(exchange)
                exchange.make()
        if self.observer is not None:
            self.observer.flushed(keep)

    def empty(self, frames: int, anchor_too: bool) -> None:
        """Forget the whole window, which is about to be made again from the newest `frames` latents. `anchor_too`: what is in the
        anchor will change as well."""
        if self._undo is not None:
            self._undo.commits_again(frames, self.caches, anchor_too)
        self.flush(0)

    def empty_anchor(self) -> None:
        """Forget the anchor of the clean passes' cache, which is about to be made again."""
        for layer in self.cache:
            layer.take_books({}, layer.pinned, layer.window)

    def go_back(self, frame: int) -> None:
        """The next passes commit frames from `frame` on again."""
        self.now = replace(self.now, next_frame=frame)

    # ---- what leaves

    def emit(self, frames: int) -> torch.Tensor:
        """Let the first `frames` of what is pending out: [B, C, frames, h, w] on the CPU."""
        now = self.now
        out, rest = now.pending[:, :, :frames], now.pending[:, :, frames:]
        self.now = replace(now, pending=rest, emitted=now.emitted + frames)
        if self.kept is not None:
            self.kept.append(out)
        return out

    def put_back(self, latents: torch.Tensor) -> None:
        """Take latents that have just left, but could not be used, back as the first pending ones."""
        now = self.now
        pending = torch.cat([latents, now.pending], dim=2)
        self.now = replace(now, pending=pending, emitted=now.emitted - latents.shape[2])
        if self.kept is not None:
            frames = latents.shape[2]
            while frames > 0:  # a state that was taken since has joined them with the chunks before
                last = self.kept.pop()
                if last.shape[2] > frames:
                    self.kept.append(last[:, :, :-frames])
                frames -= last.shape[2]

    @property
    def kept_latents(self) -> torch.Tensor | None:
        """All latents that have left since frame 0 [B, C, T, h, w], if they were kept all along.

        What is returned is what is kept from then on: whoever asks shares it, and nobody writes to it."""
        if not self.kept:
            return None
        if len(self.kept) > 1:
            self.kept = [torch.cat(self.kept, dim=2)]
        return self.kept[0]

    # ---- states

    def close(self) -> None:
        """Let go of everything but what is counted."""
        for cache in self.caches:
            cache.close()
        self.reference = self.absorber = self.observer = self._work = self._undo = self.kept = None
        self.anchor_at = lambda first_frame: Anchor()

    def snapshot(self, stream: dict[str, Any] | None = None) -> RolloutState:
        """The state after the last whole chunk. UnfinishedError where there is none to be had."""
        self.finish()
        now = self.now
        return RolloutState(
            spec=self.spec.describe(),
            next_frame=now.next_frame,
            next_chunk=now.next_chunk,
            emitted=now.emitted,
            cache=tuple(layer for cache in self.caches for layer in cache.snapshot()),
            pending=now.pending.clone(),
            hidden=now.hidden,
            latents=self.kept_latents,
            recent=now.recent,
            noisy=torch.cat([block.x for block in now.blocks], 2) if now.blocks else None,
            stream=stream or {},
            absorption={} if self.absorber is None else absorber_state(self.absorber),
            given=now.given.clone() if now.given.shape[2] else None,
            again=now.again,
            first=now.first.clone() if now.first.shape[2] else None,
            shots=now.shots,
            start=now.start,
            reference=now.reference.clone() if now.reference.shape[2] else None,
        )

    def restore(self, state: RolloutState, steps: int) -> None:
        """Go to where `state` was taken; `steps` is the schedule's number of steps. ValueError if the state is not whole."""
        self._check(state)
        frames = self.spec.chunk_frames
        nothing = self.now.given[:, :, :0]
        self.now = Standing(
            next_frame=state.next_frame,
            next_chunk=state.next_chunk,
            before=state.next_frame - frames if state.next_chunk else 0,
            emitted=state.emitted,
            pending=state.pending,
            recent=nothing if state.recent is None else state.recent,
            given=nothing if state.given is None else state.given,
            first=nothing if state.first is None else state.first,
            hidden=state.hidden,
            blocks=rolling.under_way(state.noisy, state.next_chunk, frames, steps),
            again=state.again,
            shots=state.shots,
            start=state.start,
            reference=nothing if state.reference is None else state.reference,
        )
        if self.absorber is not None:
            restore_absorber(self.absorber, state.absorption)
        layers = len(self.cache.layers)
        if len(state.cache) != layers * len(self.caches):
            held = f"{len(state.cache)} layers"
            raise ValueError(f"the state holds {held}, and this rollout has {layers} in {len(self.caches)} caches")
        for i, cache in enumerate(self.caches):
            cache.restore(state.cache[i * layers : (i + 1) * layers])
        if self.kept is not None and state.latents is not None:
            self.kept.append(state.latents)
        elif state.emitted:
            self.kept = None

    def return_to(self, state: RolloutState, steps: int) -> None:
        """Between two chunks: to an earlier state of this same rollout. If it fails, `restore` has to be tried with another one."""
        self.finish()
        self._undo, self.jump = None, 0
        self.kept = None if self.kept is None else []
        self.restore(state, steps)

    def _check(self, state: RolloutState) -> None:
        shapes = [(state.pending, state.pending.shape[2]), (state.hidden, self.spec.anchor.state_frames)]
        shapes.append((state.latents, state.emitted))
        shapes += [
            (one, one.shape[2]) for one in (state.recent, state.noisy, state.given, state.first) if one is not None
        ]
        if self.spec.reference is not None:
            shapes.append((state.reference, 1))
            if state.reference is None:
                raise ValueError("the state has no reference, which its settings say it has: it is damaged")
        if state.again and (state.recent is None or not 0 < state.again <= state.recent.shape[2]):
            raise ValueError(
                f"the state has {state.again} latent frames to be cached again and not as many recent ones: it is damaged"
            )
        if why := damage(state.shots, self.spec, state.next_frame, state.next_chunk):
            raise ValueError(f"the state's shots are {list(state.shots)[:8]}, {why}: it is damaged")
        if state.start != BEFORE:
            if state.given is None or state.next_frame:
                raise ValueError("the state's start latents have no first chunk to stand in: it is damaged")
            self.spec.check_inside(state.given.shape[2])
        for latents, frames in shapes:
            if latents is not None and (latents.shape != self.shape(frames) or latents.dtype != torch.float32):
                raise ValueError("the state's latents do not have the shape that its settings say: it is damaged")
