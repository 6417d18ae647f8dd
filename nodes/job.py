"""One run of the rollout node, from checked inputs to outputs: what the node's few lines call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.eight_bits import check_cache_dtype
from ..adastate_core.prompt_plan import PromptChange, PromptPlan
from ..adastate_core.prompts import PromptAt, Prompts
from ..adastate_core.rollout import Chunk, Rollout, RolloutSpec, RolloutState, Settings
from ..adastate_core.schedule import Schedule
from ..adastate_core.vae_stream import pictures_of
from .absorption import AbsorptionRequest
from .anchors import anchor_at
from .defaults import asked_numbers, resolve
from .host import checks
from .host import model as host_model
from .host.checkpoints import rollout_defaults
from .host.codec import HostDecoder
from .host.files import Target, check_video_prefix
from .host.live import LiveRun
from .host.node import shown
from .host.progress import Progress
from .host.safely import attempt
from .live import chunk_facts, hidden_picture, run_facts, stop_note
from .output import StreamOutput, StreamSettings, check_streamable
from .report import (
    STOPPED,
    WHOLE,
    Made,
    UnderWay,
    counts,
    identity,
    planned,
    used,
    write_short,
)

MAX_SIZE = 8192


def check_size(width: int | None, height: int | None) -> str | None:
    """Why a picture cannot have this size, or None; linked numbers arrive as None."""
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value < 16 or value % 16 or value > MAX_SIZE):
            nearest = round(min(max(value, 16), MAX_SIZE) / 16) * 16
            bounds = "at least 16" if value <= MAX_SIZE else f"at most {MAX_SIZE}"
            return f"{name} is {shown(value)}; it must be a multiple of 16, {bounds}: try {nearest}"
    return None


@dataclass(frozen=True)
class Request:
    """A rollout as the node's inputs ask for it."""

    model: Any = field(repr=False)
    positive: Any = field(repr=False)
    width: int
    height: int
    length: int
    batch_size: int
    seed: int
    steps: int
    shift: float
    chunk_frames: int
    window_frames: int
    positions: str
    anchor: Anchor | None
    sigmas: Sequence[float] | None
    start_latent: dict[str, Any] | None = field(repr=False)
    resume: RolloutState | None
    stream: StreamSettings | None
    keep_latents: bool
    absorption: AbsorptionRequest | None = None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    max_seconds: float = 0.0

    @property
    def latent_length(self) -> int:
        return (self.length - 1) // 4 + 1


@dataclass
class Result:
    """What a run made. `latents` are in VAE space, or None if they were not kept.

    If there was not enough memory for latents or state, the value is None, and `missing` says so under its output's name.
    """

    latents: torch.Tensor | None
    state: RolloutState | None
    report: dict[str, Any]
    videos: list[Target]
    missing: dict[str, str] = field(default_factory=dict)
    reports: list[Target] = field(default_factory=list)


