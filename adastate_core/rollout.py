"""The recurrence: a causal video model rolled out chunk by chunk over an immutable state.

    rollout = Rollout(model, spec, settings)          # or with state=..., to go on from one
    for chunk in rollout.chunks(length): ...          # chunk.latents [B, C, n, h, w]
    state = rollout.snapshot()                        # after any chunk, and after an interrupt

Semantics: design, section 4. Latents are float32 in the model's latent space; the model sees its own dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from . import rolling
from .absorption.absorber import Absorber
from .absorption.saved import absorber_state, restore_absorber
from .absorption.solve import Solution
from .anchors import Anchor
from .attention import CachedAttention, Kernel, plain_attention
from .kv_cache import KVCache, LayerSnapshot
from .prompt_plan import PromptPlan
from .rollout_spec import ModelGeometry, RolloutSpec, Settings
from .rope import Layout, Rope
from .schedule import TIMESTEPS, denoised, noise, renoised

# past frames that a flush leaves beside the anchor, and where a rope cut puts the chunk after it (Infinity-RoPE's numbers)
FLUSH_FRAMES = 2
CUT_POSITION = 45


class NonFiniteError(RuntimeError):
    """The model gave NaN or infinity; the chunks before it are kept."""


class CausalModel(Protocol):
    """What a rollout needs of a model."""

    geometry: ModelGeometry
    device: torch.device
    kernel: Kernel

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        """One forward of [B, C, frames, h, w] float32, all frames at `timestep` or each at its own; layers call
        `attention.attend`."""
        ...

    def set_context(self, context: torch.Tensor) -> None:
        """Text embeddings [1 or B, n, c] for the passes that follow. Needed only of models that get a prompt plan."""
        ...


@dataclass(frozen=True, repr=False)
class RolloutState:
    """A rollout between two chunks: an immutable value. Tensors are on the CPU and must not be written to.

    `next_frame` is the index of the next chunk's first frame, `next_chunk` counts generated chunks, `emitted` the
    latents that have left; `pending` [B, C, n, h, w] are generated but not yet emitted. `hidden` are the anchor's
    state latents [B, C, S, h, w]. `latents` are all emitted ones, if kept. `recent` are the newest committed ones,
    `noisy` the chunks that are still being denoised (Rolling Forcing), oldest first. `stream` belongs to whoever decodes:
    JSON-able values and tensors; so is `absorption`, where the absorption stands.
    """

    spec: dict[str, Any]
    next_frame: int
    next_chunk: int
    emitted: int
    cache: tuple[LayerSnapshot, ...]
    pending: torch.Tensor
    hidden: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    recent: torch.Tensor | None = None
    noisy: torch.Tensor | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    absorption: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = [self.pending, self.hidden, self.latents, self.recent, self.noisy]
        tensors += [*self.stream.values(), *self.absorption.values()]
        return sum(layer.nbytes for layer in self.cache) + sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))

    def __repr__(self) -> str:
        frames = max(0, 4 * (self.emitted - 1) + 1)
        return f"RolloutState({self.emitted} latents = {frames} frames, {self.nbytes / 2**20:.1f} MiB)"


@dataclass(frozen=True)
class Chunk:
    """What left the rollout at once: `latents` [B, C, n, h, w] from video latent `first_frame` on."""

    index: int
    first_frame: int
    latents: torch.Tensor
    hidden: torch.Tensor | None
    seconds: float
    given: bool = False


# called before every forward with (chunk, step, steps, x0 of the step before or None); may raise to interrupt
StepCallback = Callable[[int, int, int, torch.Tensor | None], None]


class Rollout:
    """One run. Owns its cache; the state it starts from is never written to."""

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
        """`solution`: an absorption that was solved before for the same model, prompt and seed. `prompts`: text that
        changes on the way; without them the model keeps the one it has."""
        if spec.blocks > 1 and len(settings.schedule.sigmas) != spec.blocks:
            raise ValueError(
                f"{spec.blocks} chunks denoised together take {spec.blocks} steps, and the schedule has "
                f"{len(settings.schedule.sigmas)}"
            )
        if state is not None and (differences := spec.differences(state.spec)):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        self.model, self.spec, self.settings, self.on_step = model, spec, settings, on_step
        self.cache = KVCache(spec.plan(text_tokens), spec.geometry.heads, model.device)
        patch = spec.geometry.patch
        rope = Rope(spec.geometry.head_dim, spec.height // patch, spec.width // patch, model.device)
        self.attention = CachedAttention(self.cache, rope, getattr(model, "kernel", plain_attention))
        if spec.absorption is not None:
            self.attention.absorber = Absorber(spec.absorption, self.cache, spec.anchor, rope, solution)
        self.prompts = prompts
        self._next_frame = self._next_chunk = self._emitted = 0
        self._pending = self._recent = torch.zeros(self._shape(0))
        self._blocks: tuple[rolling.Block, ...] = ()
        # the frame that the last generated chunk began with, and how far a rope cut puts the chunk under way ahead
        self._before = 0
        self._jump = 0
        self._hidden: torch.Tensor | None = None
        self._kept: list[torch.Tensor] | None = [] if keep_latents else None
        if state is not None:
            self._restore(state)

    def _shape(self, frames: int) -> tuple[int, ...]:
        return (self.spec.batch, self.spec.geometry.channels, frames, self.spec.height, self.spec.width)

    def _restore(self, state: RolloutState) -> None:
        shapes = [(state.pending, state.pending.shape[2]), (state.hidden, self.spec.anchor.state_frames)]
        shapes.append((state.latents, state.emitted))
        shapes += [(kept, kept.shape[2]) for kept in (state.recent, state.noisy) if kept is not None]
        for latents, frames in shapes:
            if latents is not None and (latents.shape != self._shape(frames) or latents.dtype != torch.float32):
                raise ValueError("the state's latents do not have the shape that its settings say: it is damaged")
        self._next_frame, self._next_chunk, self._emitted = state.next_frame, state.next_chunk, state.emitted
        self._pending, self._hidden = state.pending, state.hidden
        if state.recent is not None:
            self._recent = state.recent
        steps, frames = len(self.settings.schedule.sigmas), self.spec.chunk_frames
        self._blocks = rolling.under_way(state.noisy, state.next_chunk, frames, steps)
        self._before = self._next_frame - frames if state.next_chunk else 0
        if self.attention.absorber is not None:
            restore_absorber(self.attention.absorber, state.absorption)
        self.cache.restore(state.cache)
        if self._kept is not None and state.latents is not None:
            self._kept.append(state.latents)
        elif self._emitted:
            self._kept = None

    @property
    def emitted(self) -> int:
        """Latent frames that have left since frame 0."""
        return self._emitted

    @property
    def generated(self) -> int:
        """Chunks that were generated since frame 0."""
        return self._next_chunk

    @property
    def kept_latents(self) -> torch.Tensor | None:
        """All latents since frame 0 [B, C, T, h, w], if they were kept all along."""
        return torch.cat(self._kept, dim=2) if self._kept else None

    def snapshot(self, stream: dict[str, Any] | None = None) -> RolloutState:
        """The state after the last whole chunk; valid after an interrupt too, since only `commit` moves the past."""
        return RolloutState(
            spec=self.spec.describe(),
            next_frame=self._next_frame,
            next_chunk=self._next_chunk,
            emitted=self._emitted,
            cache=self.cache.snapshot(),
            pending=self._pending.clone(),
            hidden=self._hidden,
            latents=self.kept_latents,
            recent=self._recent,
            noisy=torch.cat([block.x for block in self._blocks], 2).cpu() if self._blocks else None,
            stream=stream or {},
            absorption={} if self.attention.absorber is None else absorber_state(self.attention.absorber),
        )

    def put_back(self, latents: torch.Tensor) -> None:
        """Take latents that have just left, but could not be used, back as the first pending ones."""
        self._emitted -= latents.shape[2]
        self._pending = torch.cat([latents, self._pending], dim=2)
        if self._kept is not None:
            self._kept.pop()

    def chunks(self, length: int, given: torch.Tensor | None = None) -> Iterator[Chunk]:
        """Roll on until `length` latent frames since frame 0 have left; `given` [B, C, n, h, w] become frames 0..n-1.

        Raises ValueError for lengths that ask for nothing new, NonFiniteError when the model breaks down.
        """
        if length <= self._emitted:
            raise ValueError(
                f"the rollout holds {self._emitted} latent frames and {length} were asked for; "
                "length counts from the first frame of the video, so ask for more than there is"
            )
        if given is not None:
            self._take(given, length)
        given_frames = 0 if given is None else given.shape[2]
        while self._emitted < length:
            start = time.perf_counter()
            if not self._pending.shape[2]:
                self._pending = self._next(length)
            yield self._emit(length, start, given=self._emitted < given_frames)

    def _next(self, length: int) -> torch.Tensor:
        """The next chunk [B, C, F, h, w]; if it fails, what its transition did to the cache is undone with it."""
        first = self._next_frame
        undo = self._prepare()
        try:
            latents = self._generate() if self.spec.blocks == 1 else self._generate_rolling(length)
        except BaseException:
            if undo is not None and self._next_frame == first:
                self.cache.restore(undo)
            raise
        self._before = first
        return latents

    def _take(self, given: torch.Tensor, length: int) -> None:
        """Frames that were there before: clean passes of F frames, with S copies of the last one as their state."""
        if self._next_frame:
            raise ValueError("a rollout that goes on from a state takes no start latents; they would be frame 0 again")
        if given.shape[:2] + given.shape[3:] != self._shape(0)[:2] + self._shape(0)[3:] or not given.shape[2]:
            raise ValueError(
                f"start latents are {tuple(given.shape)}; they must be {self._shape(max(1, given.shape[2]))}"
            )
        if given.shape[2] >= length:
            raise ValueError(f"start latents hold {given.shape[2]} latent frames of {length}; length must be longer")
        states = self.spec.anchor.state_frames
        given = given.float().cpu()
        self._set_prompt()
        for content in given.split(self.spec.chunk_frames, dim=2):
            self._checkpoint(0, None)
            self.attention.start_chunk()
            state = content[:, :, -1:].expand(-1, -1, states, -1, -1)
            self._commit(torch.cat([state, content], dim=2), content.shape[2])
            self._pending = given[:, :, : self._next_frame]

    def _layout(self) -> Layout:
        return Layout(
            mode=self.spec.positions,
            anchor_capacity=self.spec.anchor.frames,
            window_capacity=self.spec.window_frames,
            state_frames=self.spec.anchor.state_frames,
            anchor_present=self.cache.anchor_present,
            window_present=self.cache.window_present,
            first_frame=self._next_frame,
            state_after_past=self.spec.anchor.state_after_past,
            jump=self._jump,
        )

    def _prepare(self) -> tuple[LayerSnapshot, ...] | None:
        """What comes before a chunk: a restart, or another prompt with what its transition does to the cache.

        The cache as it was before, if that made it another.
        """
        frame, before = self._next_frame, self._before
        undo = None
        if frame and self.spec.clip(frame) != self.spec.clip(before):
            self._set_prompt()
            undo = self._commit_again(self.spec.overlap_frames)
        transition = self.prompts.transition(frame, before) if self.prompts else ""
        self._set_prompt()
        if transition == "recache":
            before_recache = self._commit_again(self.spec.recent_frames)
            undo = undo or before_recache
        elif transition == "flush":
            undo = undo or self.cache.snapshot()
            for layer in self.cache:
                layer.flush(FLUSH_FRAMES)
        self._jump = 0
        if transition == "rope cut":
            layout = self._layout()
            self._jump = max(CUT_POSITION - layout.content, CUT_POSITION - self.spec.chunk_frames)
        return undo

    def _set_prompt(self) -> None:
        if self.prompts is not None:
            self.model.set_context(self.prompts.context(self._next_frame))

    def _commit_again(self, frames: int) -> tuple[LayerSnapshot, ...]:
        """Empty the window and commit the newest `frames` latents once more, in passes of F; the anchor stays as it is.

        Frames that the anchor holds are left out. The hidden state is committed again with them, unless it is frozen.
        Gives the cache as it was before; a failure puts that back.
        """
        end, held = self._next_frame, self._recent.shape[2]
        first = end - min(frames, held)
        while first < end and self.spec.anchor.slot_of(first) is not None:
            first += 1
        again = self._recent[:, :, held - (end - first) :]
        hidden = self._hidden if self._hidden is not None else self._recent[:, :, :0]
        before, anchor = self.cache.snapshot(), self.spec.anchor.bystander(end)
        for layer in self.cache:
            layer.flush(0)
        self._next_frame = first
        try:
            for content in again.split(self.spec.chunk_frames, dim=2) if first < end else ():
                self.attention.start_chunk()
                self._clean_pass(torch.cat([hidden, content], 2), content.shape[2], anchor)
                self._next_frame += content.shape[2]
        except BaseException:
            self._next_frame = end
            self.cache.restore(before)
            raise
        return before

    def _noises(self) -> torch.Tensor:
        """[steps, B, C, S + F, h, w] noise of the current chunk, state first, float32 on the model's device.

        Made for all steps at once: a copy between two steps would wait for the device.
        """
        seed, chunk, states = self.settings.seed, self._next_chunk, self.spec.anchor.state_frames
        steps = len(self.settings.schedule.for_chunk(chunk))
        out = torch.empty((steps, *self._shape(states + self.spec.chunk_frames)))
        for step in range(steps):
            out[step, :, :, states:] = self._content_noise(chunk, step)
            if states:
                out[step, :, :, :states] = noise(seed, chunk, step, self._shape(states), state=True)
        if self.model.device.type == "cuda":
            out = out.pin_memory()
        return out.to(self.model.device, non_blocking=True)

    def _content_noise(self, chunk: int, step: int) -> torch.Tensor:
        """The noise [B, C, F, h, w] of a chunk's content: the seed's, or at the first step what was given for it."""
        frames, given = self.spec.chunk_frames, self.settings.first_noise
        out = noise(self.settings.seed, chunk, step, self._shape(frames))
        if step == 0 and given is not None:
            own = given[:, :, chunk * frames : (chunk + 1) * frames]
            out[:, :, : own.shape[2]] = own
        return out

    def _generate(self) -> torch.Tensor:
        """Denoise and commit one chunk; its content latents [B, C, F, h, w] on the CPU."""
        frames, sigmas = self.spec.chunk_frames, self.settings.schedule.for_chunk(self._next_chunk)
        layout = self._layout()
        self.attention.start_chunk()
        self.attention.place(layout)
        noises = self._noises()
        x, x0 = noises[0], None
        for step, sigma in enumerate(sigmas):
            self._checkpoint(step, x0)
            self.attention.begin(layout, frames, clean=False)
            x0 = denoised(x, self.model.velocity(x, TIMESTEPS * sigma, self.attention), sigma)
            if step + 1 < len(sigmas):
                x = renoised(x0, noises[step + 1], sigmas[step + 1])
        self._checkpoint(len(sigmas), x0)
        self._require_finite(x0)
        content = self._commit(x0, frames)
        self._next_chunk += 1
        return content

    def _generate_rolling(self, length: int) -> torch.Tensor:
        """Passes over the window of chunks until its oldest is finished; that one's latents [B, C, F, h, w] on the CPU."""
        frames, sigmas, seed = self.spec.chunk_frames, self.settings.schedule.sigmas, self.settings.seed
        blocks, finished, x0 = self._blocks, None, None
        while finished is None:
            chunk = self._next_chunk + len(blocks)
            first = self._next_frame + len(blocks) * frames
            if len(blocks) < self.spec.blocks and not (self.settings.ramp_down and first >= length):
                blocks = (*blocks, rolling.Block(chunk, 0, self._content_noise(chunk, 0)))
            layout = self._layout()
            self._checkpoint(0, x0)
            self.attention.start_chunk()
            self.attention.place(layout)
            self.attention.begin(layout, frames * len(blocks), clean=False)
            x, timesteps, levels = rolling.joined(blocks, sigmas, self.model.device)
            x0 = x - levels * self.model.velocity(x, timesteps, self.attention)
            finished, blocks = rolling.advanced(blocks, x0, sigmas, seed)
        self._checkpoint(1, finished)
        self._require_finite(x0)
        content = self._commit(finished, frames)
        self._blocks = tuple(rolling.Block(b.chunk, b.step, b.x.cpu()) for b in blocks)
        self._next_chunk += 1
        return content

    def _clean_pass(self, x0: torch.Tensor, content_frames: int, anchor: Anchor) -> None:
        """One pass over [state | content] at the context's timestep, whose keys and values are cached afterwards."""
        layout = self._layout()
        self.attention.place(layout)
        self.attention.begin(layout, content_frames, clean=True)
        timestep = self.settings.schedule.context_timestep
        self._require_finite(self.model.velocity(x0.to(self.model.device), timestep, self.attention))
        self.attention.commit(anchor, self._next_frame, content_frames)

    def _commit(self, x0: torch.Tensor, content_frames: int) -> torch.Tensor:
        """The clean pass of a chunk and its commit: the only place where the past moves on. Its content on the CPU."""
        states = self.spec.anchor.state_frames
        self._clean_pass(x0, content_frames, self.spec.anchor)
        self._next_frame += content_frames
        content = x0[:, :, states:].cpu()
        self._recent = torch.cat([self._recent, content], 2)[:, :, -self.spec.recent_frames :]
        if states:
            self._hidden = x0[:, :, :states].cpu().clone()
        return content

    def _emit(self, length: int, start: float, given: bool) -> Chunk:
        """Let out at most a chunk of what is pending, and no more than `length` still asks for."""
        wanted = min(self.spec.chunk_frames, self._pending.shape[2], length - self._emitted)
        out, self._pending = self._pending[:, :, :wanted], self._pending[:, :, wanted:]
        first, self._emitted = self._emitted, self._emitted + wanted
        if self._kept is not None:
            self._kept.append(out)
        return Chunk(max(self._next_chunk - 1, 0), first, out, self._hidden, time.perf_counter() - start, given)

    def passes(self, length: int, given: int = 0) -> int:
        """Forwards of the model that are left until `length` latent frames, of which `given` are there before; without
        those of a changing prompt."""
        taken, left = -(-given // self.spec.chunk_frames), length - given - self._next_frame
        chunks = max(0, -(-left // self.spec.chunk_frames))
        if not chunks:
            return taken
        if self.spec.blocks > 1:
            return taken + 2 * chunks + (0 if self._blocks else self.spec.blocks - 1)
        schedule = self.settings.schedule
        first = len(schedule.for_chunk(self._next_chunk))
        return taken + first + 1 + (chunks - 1) * (len(schedule.sigmas) + 1)

    def _checkpoint(self, step: int, x0: torch.Tensor | None) -> None:
        if self.on_step is not None:
            steps = len(self.settings.schedule.for_chunk(self._next_chunk)) if self.spec.blocks == 1 else 1
            self.on_step(self._next_chunk, step, steps + 1, x0)

    def _require_finite(self, values: torch.Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the model gave NaN or infinite values in chunk {self._next_chunk} (latent frame {self._next_frame}); "
                "everything before it is kept. Try another weight dtype (bf16 or fp32), fewer LoRAs or a lower strength"
            )
