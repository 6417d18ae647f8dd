"""One run of the rollout node, from checked inputs to outputs: what the node's few lines call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adastate_core.rollout import Chunk, Rollout, RolloutState, Settings
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
    planned,
    used,
    write_short,
)


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


class Job(Prepared):
    """Rolls out what was asked for, decodes and writes as it goes."""

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
        """The rollout itself; `run` is told how far it is."""
        progress, output, made = Progress(), run.output, run.made
        run.rollout = rollout = self.rollout(progress)
        passes = rollout.passes(self.latent_length, 0 if self.given is None else self.given.shape[2])
        progress.expect(passes + (output.steps() if output else 0))
        if output:
            output.open(progress)
        ended = False
        run.start = time.perf_counter()
        attempt("a rollout's start could not be shown", lambda: view.started(run_facts(self, output and output.run_id)))
        try:
            for chunk in rollout.chunks(self.latent_length, self.given):
                made.add(chunk, self.holds_latents)
                pictures = output.step(chunk, rollout)[0] if output else None
                self._show(view, progress, made.count - 1, chunk, rollout, pictures)
                if view.stopped or self._time_is_up:
                    break
            ended = True
        finally:
            if output:
                output.finish(rollout, whole=ended and rollout.emitted >= self.latent_length)
                view.saved = attempt("what a rollout saved could not be listed", output.saved)[0] or {}
        run.seconds = time.perf_counter() - run.start
        return self._result(run, view)

    @property
    def _time_is_up(self) -> bool:
        return 0 < self.request.max_seconds <= self.seconds_since_begin()

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
        if rollout.emitted >= self.latent_length:
            return {}
        frames, asked = self.space.pictures(rollout.emitted), self.space.pictures(self.latent_length)
        limit = None if view.stopped else self.request.max_seconds
        self.warnings.append(stop_note(frames, asked, limit))
        return {"stopped": {"frame": frames, "of": asked, "by": "user" if limit is None else "max_seconds"}}

    def _load(self) -> None:
        if self.decoder:
            working = self.decoder.working_bytes(*self.latent_size)
            self.model.load(self.plan, [self.decoder.patcher], working)
        else:
            self.model.load(self.plan)

    def _latents(self, rollout: Rollout, state: RolloutState | None, made: Made) -> torch.Tensor | None:
        """All latents since frame 0 if they were kept all along, else those of this run; in VAE space."""
        if not self.holds_latents:
            return None
        latents = rollout.kept_latents if state is None else state.latents
        if latents is None:
            latents = torch.cat(made.latents, dim=2)
            if self.request.keep_latents and self.request.resume is not None:
                self.warnings.append("the resumed state had not kept its latents, so LATENT holds this run's only")
        return host_model.to_vae_space(self.request.model, latents)
