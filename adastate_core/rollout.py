"""The recurrence: a causal video model rolled out chunk by chunk over an immutable state.

    rollout = Rollout(model, spec, settings)          # or with state=..., to go on from one
    for chunk in rollout.chunks(length): ...          # chunk.latents [B, C, n, h, w]
    state = rollout.snapshot()                        # after any chunk, and after an interrupt

Semantics: design, section 4. Latents are float32 in the model's latent space; the model sees its own dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from .absorption.absorber import Absorber, absorption_bytes
from .absorption.saved import absorber_state, restore_absorber
from .absorption.settings import AbsorptionSettings
from .absorption.solve import Solution
from .anchors import Anchor
from .attention import CachedAttention, Kernel, plain_attention
from .cache_plan import CACHE_DEVICES, CACHE_DTYPES, CachePlan, LayerPlan
from .kv_cache import KVCache, LayerSnapshot
from .rope import POSITION_MODES, Layout, Rope
from .schedule import TIMESTEPS, Schedule, denoised, noise, renoised


class NonFiniteError(RuntimeError):
    """The model gave NaN or infinity; the chunks before it are kept."""


@dataclass(frozen=True)
class ModelGeometry:
    """The shape of a causal Wan model: latent channels, layers, heads, channels a head, spatial patch."""

    channels: int
    layers: int
    heads: int
    head_dim: int
    patch: int = 2


class CausalModel(Protocol):
    """What a rollout needs of a model."""

    geometry: ModelGeometry
    device: torch.device
    kernel: Kernel

    def velocity(self, x: torch.Tensor, timestep: float, attention: CachedAttention) -> torch.Tensor:
        """One forward of [B, C, frames, h, w] float32, all frames at `timestep`; layers call `attention.attend`."""
        ...


@dataclass(frozen=True)
class RolloutSpec:
    """Everything that has to match for a rollout to go on; knows its cache's bytes before anything is allocated.

    `height` and `width` are in latent pixels; `model` identifies the weights; `layers` overrides the plan of single
    layers (default: the same for all); `absorption` lets some forget their history later on. `cache_dtype` is how anchor
    and window are stored, `cache_device` where; only the latter may change from run to run.
    """

    geometry: ModelGeometry
    batch: int
    height: int
    width: int
    chunk_frames: int
    window_frames: int
    anchor: Anchor
    positions: str
    dtype: torch.dtype
    model: str = ""
    layers: tuple[LayerPlan, ...] | None = None
    absorption: AbsorptionSettings | None = None
    cache_dtype: str = "model"
    cache_device: str = "gpu"

    def __post_init__(self) -> None:
        checks = {
            "batch": (self.batch, 1),
            "chunk_frames": (self.chunk_frames, 1),
            "window_frames": (self.window_frames, 0),
            "height": (self.height, 1),
            "width": (self.width, 1),
        }
        for name, (value, least) in checks.items():
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.height % self.geometry.patch or self.width % self.geometry.patch:
            raise ValueError(
                f"the latent is {self.width}x{self.height}; both sides must be multiples of {self.geometry.patch}"
            )
        known = {"positions": POSITION_MODES, "cache_dtype": CACHE_DTYPES, "cache_device": CACHE_DEVICES}
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(options)}")
        if self.positions == "absolute" and self.anchor.relative_only:
            raise ValueError(
                f"positions is 'absolute' with the {self.anchor.kind} anchor, whose slots stand for no single frame; "
                "choose 'packed' or 'fixed'"
            )

    @property
    def tokens(self) -> int:
        """Tokens a latent frame."""
        return (self.height // self.geometry.patch) * (self.width // self.geometry.patch)

    def plan(self, text_tokens: int = 0, vae_bytes: int = 0) -> CachePlan:
        """The cache plan; its `bytes()` is what a run will use."""
        layer = LayerPlan.of(self.anchor, self.window_frames, self.chunk_frames, self.positions)
        plan = CachePlan(
            batch=self.batch,
            tokens=self.tokens,
            width=self.geometry.heads * self.geometry.head_dim,
            state_frames=self.anchor.state_frames,
            chunk_frames=self.chunk_frames,
            dtype=self.dtype,
            layers=self.layers or (layer,) * self.geometry.layers,
            text_tokens=text_tokens,
            vae_bytes=vae_bytes,
            heads=self.geometry.heads,
            cache_dtype=self.cache_dtype,
            cache_device=self.cache_device,
        )
        if plan.expands:  # what is stored is raw itself
            plan = replace(plan, layers=tuple(replace(one, keep_raw=False) for one in plan.layers))
        if self.absorption is None:
            return plan
        return replace(plan, absorption_bytes=absorption_bytes(self.absorption, plan, self.geometry.heads))

    def describe(self) -> dict[str, Any]:
        """What has to match, by name, JSON-able."""
        return {
            "model": self.model,
            "geometry": asdict(self.geometry),
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "chunk_frames": self.chunk_frames,
            "window_frames": self.window_frames,
            "anchor": self.anchor.describe(),
            "positions": self.positions,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": None if self.layers is None else [asdict(layer) for layer in self.layers],
            "absorption": None if self.absorption is None else self.absorption.describe(),
            "cache_dtype": self.cache_dtype,
        }

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a state's description differs from this spec, a phrase each; empty if it can go on."""
        mine = self.describe()
        phrases = []
        for name, value in mine.items():
            theirs = other.get(name, "model" if name == "cache_dtype" else None)  # what a state does not say
            if theirs == value:
                continue
            if name == "model":
                phrases.append("model is another checkpoint, or the same one loaded in another weight dtype")
            elif name in ("width", "height") and isinstance(theirs, int):
                phrases.append(f"{name} is {8 * theirs} in the state and {8 * value} here")
            else:
                phrases.append(f"{name} is {theirs} in the state and {value} here")
        return phrases


