"""The recurrence: a causal video model rolled out chunk by chunk over an immutable state.

    rollout = Rollout(model, spec, settings)          # or with state=..., to go on from one
    for chunk in rollout.chunks(length): ...          # chunk.latents [B, C, n, h, w]
    state = rollout.snapshot()                        # after any chunk, and after an interrupt

Semantics: docs/semantics.md. Latents are float32 in the model's latent space; the model sees its own dtype.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .absorption.absorber import Absorber
from .absorption.solve import Solution
from .attention.cached import CachedAttention
from .cache.kv_cache import KVCache
from .passes import CausalModel, NonFiniteError, Passes, StepCallback
from .past import Past, UnfinishedError
from .prompts.plan import PromptPlan
from .rollout_state import RolloutState
from .schedules import rolling
from .schedules.noise import noise
from .schedules.schedule import TIMESTEPS
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
    ) -> None:
        """`solution`: an absorption that was solved before for the same model, prompt and seed. `prompts`: texts that
        change during the rollout; without `prompts` the model keeps its text."""
        schedule = settings.schedule
        if spec.blocks > 1 and len(schedule.sigmas) != spec.blocks:
            raise ValueError(
                f"{spec.blocks} chunks denoised together take {spec.blocks} steps, and the schedule has {len(schedule.sigmas)}"
            )
        if spec.blocks > 1 and schedule.sampler != "renoising":
            raise ValueError(
                f"the sampler {schedule.sampler} does not go with {spec.blocks} chunks denoised together; use renoising"
            )
        if schedule.kept and (spec.blocks > 1 or spec.absorption is not None):
            raise ValueError(
                "steps with a past of their own go neither with absorption nor with chunks denoised together"
            )
        if state is not None and (differences := spec.differences(state.spec)):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        self.model, self.spec, self.settings, self.prompts = model, spec, settings, prompts
        levels = 1 + len(schedule.kept)
        self.past = Past(spec, model.device, text_tokens, solution, levels, keep_latents)
        self._passes = Passes(model, self.past, schedule.context_timestep, on_step)
        if state is not None:
            self.past.restore(state, len(schedule.sigmas))

    @property
    def emitted(self) -> int:
        """Latent frames that have left since frame 0."""
        return self.past.now.emitted

    @property
    def generated(self) -> int:
        """Chunks that were generated since frame 0."""
        return self.past.now.next_chunk

    @property
    def kept_latents(self) -> torch.Tensor | None:
        """All latents since frame 0 [B, C, T, h, w], if they were kept all along."""
        return self.past.kept_latents

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
        being committed is finished first, and its latents are pending in the state. UnfinishedError if this fails again."""
        return self.past.snapshot(stream)

    def put_back(self, latents: torch.Tensor) -> None:
        """Take latents that have just left, but could not be used, back as the first pending ones."""
        self.past.put_back(latents)

    def chunks(self, length: int, given: torch.Tensor | None = None) -> Iterator[Chunk]:
        """Roll on until `length` latent frames since frame 0 have left; `given` [B, C, n, h, w] become frames 0..n-1.

        Raises ValueError for lengths that ask for nothing new, NonFiniteError when the model breaks down.
        """
        if length <= self.emitted:
            raise ValueError(
                f"the rollout holds {self.emitted} latent frames and {length} were asked for; "
                "length counts from the first frame of the video, so ask for more than there is"
            )
        if given is not None:
            self._give(given, length)
        while self.emitted < length:
            start = time.perf_counter()
            self.past.finish()
            if not self.past.now.pending.shape[2]:
                self._next(length)
            yield self._emit(length, start)

    def _give(self, given: torch.Tensor, length: int) -> None:
        shape = self.past.shape(max(1, given.shape[2]))
        if self.past.now.next_frame or self.past.now.given.shape[2]:
            raise ValueError("a rollout that goes on from a state takes no start latents; they would be frame 0 again")
        if tuple(given.shape) != shape:
            raise ValueError(f"start latents are {tuple(given.shape)}; they must be {shape}")
        if given.shape[2] >= length:
            raise ValueError(f"start latents hold {given.shape[2]} latent frames of {length}; length must be longer")
        self.past.give(given)

    def _next(self, length: int) -> None:
        """Make one more chunk. It becomes part of the past, and its latents are pending. If it fails, the transition or restart
        before it is undone."""
        self.past.catch_up(self._passes.look)
        if self.past.now.given.shape[2]:
            self._take()
        else:
            with before_chunk(self.past, self._passes, self.prompts):
                self._generate() if self.spec.blocks == 1 else self._generate_rolling(length)
        self.past.catch_up(self._passes.look)

    def _take(self) -> None:
        """A chunk of given frames: one clean pass, with S copies of the last frame as its state."""
        if self.prompts is not None:
            self.model.set_context(self.prompts.context(0))
        content = self.past.now.given[:, :, : self.spec.chunk_frames]
        state = content[:, :, -1:].expand(-1, -1, self.spec.anchor.state_frames, -1, -1)
        self._passes.checkpoint(0, len(self._sigmas) + 1, None)
        self.past.start_chunk()
        self._passes.clean(torch.cat([state, content], dim=2), content.shape[2])
        self.past.commit_given(content.shape[2])

    @property
    def _sigmas(self) -> tuple[float, ...]:
        return self.settings.schedule.for_chunk(self.generated)

    def _generate(self) -> None:
        """Draw, denoise, commit one chunk."""
        frames, sigmas, schedule = self.spec.chunk_frames, self._sigmas, self.settings.schedule
        self.past.start_chunk()
        self.past.place(self.past.layout())
        solver = schedule.solver(self.generated, self._noises(len(sigmas)))
        x, x0 = solver.start, None
        for step, sigma in enumerate(sigmas):
            self._passes.checkpoint(step, len(sigmas) + 1, x0)
            v = self._passes.noisy(x, TIMESTEPS * sigma, frames, schedule.own_past(step))
            x0, x = solver.step(step, x, v)
        self._passes.checkpoint(len(sigmas), len(sigmas) + 1, x0)
        self._passes.require_finite(x0)
        self._passes.clean(x0, frames)
        self.past.commit_chunk(x0, frames)

    def _generate_rolling(self, length: int) -> None:
        """Make passes over all chunks under way until the oldest is finished, then commit that one."""
        frames, sigmas, seed, past = (
            self.spec.chunk_frames,
            self.settings.schedule.sigmas,
            self.settings.seed,
            self.past,
        )
        blocks, finished, x0 = past.now.blocks, None, None
        while finished is None:
            chunk, first = self.generated + len(blocks), past.now.next_frame + len(blocks) * frames
            if len(blocks) < self.spec.blocks and not (self.settings.ramp_down and first >= length):
                blocks = (*blocks, rolling.Block(chunk, 0, self._content_noise(chunk, 0)))
            self._passes.checkpoint(0, 2, x0)
            past.start_chunk()
            past.place(past.layout())
            x, timesteps, levels = rolling.joined(blocks, sigmas, self.model.device)
            x0 = x - levels * self._passes.noisy(x, timesteps, frames * len(blocks))
            finished, blocks = rolling.advanced(blocks, x0, sigmas, seed)
        self._passes.checkpoint(1, 2, finished)
        self._passes.require_finite(x0)
        self._passes.clean(finished, frames)
        past.commit_chunk(finished, frames, blocks)

    def _noises(self, steps: int) -> torch.Tensor:
        """[steps, B, C, S + F, h, w] noise of the current chunk, state first, float32 on the model's device.

        Made for all steps at once: a copy between two steps would wait for the device.
        """
        seed, chunk, states = self.settings.seed, self.generated, self.spec.anchor.state_frames
        out = torch.empty((steps, *self.past.shape(states + self.spec.chunk_frames)))
        for step in range(steps):
            out[step, :, :, states:] = self._content_noise(chunk, step)
            if states:
                out[step, :, :, :states] = noise(seed, chunk, step, self.past.shape(states), state=True)
        if self.model.device.type == "cuda":
            out = out.pin_memory()
        return out.to(self.model.device, non_blocking=True)

    def _content_noise(self, chunk: int, step: int) -> torch.Tensor:
        """The noise [B, C, F, h, w] of a chunk's content: drawn from the seed, or at step 0 from `first_noise` if that is given."""
        frames, given = self.spec.chunk_frames, self.settings.first_noise
        out = noise(self.settings.seed, chunk, step, self.past.shape(frames))
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
        return Chunk(max(now.next_chunk - 1, 0), now.emitted, latents, now.hidden, time.perf_counter() - start, given)

    def passes(self, length: int, given: int = 0) -> int:
        """How many forwards of the model are left until `length` latent frames, of which the first `given` are given. Forwards
        that a change of the prompt needs are not counted."""
        given = given or self.past.now.given.shape[2]
        taken, left = -(-given // self.spec.chunk_frames), length - given - self.past.now.next_frame
        chunks = max(0, -(-left // self.spec.chunk_frames))
        if not chunks:
            return taken
        if self.spec.blocks > 1:
            return taken + 2 * chunks + (0 if self.past.now.blocks else self.spec.blocks - 1)
        return taken + len(self._sigmas) + 1 + (chunks - 1) * (len(self.settings.schedule.sigmas) + 1)
