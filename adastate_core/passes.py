"""One forward of a model over a past: noisy, clean, or only to look. A run is interrupted and checked for NaN here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from .attention.cached import CachedAttention, Kernel, plain_attention
from .audio.driving import DrivingSound
from .cache.kv_cache import KVCache
from .cache.one_pass import OnePass
from .cache.reference_tokens import MakingReference
from .past import Past
from .reference import NEAREST, motion_of
from .spec import ModelGeometry


class NonFiniteError(RuntimeError):
    """The model gave NaN or infinity; the chunks before it are kept."""


class CausalModel(Protocol):
    """What a rollout needs of a model."""

    geometry: ModelGeometry
    device: torch.device
    kernel: Kernel

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        """One forward of [B, C, frames, h, w] float32. `timestep` is one for all frames, or one for each. The layers call
        `attention.attend`."""
        ...

    def set_context(self, context: torch.Tensor) -> None:
        """Set the text embeddings [1 or B, n, c] for the passes that follow. Only called if there is a prompt plan."""
        ...


class TalkingModel(CausalModel, Protocol):
    """What a rollout that is driven by sound, and has a reference, needs besides."""

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        """The passes that follow are over latent frames `first` .. `first + frames`, behind `states` hidden ones. Called before
        every pass; what was encoded for the same frames still holds."""
        ...

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: MakingReference) -> None:
        """One pass over the tokens of latents [B, C, 1, h, w] and [B, C, 19, h, w] float32, at timestep 0, in the order of
        reference.token_places. The layers call `making.attend`; nothing comes out."""
        ...


# called before every forward with (chunk, step, steps, x0 of the step before or None); may raise to interrupt
StepCallback = Callable[[int, int, int, torch.Tensor | None], None]


class Passes:
    """The passes of one run. `context_timestep` is the clean ones' timestep, `sound` what drives all of them, if anything does."""

    def __init__(
        self,
        model: CausalModel,
        past: Past,
        context_timestep: float = 0.0,
        on_step: StepCallback | None = None,
        sound: DrivingSound | None = None,
    ) -> None:
        self.model, self.past, self.context_timestep, self.on_step = model, past, context_timestep, on_step
        self.sound = sound
        self.attention = CachedAttention(
            past.cache,
            past.rope,
            getattr(model, "kernel", plain_attention),
            getattr(model, "fused_blocks", None),
            past.reference,
        )
        if past.absorber is not None:
            self.attention.corrections = past.absorber.corrections
            past.absorber.corrections.reference = past.reference

    def checkpoint(self, step: int, steps: int, x0: torch.Tensor | None) -> None:
        """Where a run may be interrupted: before pass `step` of `steps`."""
        if self.on_step is not None:
            self.on_step(self.past.now.next_chunk, step, steps, x0)

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, made_of: Hashable) -> None:
        """Make the reference's tokens anew, of latents [B, C, 1, h, w]: the picture, and the one that stood still before the video.
        If it fails they are those of nothing."""
        tokens, device = self.past.reference, self.model.device
        tokens.made_of = None
        making = tokens.making(self.attention.kernel, self.attention.text)
        self.model.refer(picture.to(device), motion_of(motion.to(device)), making)
        tokens.made_of = made_of

    def noisy(
        self,
        x: torch.Tensor,
        timestep: float | Sequence[float],
        content_frames: int,
        own: int | None = None,
        distance: int = NEAREST,
    ) -> torch.Tensor:
        """The velocity of [state | content]. Without `own` the keys of this pass are not kept. With `own` the pass reads the
        cache of that noise level, and its keys enter that cache with the chunk's commit. `distance`: where the reference stands."""
        cache = self.past.caches[0 if own is None else own]
        return self._forward(x, timestep, content_frames, own is not None, cache, distance)

    def clean(
        self,
        x0: torch.Tensor,
        content_frames: int,
        meanwhile: Callable[[], None] | None = None,
        distance: int = NEAREST,
    ) -> None:
        """The pass over a finished [state | content]; its keys and values are cached with the chunk's commit. NonFiniteError.

        `meanwhile` is called when the pass has been launched and before its end is waited for."""
        self.past.place(self.past.layout(content_frames, clean=True))
        x0 = x0.to(self.model.device)
        velocity = self._forward(x0, self.context_timestep, content_frames, True, self.past.cache, distance)
        if meanwhile is not None:
            meanwhile()
        self.require_finite(velocity)

    def one_pass(self, x0: torch.Tensor, one_pass: OnePass) -> None:
        """One clean pass over finished frames that all see each other; with `Past.commit_one_pass` they are anchor and window.
        NonFiniteError."""
        layout = one_pass.placed(self.past.layout(), self.past.spec.chunk_frames)
        self.past.place(layout)
        x0 = x0.to(self.model.device)
        self.attention.begin(layout, one_pass.frames, True, self.past.cache, one_pass)
        self._hear(one_pass.end - one_pass.frames, one_pass.frames)
        self.require_finite(self._velocity(x0, self.context_timestep))

    def look(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        """A pass over [state | content] between two chunks, which changes nothing. It may be interrupted before it begins."""
        self.checkpoint(0, 1, None)
        self.past.start_chunk(told=False)
        undo = self.past.mark()
        try:
            frames = x.shape[2] - self.past.spec.anchor.state_frames
            self.past.place(self.past.layout(frames))
            return self._forward(x.to(self.model.device), timestep, frames, False, self.past.cache)
        finally:
            self.past.rewind(undo)

    @contextlib.contextmanager
    def again(self, x: torch.Tensor, timestep: float, newest: int) -> Iterator[Callable[[int, int], torch.Tensor]]:
        """Within: passes over [state | content] in the places of the `newest` frames of the window, or behind it (0), which change
        nothing. Who calls for pass `number` of `count` gets its velocity. Each may be interrupted before it begins. NonFiniteError.
        """
        self.past.start_chunk(told=False)
        undo, frames = self.past.mark(), x.shape[2] - self.past.spec.anchor.state_frames
        layout = replace(self.past.layout(frames), again=newest)

        def one(number: int, count: int) -> torch.Tensor:
            self.checkpoint(number, count, None)
            self.attention.begin(layout, frames, False, self.past.cache)
            self._hear(self.past.now.next_frame - newest, frames)
            velocity = self._velocity(x, timestep)
            self.require_finite(velocity)
            return velocity

        try:
            self.past.place(layout)
            yield one
        finally:
            self.past.rewind(undo)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: float | Sequence[float],
        frames: int,
        kept: bool,
        cache: KVCache,
        distance: int = NEAREST,
    ) -> torch.Tensor:
        self.attention.begin(self.past.layout(frames, clean=kept), frames, kept, cache, distance=distance)
        self._hear(self.past.now.next_frame, frames)
        return self._velocity(x, timestep)

    def _hear(self, first: int, frames: int) -> None:
        """What the pass over these content frames is driven by."""
        if self.sound is not None:
            self.model.hear(self.sound, first, frames, self.past.spec.anchor.state_frames)

    def _velocity(self, x: torch.Tensor, timestep: float | Sequence[float]) -> torch.Tensor:
        """The forward of a pass that has begun."""
        velocity = self.model.velocity(x, timestep, self.attention)
        self.attention.end()
        return velocity

    def require_finite(self, values: torch.Tensor) -> None:
        """NonFiniteError for NaN or infinity."""
        if not bool(torch.isfinite(values).all()):
            now = self.past.now
            raise NonFiniteError(
                f"the model gave NaN or infinite values in chunk {now.next_chunk} (latent frame {now.next_frame}); "
                "everything before it is kept. Try another weight dtype (bf16 or fp32), fewer LoRAs or a lower strength"
            )
