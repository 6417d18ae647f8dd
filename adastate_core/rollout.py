"""The recurrence: a causal video model rolled out chunk by chunk over an immutable state.

    rollout = Rollout(model, spec, settings, length=length)   # or with state=..., to go on from one
    for chunk in rollout.chunks(length): ...          # chunk.latents [B, C, n, h, w]
    state = rollout.snapshot()                        # after any chunk, and after an interrupt

Semantics: docs/semantics.md. Latents are float32 in the model's latent space; the model sees its own dtype.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import remade
from .absorption.absorber import Absorber
from .absorption.prior import Prior
from .absorption.solve import Solution
from .anchors import Anchor, AnchorAdaptive
from .attention.cached import CachedAttention
from .cache.kv_cache import KVCache
from .given import BEFORE, INSIDE, Held
from .history import CLEAN, OWN_LEVEL, check_recaches
from .passes import CausalModel, NonFiniteError, Passes, StepCallback
from .past import Past, UnfinishedError
from .prompts.plan import PromptPlan
from .reference import NEAREST
from .rollout_state import RolloutState
from .schedules import rolling
from .schedules.noise import NoiseAhead, noise
from .schedules.solvers import denoised
from .shot_check import check_shots
from .spec import ModelGeometry, RolloutSpec, Settings
from .transitions import before_chunk

__all__ = [
    "CausalModel",
    "Chunk",
    "ModelGeometry",
    "NonFiniteError",
    "Rollout",
    "RolloutSpec",
    "RolloutState",
    "Settings",
    "StepCallback",
    "UnfinishedError",
]


@dataclass(frozen=True)
class Chunk:
    """Frames that left the rollout together: `latents` [B, C, n, h, w], of which the first is video latent `first_frame`."""

    index: int
    first_frame: int
    latents: torch.Tensor
    hidden: torch.Tensor | None
    seconds: float
    given: bool = False


class Rollout:
    """One run. Owns its past; the state it starts from is never written to."""

    def __init__(
        self,
        model: CausalModel,
        spec: RolloutSpec,
        settings: Settings,
        state: RolloutState | None = None,
        keep_latents: bool = False,
        text_tokens: int = 0,
        on_step: StepCallback | None = None,
        solution: Solution | None = None,
        prompts: PromptPlan | None = None,
        length: int | None = None,
        prior: Prior | None = None,
        reference: torch.Tensor | None = None,
    ) -> None:
        """`solution`: an absorption that was solved before for the same model, prompt and seed; `prior`: what one that is solved
        now is drawn towards, as its settings name it. `prompts`: texts that change during the rollout; without `prompts` the model
        keeps its text. `length`: latent frames of the video; the cache has no room for more until `chunks` is asked for them (None:
        the whole window is allocated). `reference`: the latent [B, C, 1, h, w] of the picture that the video shows, where the spec
        has one and no state brings it."""
        schedule = settings.schedule
        if spec.blocks > 1 and len(schedule.sigmas) != spec.blocks:
            raise ValueError(
                f"{spec.blocks} chunks denoised together take {spec.blocks} steps, and the schedule has {len(schedule.sigmas)}"
            )
        if spec.blocks > 1 and schedule.sampler != "renoising":
            raise ValueError(
                f"the sampler {schedule.sampler} does not go with {spec.blocks} chunks denoised together; use renoising"
            )
        if schedule.told and spec.blocks > 1:
            raise ValueError(
                "chunks denoised together are told their own noise levels; leave out what the model is told"
            )
        if schedule.kept and (spec.blocks > 1 or spec.absorption is not None):
            raise ValueError(
                "steps with a past of their own go neither with absorption nor with chunks denoised together"
            )
        if schedule.kept and spec.remade:
            raise ValueError(
                "steps with a past of their own do not go with a past that is made anew before every chunk"
            )
        if schedule.kept and spec.history != CLEAN:
            raise ValueError(
                f"steps with a past of their own beside the clean one do not go with history {spec.history}"
            )
        if spec.history == OWN_LEVEL and {spec.windows} != {len(schedule.sigmas), len(schedule.for_chunk(0))}:
            raise ValueError(
                f"there are {spec.windows} windows, one for each step, and the schedule has {len(schedule.sigmas)} steps and "
                f"{len(schedule.for_chunk(0))} for the first chunk"
            )
        self._check_plan(spec, prompts)
        if state is not None and (differences := spec.differences(state.spec)):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        self.model, self.spec, self.settings, self.prompts = model, spec, settings, prompts
        # whether somebody will want a state from before the window shrank, and what gives its `stream`; it may raise
        self.holds_state = True
        self.streamed: Callable[[], dict[str, Any]] | None = None
        # who encodes a frame anew, where the past of a chunk begins with one (remade.py)
        self.renewed: remade.Renewed | None = None
        self._before_end: RolloutState | None = None
        self._unheld: Exception | None = None
        # the frame from which on the window shrinks, and the length that it ends at
        self._end: tuple[int, int] | None = None
        levels = spec.windows + len(schedule.kept)
        self.past = Past(spec, model.device, text_tokens, solution, levels, keep_latents, length, state, prior)
        self.past.anchor_at = self._anchor_at
        # what a state remembers of changes that were asked for while it was made, JSON-able
        self.steered: dict[str, Any] = {} if state is None else state.steered
        self._passes = Passes(model, self.past, schedule.context_timestep, on_step, settings.sound)
        self._noise = NoiseAhead(self._drawn)
        if self.absorber is not None:
            self.absorber.again = self._again
        if state is not None:
            self.past.restore(state, len(schedule.sigmas))
        elif spec.reference is not None:
            self.past.show(reference)

    @property
    def emitted(self) -> int:
        """Latent frames that have left since frame 0."""
        return self.past.now.emitted

    @property
    def generated(self) -> int:
        """Chunks that were generated since frame 0."""
        return self.past.now.next_chunk

    @property
    def next_frame(self) -> int:
        """The first latent frame of the chunk that is made next, behind given frames that are still to be taken."""
        return self.past.now.next_frame + self.past.now.to_take

    def steer(self, prompts: PromptPlan | None) -> None:
        """Between two chunks: have this plan instead, which says the same of all chunks that there are. Noise that was drawn ahead
        is drawn again. ValueError, with all as it was, for one that this rollout cannot have."""
        self._check_plan(self.spec, prompts)
        self.prompts, self._noise = prompts, NoiseAhead(self._drawn)

    @staticmethod
    def _check_plan(spec: RolloutSpec, prompts: PromptPlan | None) -> None:
        """ValueError, in a sentence, for changes of the prompt that a rollout of `spec` cannot have."""
        check_shots(spec, prompts)
        check_recaches(spec.history, prompts is not None and prompts.recaches)

    def go_back(self, state: RolloutState) -> Callable[[], None]:
        """Between two chunks: to an earlier state of this same rollout, from which `chunks` goes on as a rollout from it would. Not
        with an absorption. What is returned brings it back to where it was. If it fails, it is there."""
        here, steps = self.past.snapshot(), len(self.settings.schedule.sigmas)
        before = self._before_end, self._unheld, self._end, self.steered

        def undo() -> None:
            self.past.return_to(here, steps)
            self._before_end, self._unheld, self._end, self.steered = before
            self._noise = NoiseAhead(self._drawn)

        try:
            self.past.return_to(state, steps)
        except BaseException:
            undo()
            raise
        self._before_end, self._unheld, self._end, self.steered = None, None, None, state.steered
        self._noise = NoiseAhead(self._drawn)
        return undo

    def frames_after(self, chunk: int) -> int:
        """How many latent frames there are once `chunk` chunks were generated."""
        return self.past.given_frames + chunk * self.spec.chunk_frames

    def seed_of(self, chunk: int) -> int:
        """The seed that the noise of generated chunk `chunk`, from the next one on, is drawn with."""
        if self.prompts is None:
            return self.settings.seed
        return self.prompts.seed(
            self.next_frame + (chunk - self.generated) * self.spec.chunk_frames, self.settings.seed
        )

    def _anchor_at(self, first_frame: int) -> Anchor:
        """The anchor's policy when the chunk from `first_frame` on is cached."""
        anchor = self.spec.anchor
        if self.prompts is None or not isinstance(anchor, AnchorAdaptive):
            return anchor
        return replace(anchor, strength=self.prompts.strength(first_frame, anchor.strength))

    @property
    def renewed_frames(self) -> tuple[int, ...]:
        """The latent frames there are whose last picture will be wanted of `renewed`, the next chunk's first."""
        return remade.renewed_frames(self.spec, self.past.now.next_frame, self.generated)

    @property
    def kept_latents(self) -> torch.Tensor | None:
        """All latents since frame 0 [B, C, T, h, w], if they were kept all along; the rollout's own, not to be written to."""
        return self.past.kept_latents

    @property
    def keeps_latents(self) -> bool:
        """Whether all latents since frame 0 are kept: if that was asked for, and the state that it goes on from has them."""
        return self.past.kept is not None

    @property
    def cache(self) -> KVCache:
        """The cache of the clean passes, for its bytes."""
        return self.past.cache

    @property
    def attention(self) -> CachedAttention:
        """What the model's layers call; for observers of the attention."""
        return self._passes.attention

    @property
    def on_step(self) -> StepCallback | None:
        """Called before every pass; may be replaced between two chunks."""
        return self._passes.on_step

    @on_step.setter
    def on_step(self, callback: StepCallback | None) -> None:
        self._passes.on_step = callback

    @property
    def absorber(self) -> Absorber | None:
        """What absorbs history, if anything does."""
        return self.past.absorber

    def snapshot(self, stream: dict[str, Any] | None = None) -> RolloutState:
        """The state after the last whole chunk; valid after an interrupt or an error too. A chunk that failed while it was
        being committed is finished first, and its latents are pending in the state. UnfinishedError if this fails again.

        Once the window shrinks it is the state from before that, with its own `stream`, and says how many latents came
        `after`: chunks that were finished in a smaller window are no past for a longer video.
        """
        if self._before_end is not None:
            return replace(self._before_end, after=self.emitted - self._before_end.emitted)
        if self._unheld is not None and self.past.now.next_frame != self._end[0]:
            raise UnfinishedError(
                f"the state from before the window shrank could not be held ({self._unheld}), so there is none to go on from; "
                "free some memory, or choose the open ending"
            ) from self._unheld
        return self._snapshot(stream)

    def _snapshot(self, stream: dict[str, Any] | None) -> RolloutState:
        blocks = self.attention.blocks
        compiled = blocks.compiled_layers if blocks else ()
        return replace(self.past.snapshot(stream), compiled_layers=compiled, steered=self.steered)

    @property
    def ends(self) -> bool:
        """Whether the window shrinks or has shrunk: the state stays as it was before."""
        return self._end is not None

    def close(self) -> None:
        """Give the memory of the past back now, whoever still holds the rollout: the traceback of what ended it may. It cannot go
        on, and there is no state of it any more; what it counted stays. Called again, it does nothing."""
        self.past.close()
        self.streamed = self.renewed = self._before_end = self._passes = self._noise = None

    def put_back(self, latents: torch.Tensor) -> None:
        """Take latents that have just left, but could not be used, back as the first pending ones."""
        self.past.put_back(latents)

    def chunks(self, length: int, given: torch.Tensor | None = None, start: str = BEFORE) -> Iterator[Chunk]:
        """Roll on until `length` latent frames since frame 0 have left; `given` [B, C, n, h, w] become frames 0..n-1, and
        `start`, one of given.STARTS, says where these stand.

        Raises ValueError for lengths that ask for nothing new, NonFiniteError when the model breaks down.
        """
        if length <= self.emitted:
            raise ValueError(
                f"the rollout holds {self.emitted} latent frames and {length} were asked for; "
                "length counts from the first frame of the video, so ask for more than there is"
            )
        if self.ends and length != self._end[1]:
            raise ValueError(
                f"the window shrinks towards {self._end[1]} latent frames and {length} were asked for; go on from the snapshot"
            )
        if given is not None:
            self._give(given, length, start)
        self.past.reach(length)
        while self.emitted < length:
            began = time.perf_counter()
            self.past.finish()
            if not self.past.now.pending.shape[2]:
                self._next(length)
            yield self._emit(length, began)

    def _give(self, given: torch.Tensor, length: int, start: str) -> None:
        shape = self.past.shape(max(1, given.shape[2]))
        if self.past.now.next_frame or self.past.now.given.shape[2]:
            raise ValueError("a rollout that goes on from a state takes no start latents; they would be frame 0 again")
        if tuple(given.shape) != shape:
            raise ValueError(f"start latents are {tuple(given.shape)}; they must be {shape}")
        if given.shape[2] >= length:
            raise ValueError(f"start latents hold {given.shape[2]} latent frames of {length}; length must be longer")
        self.spec.check_given()
        if start == INSIDE:
            self.spec.check_inside(given.shape[2])
        self.past.give(given, start)

    def _next(self, length: int) -> None:
        """Make one more chunk. It becomes part of the past, and its latents are pending. If it fails, the transition or restart
        before it is undone."""
        self.past.catch_up(self._passes.look)
        self._refer()
        if self.past.now.to_take:
            self._take()
        else:
            if self._shrinks(length) and self._before_end is None:
                self._hold_state(length)
            with before_chunk(self.past, self._passes, self.prompts, self.renewed, self._passes_of_chunk):
                self._generate(length) if self.spec.blocks == 1 else self._generate_rolling(length)
        self.past.catch_up(self._passes.look)

    def _refer(self) -> None:
        """Have the tokens of what the next chunk's reference is; made under the words of the first chunk that it is shown to."""
        rule, now = self.spec.reference, self.past.now
        if rule is None:
            return
        frames, given, rolled = self.spec.chunk_frames, self.past.given_frames, rule.rolled(now.next_frame)
        since = given + max(0, -(-(rule.rolls_at - given) // frames)) * frames if rolled else 0
        if self.past.reference.made_of == since:
            return
        if self.prompts is not None:
            self.model.set_context(self.prompts.context(since))
        self._passes.refer(now.first if rolled else now.reference, now.reference, since)

    def _distance(self, step: int) -> int:
        """How far beyond the next chunk the reference stands in its pass `step`."""
        rule, chunk = self.spec.reference, self.generated
        return NEAREST if rule is None else rule.distance(self.seed_of(chunk), chunk, step)

    def _own_past(self, step: int) -> int | None:
        """Which cache noisy pass `step` of the next chunk reads and enters; None: the first one, which it does not enter."""
        if self.spec.history == CLEAN:
            return self.settings.schedule.own_past(step)
        return self.spec.kept_in(step, len(self._sigmas))

    def _shrinks(self, length: int) -> bool:
        """Whether the next chunk is finished in a window that no chunk enters any more."""
        spec, now = self.spec, self.past.now
        if spec.blocks == 1 or spec.ending == "open":
            return False
        return rolling.shrinks(now.next_frame, len(now.blocks), spec.blocks, spec.chunk_frames, length)

    def _hold_state(self, length: int) -> None:
        """Hold the state from before the window shrinks. If that fails twice, the video still ends, without one."""
        frame = self.past.now.next_frame
        if self._end is not None and self._end[0] != frame:
            return
        stream = self.streamed() if self.streamed else None
        if not self.holds_state:
            self._unheld = RuntimeError("nobody wanted it")
        for _ in range(2 if self.holds_state else 0):
            try:
                self._before_end = self._snapshot(stream)
                break
            except Exception as error:
                self._unheld = error
        self._end = frame, length

    def _take(self) -> None:
        """A chunk of given frames: one clean pass, with S copies of the last frame as its state, unless the past is made anew."""
        if self.prompts is not None:
            self.model.set_context(self.prompts.context(0))
        content = self.past.now.given[:, :, : self.spec.chunk_frames]
        if self.spec.remade:
            self.past.commit_uncached(content, given=content.shape[2])
            return
        state = content[:, :, -1:].expand(-1, -1, self.spec.anchor.state_frames, -1, -1)
        self._passes.checkpoint(0, len(self._sigmas) + 1, None)
        self.past.start_chunk()
        self._passes.clean(torch.cat([state, content], dim=2), content.shape[2])
        self.past.commit_given(content.shape[2])

    @property
    def _sigmas(self) -> tuple[float, ...]:
        return self.settings.schedule.for_chunk(self.generated)

    @property
    def _passes_before(self) -> int:
        """Passes that the past of the next chunk takes."""
        return remade.passes_before(self.spec, self.past.now.next_frame)

    @property
    def _passes_of_chunk(self) -> int:
        """Passes of the next chunk, which denoise it and make it, or its past, part of the cache."""
        clean = 1 if self.spec.history == CLEAN else 0
        return len(self._sigmas) + (self._passes_before if self.spec.remade else clean)

    def _generate(self, length: int) -> None:
        """Draw, denoise, commit one chunk, in which given frames may stand. The next one's noise, if `length` asks for one, is
        drawn during the clean pass."""
        frames, sigmas, schedule = self.spec.chunk_frames, self._sigmas, self.settings.schedule
        passes, before = self._passes_of_chunk, self._passes_before
        self.past.start_chunk()
        self.past.place(self.past.layout())
        noises = self._noise.take(self.generated, len(sigmas)).to(self.model.device, non_blocking=True)
        given = self.past.now.given  # where there is none, no copy waits for the device
        held = Held(given.to(self.model.device) if given.shape[2] else given, self.spec.anchor.state_frames)
        solver = schedule.solver(self.generated, noises)
        x, x0, told = held.put_into(solver.start), None, schedule.timesteps_of(self.generated)
        for step, timestep in enumerate(told):
            self._passes.checkpoint(before + step, passes, x0)
            told_frames = held.timesteps(timestep, x.shape[2])
            v = self._passes.noisy(x, told_frames, frames, self._own_past(step), self._distance(step))
            x0, x = map(held.put_into, solver.step(step, x, v))
        if self.spec.remade:
            self._passes.require_finite(x0)
            self.past.commit_uncached(x0)
            return
        draws = self._draw_next if self.past.now.next_frame + frames < length else None
        if self.spec.history != CLEAN:
            if draws is not None:
                draws()
            self._passes.require_finite(x0)
            self.past.commit_chunk(x0, frames)
            return
        self._passes.checkpoint(len(sigmas), passes, x0)
        self._passes.require_finite(x0)
        self._passes.clean(x0, frames, draws, self._distance(len(sigmas)))
        self.past.commit_chunk(x0, frames)

    @contextlib.contextmanager
    def _again(self, newest: int) -> Iterator[Callable[[int, int], torch.Tensor]]:
        """The first noisy pass of a chunk over the `newest` frames once more (0: over those that follow), under the newest chunk's
        words: from the next chunk's noise, because those frames have been made from their own. Gives what makes it, which returns
        the content's x0."""
        chunk, schedule = self.generated, self.settings.schedule
        sigmas, states = schedule.for_chunk(chunk), self.spec.anchor.state_frames
        if self.prompts is not None:
            self.model.set_context(self.prompts.context(self.past.now.before))
        start = schedule.solver(chunk, self._drawn(chunk, len(sigmas)).to(self.model.device)).start
        with self._passes.again(start, schedule.timesteps_of(chunk)[0], newest) as velocity:
            yield lambda number, count: denoised(start, velocity(number, count), sigmas[0])[:, :, states:]

    def _draw_next(self) -> None:
        following = self.generated + 1
        self._noise.prepare(following, len(self.settings.schedule.for_chunk(following)))

    def _generate_rolling(self, length: int) -> None:
        """Make passes over all chunks under way until the oldest is finished, then commit that one."""
        frames, sigmas, past = self.spec.chunk_frames, self.settings.schedule.sigmas, self.past
        blocks, finished, x0 = past.now.blocks, None, None
        shrinks = self._shrinks(length)
        while finished is None:
            chunk, first = self.generated + len(blocks), past.now.next_frame + len(blocks) * frames
            if len(blocks) < self.spec.blocks and not (shrinks and first >= length):
                blocks = (*blocks, rolling.Block(chunk, 0, self._content_noise(chunk, 0)))
            self._passes.checkpoint(0, 2, x0)
            past.start_chunk()
            past.place(past.layout(frames * len(blocks)))
            x, timesteps, levels = rolling.joined(blocks, sigmas, self.model.device)
            x0 = x - levels * self._passes.noisy(x, timesteps, frames * len(blocks))
            finished, blocks = rolling.advanced(blocks, x0, sigmas, self.seed_of)
        self._passes.checkpoint(1, 2, finished)
        self._passes.require_finite(x0)
        self._passes.clean(finished, frames)
        past.commit_chunk(finished, frames, blocks)

    def _drawn(self, chunk: int, steps: int) -> torch.Tensor:
        """[n, B, C, S + F, h, w] noise of a chunk, state first, float32 on the CPU, page-locked if the model is on CUDA; n of it,
        as many as the sampler takes for so many steps.

        Made for all steps at once: a copy between two steps would wait for the device.
        """
        taken = self.settings.schedule.noises(steps)
        seed, states = self.seed_of(chunk), self.spec.anchor.state_frames
        shape = (taken, *self.past.shape(states + self.spec.chunk_frames))
        out = torch.empty(shape, pin_memory=self.model.device.type == "cuda")
        for step in range(taken):
            out[step, :, :, states:] = self._content_noise(chunk, step)
            if states:
                out[step, :, :, :states] = noise(seed, chunk, step, self.past.shape(states), state=True)
        return out

    def _content_noise(self, chunk: int, step: int) -> torch.Tensor:
        """The noise [B, C, F, h, w] of a chunk's content: drawn from the seed, or at step 0 from `first_noise` if that is given."""
        frames, given = self.spec.chunk_frames, self.settings.first_noise
        out = noise(self.seed_of(chunk), chunk, step, self.past.shape(frames))
        if step == 0 and given is not None:
            own = given[:, :, chunk * frames : (chunk + 1) * frames]
            out[:, :, : own.shape[2]] = own
        return out

    def _emit(self, length: int, start: float) -> Chunk:
        """Let out at most a chunk of what is pending, and no more than `length` still asks for."""
        now = self.past.now
        wanted = min(self.spec.chunk_frames, now.pending.shape[2], length - now.emitted)
        given = now.emitted < self.past.given_frames
        latents = self.past.emit(wanted)
        seconds = max(0.0, time.perf_counter() - start)  # a clock may go back
        return Chunk(max(now.next_chunk - 1, 0), now.emitted, latents, now.hidden, seconds, given)

    def passes(self, length: int, given: int = 0) -> int:
        """How many forwards of the model are left until `length` latent frames, of which the first `given` are given before the
        first chunk. Those by which an absorption chooses its layers are among them; forwards that a change of the prompt needs are
        not counted."""
        return self._chunk_passes(length, given) + self._choosing_passes(length, given)

    def _choosing_passes(self, length: int, given: int) -> int:
        frames, now, each = given or self.past.now.to_take, self.past.now.next_frame, self.spec.chunk_frames
        made = now + frames + -(-max(0, length - now - frames) // each) * each
        return 0 if self.absorber is None else self.absorber.passes_due(made)

    def _chunk_passes(self, length: int, given: int) -> int:
        given = given or self.past.now.to_take
        taken = 0 if self.spec.remade else -(-given // self.spec.chunk_frames)
        left = length - given - self.past.now.next_frame
        chunks = max(0, -(-left // self.spec.chunk_frames))
        if not chunks:
            return taken
        if self.spec.blocks > 1:
            return taken + 2 * chunks + (0 if self.past.now.blocks else self.spec.blocks - 1)
        noisy = len(self._sigmas) + (chunks - 1) * len(self.settings.schedule.sigmas)
        if self.spec.remade:
            return noisy + remade.passes(self.spec, self.past.now.next_frame + given, chunks)
        return taken + noisy + (chunks if self.spec.history == CLEAN else 0)
