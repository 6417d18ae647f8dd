"""One run of the rollout node, from checked inputs to outputs: what the node's few lines call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adastate_core.audio.driving import CHUNK
from ..adastate_core.given import BEFORE, INSIDE
from ..adastate_core.rollout import Chunk, Rollout, RolloutState, Settings
from ..adastate_core.video.page_locked import Landed
from . import endless
from .chunk_facts import chunk_facts, hidden_picture, run_facts, stop_note
from .host import model as host_model
from .host.live_runs import LiveRun
from .host.output_files import Target
from .host.progress import Progress
from .host.safely import attempt
from .output import StreamOutput
from .preflight import Prepared
from .report import (
    STOPPED,
    WHOLE,
    Made,
    UnderWay,
    counts,
    identity,
    not_made,
    planned,
    used,
    write_short,
)
from .steering import Steering

# latent frames of a still that a decoder has seen before the video, as the published pipeline has it
STILL_FRAMES = 7


@dataclass
class Result:
    """What a run made. `latents` are in VAE space.

    Latents or state are None if nobody takes them, if latents were not kept, or if there was not enough memory for them;
    `why_not` says which of these it was, under the output's name.
    """

    latents: torch.Tensor | None
    state: RolloutState | None
    report: dict[str, Any]
    videos: list[Target]
    why_not: dict[str, str] = field(default_factory=dict)
    reports: list[Target] = field(default_factory=list)
    frame_folders: list[Target] = field(default_factory=list)


class Job(Prepared):
    """Rolls out what was asked for, decodes and writes as it goes."""

    def rollout(self, progress: Progress) -> Rollout:
        """Load the models, and compile what can be. Returns the rollout that the request asks for, before its first chunk."""
        # by a VAE that is on its device before the model takes the room
        self.picture = None if self.reference is None else self.reference.latent()
        self._load(progress)
        if told := self.model.fuse(self.spec, self.plan, self.request.resume, progress.compiling, self.start == INSIDE):
            self.warnings.append(told)
        rollout = Rollout(
            self.model,
            self.spec,
            Settings(self.request.seed, self.schedule, sound=self.sound),
            state=self.request.resume,
            keep_latents=self.keeps_latents,
            text_tokens=self.text_tokens,
            on_step=lambda chunk, step, steps, x0: progress.step(),
            solution=self.solution,
            prompts=self.prompts,
            length=self.latent_length,
            prior=self.prior,
            reference=self.picture,
        )
        if rollout.absorber is not None:
            rollout.absorber.origin = self.request.absorption.solved_for or self.origin
        return rollout

    def still(self) -> torch.Tensor | None:
        """Latents [B, C, n, h, w] in VAE space of what a decoder sees before the video, where pictures of its first latent frame
        come as if something had been there before; else None."""
        if self.sound is None or self.sound.alignment != CHUNK:
            return None
        resume = self.request.resume
        picture = self.picture if resume is None else resume.reference
        return host_model.to_vae_space(self.request.model, picture).expand(-1, -1, STILL_FRAMES, -1, -1)

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
        finally:
            self._let_go(run)
        return result

    def _let_go(self, run: UnderWay) -> None:
        """Caches and the decoder's memory go with the run, and not when Python's collector comes by: what else the prompt does may
        need the room, and the host keeps the traceback of a failure for a while."""
        if run.rollout is not None:
            run.rollout.close()
        if run.output is not None:
            run.output.let_go()
        run.rollout = run.output = run.reports = run.steering = None
        self.model = self.decoder = self.enlarger = self.picture = self.solution = self.prior = self.prompts = None
        self.renewal = None

    def _roll(self, run: UnderWay, view: LiveRun) -> Result:
        """The rollout itself; `run` is told how far it is."""
        progress, output, made = Progress(), run.output, run.made
        run.steering = view.steering = steering = Steering(self, view, run)
        run.rollout = rollout = self.rollout(progress)
        progress.expect(self._passes_left(rollout) + (output.steps() if output else 0))
        self.renewal.join(rollout, self.request.resume)
        if output:
            output.open(progress)
            rollout.streamed = lambda: output.settled(rollout)
        rollout.holds_state = output is not None or "STATE" in self.request.linked
        ended, holds = False, "LATENT" in self.request.linked and not self.no_latent and not rollout.keeps_latents
        run.start = time.perf_counter()
        attempt("a rollout's start could not be shown", lambda: view.started(run_facts(self, output and output.run_id)))
        try:
            if self.request.endless:
                progress.begin(self._steps_left(run))
            for chunk in rollout.chunks(self.latent_length, self.given, self.start):
                made.add(chunk, holds)
                pictures = output.step(chunk, rollout) if output else None
                steering.shown(chunk, pictures)
                self._show(run, view, progress, chunk, pictures)
                run.stopped_by, end = self._stopped_by(run, view), rollout.emitted
                if not run.stopped_by:
                    steering.between(rollout)
                    run.stopped_by = view.stopped_by
                if run.stopped_by:
                    break
                if self.request.endless or rollout.emitted < end:
                    progress.begin(self._steps_left(run))
            if output:
                output.settle(rollout)
            ended = True
        finally:
            steering.over(ended and rollout.emitted >= self.latent_length)
            if output:
                whole = ended and rollout.emitted >= self.latent_length and not self.request.endless
                output.finish(rollout, whole)
                view.saved = attempt("what a rollout saved could not be listed", output.saved)[0] or {}
        run.seconds = run.rolled_for
        return self._result(run, view)

    def _passes_left(self, rollout: Rollout) -> int:
        """Passes until the video is whole; of one without an end, until its next chunk is."""
        taken = self.given is not None and self.start == BEFORE and not rollout.emitted
        return rollout.passes(self._ahead(rollout), self.given.shape[2] if taken else 0)

    def _ahead(self, rollout: Rollout) -> int:
        """The video's length in latent frames; of one without an end, that after its next chunk."""
        chunk = rollout.emitted + self.spec.chunk_frames
        return min(chunk, self.latent_length) if self.request.endless else self.latent_length

    def _steps_left(self, run: UnderWay) -> int:
        """Steps of progress until then, from between two chunks on."""
        rollout, output = run.rollout, run.output
        return self._passes_left(rollout) + (output.steps_left(rollout.emitted, self._ahead(rollout)) if output else 0)

    def _stopped_by(self, run: UnderWay, view: LiveRun) -> str:
        """What ends the run after this chunk, as the report's `stopped` says; empty: nothing does."""
        if view.stopped_by:
            return view.stopped_by
        if self._time_is_up:
            return "max_seconds"
        return run.output.full() if self.request.endless else ""

    @property
    def _time_is_up(self) -> bool:
        return 0 < self.request.max_seconds <= self.seconds_since_begin()

    def _result(self, run: UnderWay, view: LiveRun) -> Result:
        """The outputs of a run that is over. If one cannot be made, the others are still there."""
        rollout, output, saved = run.rollout, run.output, view.saved.get("state")
        why_not = not_made(self)
        missing: dict[str, str] = {}

        def tried(name: str, make: Callable[[], Any], instead: str) -> Any:
            if name in why_not:
                return None
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
        latents = tried("LATENT", lambda: self._latents(rollout, run.made), again)
        stopped = self._stopped(run)
        more = tried("REPORT", lambda: planned(self) | used(self, rollout, state), "it says only what was counted")
        if self.request.sigmas is not None:
            self.warnings.append("sigmas is connected, so steps and shift were not used")
        warnings = [*self.warnings, *run.steering.notes(), *missing.values(), *(output.warnings if output else [])]
        report = {"ended": STOPPED if stopped else WHOLE, "error": None} | identity(self, run) | counts(self, run)
        report |= (
            (more or {})
            | run.steering.report()
            | self.renewal.report()
            | stopped
            | ({"not_made": why_not} if why_not else {})
        )
        report["warnings"] = list(dict.fromkeys(warnings))
        videos, folders = (output.videos, output.frame_folders) if output else ([], [])
        return Result(latents, state, report, videos, why_not | missing, frame_folders=folders)

    def _show(self, run: UnderWay, view: LiveRun, progress: Progress, chunk: Chunk, pictures: Landed | None) -> None:
        """Show a chunk on the node and to the page that watches. A picture that fails is logged; an interrupt is raised."""

        def preview() -> None:
            if pictures is None:
                progress.preview_latent(self.request.model, chunk.latents)
            elif self.request.stream.preview and not view.has_page:
                progress.preview(pictures.wait()[0, -1])

        attempt("a chunk's preview could not be made", preview)
        if view.watched:
            attempt("a chunk could not be shown", lambda: self._tell(run, view, chunk, pictures))

    def _tell(self, run: UnderWay, view: LiveRun, chunk: Chunk, pictures: Landed | None) -> None:
        """Send a chunk to the page that watches. If the anchor has a hidden state and there is a decoder, send that state too."""
        shown = pictures.kept(0) if pictures is not None and self.request.stream.preview else None
        hidden = None
        if shown is not None and chunk.hidden is not None:
            hidden = view.hidden_state(lambda: hidden_picture(self, chunk.hidden))
        autosave = run.output.autosave() if run.output else None
        view.chunk(chunk_facts(self, run.made.count - 1, chunk, run.rollout, autosave), shown, hidden)

    def _stopped(self, run: UnderWay) -> dict[str, Any]:
        """The report's entry of a rollout that was stopped before its length, or that has none."""
        frames, limit = self.space.pictures(run.rollout.emitted), self.request.max_seconds
        if self.request.endless:
            by = run.stopped_by or "most"
            self.warnings.append(endless.stop_note(frames, by, limit, run.output.full_note))
            return {"stopped": {"frame": frames, "of": None, "by": by}}
        if run.rollout.emitted >= self.latent_length:
            return {}
        asked = self.space.pictures(self.latent_length)
        self.warnings.append(stop_note(frames, asked, limit if run.stopped_by == "max_seconds" else None))
        return {"stopped": {"frame": frames, "of": asked, "by": run.stopped_by}}

    def _load(self, progress: Progress) -> None:
        if self.enlarger:
            self.enlarger.beside = [self.model.patcher, self.decoder.patcher]
        self.model.load(self.plan, *self._in_turn())
        if self.decoder:
            self.warnings += self.decoder.ready(*self.latent_size, progress.compiling)

    def _latents(self, rollout: Rollout, made: Made) -> torch.Tensor:
        """All latents since frame 0 if they were kept all along, else those of this run; in VAE space."""
        latents = rollout.kept_latents
        if latents is None:
            latents = torch.cat(made.latents, dim=2)
            made.latents = [latents]
            if self.request.keep_latents and self.request.resume is not None:
                self.warnings.append("the resumed state had not kept its latents, so LATENT holds this run's only")
        return host_model.to_vae_space(self.request.model, latents)