@dataclass(frozen=True)
class Settings:
    """What may change from run to run: the seed and the schedule."""

    seed: int
    schedule: Schedule


@dataclass(frozen=True, repr=False)
class RolloutState:
    """A rollout between two chunks: an immutable value. Tensors are on the CPU and must not be written to.

    `next_frame` is the index of the next chunk's first frame, `next_chunk` counts generated chunks, `emitted` the
    latents that have left; `pending` [B, C, n, h, w] are generated but not yet emitted. `hidden` are the anchor's
    state latents [B, C, S, h, w]. `latents` are all emitted ones, if kept. `stream` belongs to whoever decodes:
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
    stream: dict[str, Any] = field(default_factory=dict)
    absorption: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = [self.pending, self.hidden, self.latents, *self.stream.values(), *self.absorption.values()]
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
    ) -> None:
        """`solution`: an absorption that was solved before for the same model, prompt and seed."""
        if state is not None and (differences := spec.differences(state.spec)):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        self.model, self.spec, self.settings, self.on_step = model, spec, settings, on_step
        self.cache = KVCache(spec.plan(text_tokens), spec.geometry.heads, model.device)
        patch = spec.geometry.patch
        rope = Rope(spec.geometry.head_dim, spec.height // patch, spec.width // patch, model.device)
        self.attention = CachedAttention(self.cache, rope, getattr(model, "kernel", plain_attention))
        if spec.absorption is not None:
            self.attention.absorber = Absorber(spec.absorption, self.cache, spec.anchor, rope, solution)
        self._next_frame = self._next_chunk = self._emitted = 0
        self._pending = torch.zeros(self._shape(0))
        self._hidden: torch.Tensor | None = None
        self._kept: list[torch.Tensor] | None = [] if keep_latents else None
        if state is not None:
            self._restore(state)

    def _shape(self, frames: int) -> tuple[int, ...]:
        return (self.spec.batch, self.spec.geometry.channels, frames, self.spec.height, self.spec.width)

    def _restore(self, state: RolloutState) -> None:
        shapes = [(state.pending, state.pending.shape[2]), (state.hidden, self.spec.anchor.state_frames)]
        shapes.append((state.latents, state.emitted))
        for latents, frames in shapes:
            if latents is not None and (latents.shape != self._shape(frames) or latents.dtype != torch.float32):
                raise ValueError("the state's latents do not have the shape that its settings say: it is damaged")
        self._next_frame, self._next_chunk, self._emitted = state.next_frame, state.next_chunk, state.emitted
        self._pending, self._hidden = state.pending, state.hidden
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
                self._pending = self._generate()
            yield self._emit(length, start, given=self._emitted < given_frames)

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
        )

    def _noises(self) -> torch.Tensor:
        """[steps, B, C, S + F, h, w] noise of the current chunk, state first, float32 on the model's device.

        Made for all steps at once: a copy between two steps would wait for the device.
        """
        seed, chunk, states = self.settings.seed, self._next_chunk, self.spec.anchor.state_frames
        steps = len(self.settings.schedule.sigmas)
        out = torch.empty((steps, *self._shape(states + self.spec.chunk_frames)))
        for step in range(steps):
            out[step, :, :, states:] = noise(seed, chunk, step, self._shape(self.spec.chunk_frames))
            if states:
                out[step, :, :, :states] = noise(seed, chunk, step, self._shape(states), state=True)
        if self.model.device.type == "cuda":
            out = out.pin_memory()
        return out.to(self.model.device, non_blocking=True)

    def _generate(self) -> torch.Tensor:
        """Denoise and commit one chunk; its content latents [B, C, F, h, w] on the CPU."""
        frames, sigmas = self.spec.chunk_frames, self.settings.schedule.sigmas
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
        self._commit(x0, frames)
        self._next_chunk += 1
        return x0[:, :, self.spec.anchor.state_frames :].cpu()

    def _commit(self, x0: torch.Tensor, content_frames: int) -> None:
        """The clean pass over [state | content] and its commit: the only place where the past changes."""
        layout = self._layout()
        self.attention.place(layout)
        self.attention.begin(layout, content_frames, clean=True)
        timestep = self.settings.schedule.context_timestep
        self._require_finite(self.model.velocity(x0.to(self.model.device), timestep, self.attention))
        self.attention.commit(self.spec.anchor, self._next_frame, content_frames)
        self._next_frame += content_frames
        if states := self.spec.anchor.state_frames:
            self._hidden = x0[:, :, :states].cpu()

    def _emit(self, length: int, start: float, given: bool) -> Chunk:
        """Let out at most a chunk of what is pending, and no more than `length` still asks for."""
        wanted = min(self.spec.chunk_frames, self._pending.shape[2], length - self._emitted)
        out, self._pending = self._pending[:, :, :wanted], self._pending[:, :, wanted:]
        first, self._emitted = self._emitted, self._emitted + wanted
        if self._kept is not None:
            self._kept.append(out)
        return Chunk(max(self._next_chunk - 1, 0), first, out, self._hidden, time.perf_counter() - start, given)

    def _checkpoint(self, step: int, x0: torch.Tensor | None) -> None:
        if self.on_step is not None:
            self.on_step(self._next_chunk, step, len(self.settings.schedule.sigmas) + 1, x0)

    def _require_finite(self, values: torch.Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the model gave NaN or infinite values in chunk {self._next_chunk} (latent frame {self._next_frame}); "
                "everything before it is kept. Try another weight dtype (bf16 or fp32), fewer LoRAs or a lower strength"
            )