class Job:
    """Resolves a request against the model, rolls it out, decodes and writes as it goes."""

    def __init__(self, request: Request) -> None:
        self.request, self._begun = request, time.monotonic()
        checks.check_model(request.model)
        if request.start_latent is not None:
            checks.check_latent("start_latent", request.start_latent)
        contexts = self._contexts()
        context = contexts[0][1]
        anchor, told = anchor_at(request.anchor, self.fps, request.resume and request.resume.spec)
        self.resolved = resolve(rollout_defaults(request.model), self._asked(), anchor)
        self.settings = self.resolved.numbers
        self.warnings = [*self.resolved.warnings(request.latent_length), *self._ignored(), *told]
        self.model = host_model.HostModel(request.model, context, request.batch_size)
        self.spec = RolloutSpec(
            geometry=self.model.geometry,
            batch=request.batch_size,
            height=request.height // 8,
            width=request.width // 8,
            chunk_frames=self.settings["chunk_frames"],
            window_frames=self.settings["window_frames"],
            anchor=self.resolved.anchor,
            positions=self.settings["positions"],
            dtype=self.model.dtype,
            model=host_model.fingerprint(request.model),
            absorption=request.absorption.settings if request.absorption else None,
            cache_dtype=request.cache_dtype,
            cache_device=request.cache_device,
            **self.resolved.spec_options(len(self.schedule.sigmas)),
        )
        check_cache_dtype(request.cache_dtype, self.model.device)
        self.prompts = self._prompt_plan(contexts)
        self.solution = request.absorption.solution(self.spec) if request.absorption else None
        self.origin = {"prompt": host_model.prompt_digest(context), "seed": request.seed}
        stream = request.stream
        self.decoder = HostDecoder(stream.vae, latent_space=stream.latent_space) if stream else None
        vae_bytes = self.decoder.cache_bytes(*self._latent_size) if self.decoder else 0
        self.text_tokens = max(one.shape[1] for _, one in contexts)
        self.plan = self.spec.plan(self.text_tokens, vae_bytes)
        host_model.check_memory(self.plan, host_model.available_bytes(request.model))
        host_model.check_host_memory(self.plan)
        self.given = self._given()
        self._check_length()

    def _check_length(self) -> None:
        """Everything about length, start, resume and names that can be known before anything is loaded or written."""
        request, resume = self.request, self.request.resume
        if request.stream is not None:
            check_video_prefix(request.stream.filename_prefix, request.batch_size, request.width, request.height)
        if self.given is not None and self.given.shape[2] >= request.latent_length:
            frames = pictures_of(self.given.shape[2])
            raise ValueError(f"start_latent holds {frames} frames of length {request.length}; length must be longer")
        if resume is None:
            return
        if self.given is not None:
            raise ValueError(
                "both resume and start_latent are connected; a state goes on by itself: remove start_latent"
            )
        if differences := self.spec.differences(resume.spec):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        if resume.emitted >= request.latent_length:
            raise ValueError(
                f"the state holds {pictures_of(resume.emitted)} frames and length is {request.length}; length counts from "
                f"the first frame of the video, so give more than {pictures_of(resume.emitted)}"
            )
        if request.stream is not None:
            check_streamable(resume, self.decoder)

    @property
    def _latent_size(self) -> tuple[int, int, int]:
        return self.request.batch_size, self.request.height // 8, self.request.width // 8

    def _asked(self) -> dict[str, Any]:
        """The node's numbers, None where they say auto."""
        request = self.request
        numbers = asked_numbers(request.chunk_frames, request.window_frames, request.positions)
        return numbers | {"steps": request.steps or None, "shift": request.shift or None}

    def _contexts(self) -> list[tuple[PromptAt | None, torch.Tensor]]:
        """(entry of the timeline, its text embeddings) for each prompt; the first begins at frame 0. ValueError if a prompt carries
        something that a rollout cannot act on."""
        positive = self.request.positive
        if not isinstance(positive, Prompts):
            return [(None, checks.check_conditioning(positive))]
        contexts = []
        for entry in positive.entries:
            try:
                contexts.append((entry, checks.check_conditioning(entry.conditioning)))
            except ValueError as error:
                raise ValueError(f"the prompt at {entry.seconds:g} s: {error}") from error
        return contexts

    def _prompt_plan(self, contexts: list[tuple[PromptAt | None, torch.Tensor]]) -> PromptPlan | None:
        """The changes by latent frame. Seconds count at the stream's frames a second, or at 16 without a stream."""
        if len(contexts) == 1:
            return None
        changes, frame = [], -1
        for entry, context in contexts:
            self.model.check_context(context)
            asked = round(entry.seconds * self.fps / 4)
            if asked <= frame:
                raise ValueError(
                    f"the prompt at {entry.seconds:g} s falls on latent frame {asked}, as the one before it; at {self.fps:g} fps "
                    f"prompts must be at least {4 / self.fps:g} s apart"
                )
            frame = asked
            changes.append(PromptChange(frame, context, entry.transition, entry.chunks, entry.blend))
        return PromptPlan(changes, self.spec.chunk_frames)

    def _ignored(self) -> list[str]:
        """One sentence for each thing in the inputs that is not acted on or that nobody knows; no sentence comes twice."""
        positive, start = self.request.positive, self.request.start_latent
        prompts = [entry.conditioning for entry in positive.entries] if isinstance(positive, Prompts) else [positive]
        found = checks.unknown_options(self.request.model)
        if self.request.sigmas is not None:
            found += self.resolved.sigmas_warnings(self.schedule)
        if self.request.absorption is not None and checks.overrides_attention(self.request.model):
            found.append(
                "the model's attention override (optimized_attention_override) is not used in passes that the absorption watches"
            )
        for prompt in prompts:
            found += checks.unknown_conditioning(prompt)
        found += [] if start is None else checks.unknown_latent("start_latent", start)
        return list(dict.fromkeys(found))

    @property
    def fps(self) -> float:
        return self.request.stream.fps if self.request.stream else 16.0

    @property
    def schedule(self) -> Schedule:
        if self.request.sigmas is not None:
            return self.resolved.given_schedule(self.request.sigmas)
        return self.resolved.schedule

    def _given(self) -> torch.Tensor | None:
        if self.request.start_latent is None:
            return None
        samples = self.request.start_latent["samples"]
        batch, height, width = self._latent_size
        if samples.ndim != 5 or samples.shape[1] != 16 or samples.shape[0] not in (1, batch) or not samples.shape[2]:
            raise ValueError(
                f"start_latent is {list(samples.shape)}; it must be a Wan 2.1 video latent [1 or {batch}, 16, frames, h, w]:"
                " encode pictures with VAE Encode and a Wan 2.1 VAE"
            )
        if tuple(samples.shape[3:]) != (height, width):
            raise ValueError(
                f"start_latent is {samples.shape[4] * 8}x{samples.shape[3] * 8} and the rollout {width * 8}x{height * 8}; "
                "scale the pictures to the rollout's size before encoding them"
            )
        return host_model.to_model_space(self.request.model, samples.float()).expand(batch, -1, -1, -1, -1)

    def rollout(self, progress: Progress) -> Rollout:
        """Load the models. Returns the rollout that the request asks for, before its first chunk."""
        self._load()
        rollout = Rollout(
            self.model,
            self.spec,
            Settings(self.request.seed, self.schedule),
            state=self.request.resume,
            keep_latents=self.request.keep_latents,
            text_tokens=self.text_tokens,
            on_step=lambda chunk, step, steps, x0: progress.step(),
            solution=self.solution,
            prompts=self.prompts,
        )
        if rollout.absorber is not None:
            rollout.absorber.origin = self.request.absorption.solved_for or self.origin
        return rollout

    def run(self, view: LiveRun | None = None) -> Result:
        """Load, roll, decode. However the run ends, its files are finished. After a failure the state is saved beside them. Last, a
        report is written, unless the run was refused before anything was loaded.

        `view` is shown each chunk. It may ask to stop, like max_seconds. The run then ends after the chunk under way, with the
        frames that there are.
        """
        view = view or LiveRun(None)
        output = StreamOutput(self, self.request.stream) if self.request.stream else None
        run = UnderWay(view.place, output)
        try:
            result = self._roll(run, view)
            if run.reports is not None:
                result.report["warnings"] += run.reports.write(result.report)
                result.reports = run.reports.written
        except BaseException as error:
            write_short(self, run, error)
            raise
        return result

    def _roll(self, run: UnderWay, view: LiveRun) -> Result:
        """Run the rollout. Its progress is noted in `run`."""
        request, progress, output, made = self.request, Progress(), run.output, run.made
        run.rollout = rollout = self.rollout(progress)
        passes = rollout.passes(request.latent_length, 0 if self.given is None else self.given.shape[2])
        progress.expect(passes + (output.steps() if output else 0))
        if output:
            output.open(progress)
        ended = False
        run.start = time.perf_counter()
        attempt("a rollout's start could not be shown", lambda: view.started(run_facts(self, output and output.run_id)))
        try:
            for chunk in rollout.chunks(request.latent_length, self.given):
                made.add(chunk, self._holds_latents)
                pictures = output.step(chunk, rollout)[0] if output else None
                self._show(view, progress, made.count - 1, chunk, rollout, pictures)
                if view.stopped or self._time_is_up:
                    break
            ended = True
        finally:
            if output:
                output.finish(rollout, whole=ended and rollout.emitted >= request.latent_length)
                view.saved = attempt("what a rollout saved could not be listed", output.saved)[0] or {}
        run.seconds = time.perf_counter() - run.start
        return self._result(run, view)

    @property
    def _time_is_up(self) -> bool:
        return 0 < self.request.max_seconds <= self.seconds_since_begin()

    def seconds_since_begin(self) -> float:
        """Seconds since the node began to execute."""
        return time.monotonic() - self._begun

    def _result(self, run: UnderWay, view: LiveRun) -> Result:
        """The outputs of a run that is over. If one cannot be made, the others are still there."""
        rollout, output, saved = run.rollout, run.output, view.saved.get("state")
        missing: dict[str, str] = {}

        def tried(name: str, make: Callable[[], Any], instead: str) -> Any:
            value, reason = attempt(f"the {name} of a finished rollout could not be made", make, again=True)
            if reason:
                missing[name] = f"{name} could not be made of the finished rollout ({reason}): {instead}"
            return value

        again = "free some memory and run it again"
        state = tried(
            "STATE",
            lambda: rollout.snapshot(output.snapshot() if output else {}),
            f"Load Rollout State has {saved}, the last one that was saved" if saved else again,
        )
        latents = tried("LATENT", lambda: self._latents(rollout, state, run.made), again)
        stopped = self._stopped(rollout, view)
        more = tried("REPORT", lambda: planned(self) | used(self, rollout, state), "it says only what was counted")
        if self.request.sigmas is not None:
            self.warnings.append("sigmas is connected, so steps and shift were not used")
        warnings = [*self.warnings, *missing.values(), *(output.warnings if output else [])]
        report = {"ended": STOPPED if stopped else WHOLE, "error": None} | identity(self, run) | counts(self, run)
        report |= (more or {}) | stopped
        report["warnings"] = list(dict.fromkeys(warnings))
        return Result(latents, state, report, output.targets if output else [], missing)

    def _show(
        self,
        view: LiveRun,
        progress: Progress,
        number: int,
        chunk: Chunk,
        rollout: Rollout,
        pictures: torch.Tensor | None,
    ) -> None:
        """Show a chunk on the node and to the page that watches. A picture that fails is logged; an interrupt is raised."""

        def preview() -> None:
            if pictures is None:
                progress.preview_latent(self.request.model, chunk.latents)
            elif self.request.stream.preview and not view.has_page:
                progress.preview(pictures[-1])

        attempt("a chunk's preview could not be made", preview)
        if view.watched:
            attempt("a chunk could not be shown", lambda: self._tell(view, number, chunk, rollout, pictures))

    def _tell(self, view: LiveRun, number: int, chunk: Chunk, rollout: Rollout, pictures: torch.Tensor | None) -> None:
        """Send a chunk to the page that watches. If the anchor has a hidden state and there is a decoder, send that state too."""
        shown = pictures if pictures is not None and self.request.stream.preview else None
        hidden = None
        if shown is not None and chunk.hidden is not None:
            hidden = view.hidden_state(lambda: hidden_picture(self, chunk.hidden))
        view.chunk(chunk_facts(self, number, chunk, rollout), shown, hidden)

    def _stopped(self, rollout: Rollout, view: LiveRun) -> dict[str, Any]:
        """The report's entry of a rollout that was stopped before its length."""
        if rollout.emitted >= self.request.latent_length:
            return {}
        frames, asked = pictures_of(rollout.emitted), pictures_of(self.request.latent_length)
        limit = None if view.stopped else self.request.max_seconds
        self.warnings.append(stop_note(frames, asked, limit))
        return {"stopped": {"frame": frames, "of": asked, "by": "user" if limit is None else "max_seconds"}}

    @property
    def _holds_latents(self) -> bool:
        """Whether LATENT is wanted: a stream holds no latents unless it is told to."""
        return self.request.keep_latents or self.request.stream is None

    def _load(self) -> None:
        if self.decoder:
            working = self.decoder.working_bytes(*self._latent_size)
            self.model.load(self.plan, [self.decoder.patcher], working)
        else:
            self.model.load(self.plan)

    def _latents(self, rollout: Rollout, state: RolloutState | None, made: Made) -> torch.Tensor | None:
        """All latents since frame 0 if all of them were kept, else those of this run; in VAE space."""
        if not self._holds_latents:
            return None
        latents = rollout.kept_latents if state is None else state.latents
        if latents is None:
            latents = torch.cat(made.latents, dim=2)
            if self.request.keep_latents and self.request.resume is not None:
                self.warnings.append("the resumed state had not kept its latents, so LATENT holds this run's only")
        return host_model.to_vae_space(self.request.model, latents)
