"""What the checks share: models, how a rollout is asked for, and the same rollout by the plain twin on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ...adastate_core.prompts.demo_words import DEFAULTS, prompt
from ...adastate_core.rollout import Rollout, RolloutSpec, RolloutState, Settings
from ...adastate_core.weights.presets import PRESETS
from ..builder import Request
from ..host import made_models as made
from ..host import made_speech as speech
from ..host.checkpoint_wishes import with_preset
from ..host.progress import Progress, check_interrupt
from ..job import Job

SEED = 11
# of tiny pictures whose sides differ; 12 tokens a latent frame
WIDTH, HEIGHT = 64, 48
TEXT_TOKENS = 7
# a video that is driven by sound, and a sound of which its last pictures hear nothing
HEARD_LENGTH, SOUND_SECONDS = 69, 2.5
AS_PUBLISHED = "as published"


class Beat(Progress):
    """A progress that shows nothing and lets the host's interrupt through: the node's own bar counts checks."""

    def __init__(self) -> None:
        """No bar is made."""

    def expect(self, total: int) -> None:
        """Nothing is counted."""

    def compiling(self, done: int, total: int) -> None:
        check_interrupt()

    def step(self, count: int = 1) -> None:
        check_interrupt()


@dataclass
class Rolled:
    """A rollout that was run on the host's device: all its latents [1, 16, T, h, w] on the CPU, a state that was taken on the way,
    and itself."""

    job: Job
    rollout: Rollout
    latents: torch.Tensor
    state: RolloutState | None = None

    def bytes_are_planned(self) -> tuple[bool, str]:
        """Keys and values, planned against allocated."""
        planned = self.job.plan.kv_bytes, self.job.plan.host_bytes
        used = self.rollout.past.peak_nbytes
        beside = f" and {used[1]:,} in host memory" if used[1] else ""
        if planned == used:
            return True, f"{used[0]:,} bytes{beside} as planned"
        return False, f"planned {planned[0]:,} and {planned[1]:,} bytes, allocated {used[0]:,} and {used[1]:,}"


class Bench:
    """Tiny random models in the public formats on the host's device, made when first asked for."""

    def __init__(self) -> None:
        # the clones that were loaded: the host takes one that is gone while its model is there for a leak, and says so
        self._clones: list[Any] = []

    def started(self, job: Job) -> Rollout:
        """A job's rollout, before its first chunk."""
        self._clones.append(job.model.patcher)
        return job.rollout(Beat())

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return made.random_weights(made.TINY)

    @cached_property
    def model(self) -> Any:
        """A MODEL of two layers in float32."""
        return made.loaded(self.weights, torch.float32)

    @cached_property
    def context(self) -> torch.Tensor:
        """Text embeddings [1, n, 4096] for it."""
        return torch.randn(1, TEXT_TOKENS, 4096, generator=torch.Generator().manual_seed(1))

    @cached_property
    def plain(self) -> made.PlainWan:
        """Its twin on the CPU."""
        return made.PlainWan(made.TINY, self.weights, self.context)

    @property
    def device(self) -> torch.device:
        """The host's device."""
        return self.model.load_device

    @cached_property
    def talker_weights(self) -> dict[str, torch.Tensor]:
        return made.random_weights(speech.TALKING)

    @cached_property
    def talker(self) -> Any:
        """A MODEL of two layers in float32 that hears."""
        return made.loaded(self.talker_weights, torch.float32)

    @cached_property
    def plain_talker(self) -> speech.PlainTalker:
        """Its twin on the CPU."""
        return speech.PlainTalker(speech.TALKING, self.talker_weights, self.context)

    def twin_for(self, preset: str) -> made.PlainWan:
        """The twin of the model that follows a preset's rules."""
        return self.plain_talker if PRESETS[preset].driven_by_sound else self.plain

    def request(self, preset: str, **more: Any) -> Request:
        """A rollout of the tiny model by a preset's rules; of one that hears by a sound, and with a picture."""
        asked = dict(width=WIDTH, height=HEIGHT, length=81, seed=SEED, keep_latents=False)
        hears = PRESETS[preset].driven_by_sound
        if hears:
            track, picture = speech.made_track(SOUND_SECONDS), speech.made_reference()
            asked |= dict(width=speech.SIDE, height=speech.SIDE, length=HEARD_LENGTH, audio=track, reference=picture)
        model = with_preset(self.talker if hears else self.model, preset, AS_PUBLISHED)
        return Request(model=model, positive=[[self.context, {}]], **(asked | more))

    @staticmethod
    def demo_request(**more: Any) -> Request:
        """A rollout of the demo model by its own rules, in the dtype that the host chooses."""
        words = [[prompt(DEFAULTS), {}]]
        asked = dict(width=64, height=64, length=49, seed=SEED, keep_latents=False)
        return Request(model=made.loaded(made.demo_weights()), positive=words, **(asked | more))


def long_enough(request: Request) -> tuple[Request, int]:
    """(the request for a video that goes on for two chunks once a frame has left the cache, or once it has started afresh; its
    latent frames)."""
    job = Job(request)
    frames = latents_past_eviction(job.spec)
    return replace(request, length=job.space.pictures(frames)), frames


def latents_past_eviction(spec: RolloutSpec) -> int:
    """Latent frames of a video that is two chunks longer than until the first frame has left its window."""
    room = spec.anchor.frames - spec.anchor.state_frames + spec.window_frames
    leaves = max(room, spec.restart_frames) // spec.chunk_frames + 1
    return (leaves + 2 + spec.blocks - 1) * spec.chunk_frames


def rolled(bench: Bench, request: Request, state_at: int = -1) -> Rolled:
    """Run a request to its length. `state_at`: latent frames after which a state is taken."""
    job = Job(request)
    rollout = bench.started(job)
    parts, state = [], None
    for chunk in rollout.chunks(job.latent_length, job.given):
        parts.append(chunk.latents.detach().cpu())
        if state is None and 0 <= state_at <= rollout.emitted:
            state = rollout.snapshot()
    return Rolled(job, rollout, torch.cat(parts, 2), state)


def way_of_blocks(job: Job) -> str:
    """Whether what lies between a block's linears is compiled; if not, why."""
    blocks = job.model.fused_blocks
    reasons = "; ".join(blocks.why)
    return f"blocks {blocks.way}" + (f" ({reasons})" if reasons else "")


def by_the_twin(job: Job, plain: made.PlainWan) -> torch.Tensor:
    """The latents of the same rollout by the plain twin, in float32 on the CPU."""
    spec = replace(job.spec, dtype=torch.float32)
    settings = Settings(job.request.seed, job.schedule, sound=job.sound)
    shown = job.picture
    rollout = Rollout(plain, spec, settings, text_tokens=job.text_tokens, length=job.latent_length, reference=shown)
    rollout.on_step = lambda chunk, step, steps, x0: check_interrupt()
    return torch.cat([chunk.latents for chunk in rollout.chunks(job.latent_length)], 2)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of the expected values' own."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def near(found: torch.Tensor, expected: torch.Tensor, most: float, what: str) -> tuple[bool, str]:
    """Whether the two are no further apart than `most`, and by how much they differ."""
    if found.shape != expected.shape:
        return False, f"{tuple(found.shape)} values where {what} has {tuple(expected.shape)}"
    share = distance(found, expected)
    return share <= most, f"{share:.1e} from {what}" + ("" if share <= most else f" (at most {most:.0e})")


def same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> tuple[bool, str]:
    """Whether two are equal to the bit, and by how much they differ if not."""
    if found.shape == expected.shape and torch.equal(found, expected):
        return True, f"{what} to the bit"
    return False, near(found, expected, 0.0, what)[1]
