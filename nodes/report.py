"""What a rollout says of itself at its end: REPORT, and the file of the same content beside its videos. Keys: docs/api.md."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adastate_core.files.whole_file import whole_file
from ..adastate_core.rollout import Chunk, Rollout, RolloutState
from .host.error_types import describe_error
from .host.output_files import Target, new_files, video_endings
from .host.rerun import Place
from .host.safely import Interrupted, attempt
from .output import StreamOutput
from .preflight import Prepared

log = logging.getLogger("adastate")
REPORT_SUFFIX = ".report.json"
WHOLE, STOPPED, INTERRUPTED, FAILED = ENDS = ("whole", "stopped", "interrupted", "failed")


@dataclass
class Made:
    """What is remembered of each chunk while a rollout runs: the seconds that it took, and its latents if they are wanted."""

    count: int = 0
    seconds: list[float] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def add(self, chunk: Chunk, keep: bool) -> None:
        self.count += 1
        if not chunk.given:
            self.seconds.append(chunk.seconds)
        if keep:
            self.latents.append(chunk.latents)


@dataclass
class UnderWay:
    """One run as far as it is; `start` is the clock (perf_counter) when its models were loaded."""

    place: Place | None
    output: StreamOutput | None
    rollout: Rollout | None = None
    made: Made = field(default_factory=Made)
    start: float | None = None
    seconds: float | None = None
    reports: ReportFiles | None = None

    def __post_init__(self) -> None:
        self.reports = ReportFiles(self.output) if self.output else None

    @property
    def rolled_for(self) -> float:
        """Seconds since the models were loaded, or until the run was over."""
        if self.start is None:
            return 0.0
        return time.perf_counter() - self.start if self.seconds is None else self.seconds


def identity(job: Prepared, run: UnderWay) -> dict[str, Any]:
    """Whose report it is and what its files are called; nothing here can fail."""
    saved = attempt("what a rollout saved could not be listed", run.output.saved)[0] if run.output else None
    return {
        "prompt_id": run.place.prompt_id if run.place else None,
        "node_id": run.place.node_id if run.place else None,
        "videos": [target.name for target in run.output.videos] if run.output else [],
        "state": (saved or {}).get("state"),
        "length": job.space.pictures(job.latent_length),
    }


def counts(job: Prepared, run: UnderWay) -> dict[str, Any]:
    """What a report says of any run: nothing here can fail."""
    before = job.request.resume.emitted if job.request.resume else 0
    emitted = run.rollout.emitted if run.rollout else before
    frames = job.space.pictures(emitted) - job.space.pictures(before)
    fps, seconds, times = job.fps, run.rolled_for, run.made.seconds
    output = run.output
    return {
        "chunks": run.made.count,
        "frames": frames,
        "frames_total": job.space.pictures(emitted),
        "video_seconds": frames / fps,
        "seconds": round(seconds, 3),
        "seconds_all": round(job.seconds_since_begin(), 3),
        "seconds_per_chunk": round(sorted(times)[len(times) // 2], 4) if times else 0.0,
        "fps": round(frames / seconds, 2) if seconds else 0.0,
        "speed": round(frames / fps / seconds, 3) if seconds else 0.0,
        "files": [target.path.name for target in output.videos] if output else [],
        **({"history": output.history.kept} if output and output.history else {}),
    }


def planned(job: Prepared) -> dict[str, Any]:
    """What is known before the first chunk: planned bytes, settings, prompts."""
    return {
        "plan_bytes": job.plan.bytes(),
        "kv_bytes_planned": job.plan.kv_bytes,
        "settings": job.settings
        | {"seed": job.request.seed, "anchor": job.spec.anchor.describe(), "sigmas": list(job.schedule.sigmas)}
        | {"cache_dtype": job.spec.cache_dtype, "cache_device": job.spec.cache_device}
        | ({"first_sigmas": list(job.schedule.first_sigmas)} if job.schedule.first_sigmas else {})
        | ({"preset": job.resolved.preset.name} if job.resolved.preset else {}),
        "prompts": _prompts(job),
        **({"decoder": job.decoder.describe()} if job.decoder else {}),
    }


def used(job: Prepared, rollout: Rollout, state: RolloutState | None) -> dict[str, Any]:
    """What a run took: bytes, and where its absorption stands."""
    absorption = _absorption(job, rollout)
    return {
        "kv_bytes_used": absorption["kv_bytes_before"] if absorption else rollout.cache.nbytes,
        "host_kv_bytes_used": rollout.cache.host_nbytes,
        "text_kv_bytes_used": rollout.cache.text_nbytes,
        "state_bytes": None if state is None else state.nbytes,
        **({"absorption": absorption} if absorption else {}),
    }


def _prompts(job: Prepared) -> list[dict[str, Any]]:
    """Where the prompt changes: the latent frame, the text if it is known, and how."""
    if job.prompts is None:
        return []
    pairs = zip(job.request.positive.entries, job.prompts.changes, strict=True)
    return [
        {"seconds": entry.seconds, "latent_frame": change.frame, "text": entry.text, "transition": change.transition}
        for entry, change in pairs
    ]


def _absorption(job: Prepared, rollout: Rollout) -> dict[str, Any] | None:
    """The absorber's report, with a warning for what may surprise."""
    if rollout.absorber is None:
        return None
    report = rollout.absorber.report()
    if report["phase"] == "nothing to absorb" and job.spec.absorption.layers(job.spec.geometry.layers):
        job.warnings.append(
            "nothing was absorbed: within the warm-up no layer held more than the sink and the local window; give a larger "
            "window_frames or warmup_frames, or a smaller local_window_frames"
        )
    if others := job.request.absorption.differences(job.origin):
        job.warnings.append(f"the loaded absorption was solved for another {' and '.join(others)}")
    return report


def short_report(job: Prepared, run: UnderWay, error: BaseException) -> dict[str, Any]:
    """The report of a run that `error` ended, with all that is known of it."""
    interrupted = isinstance(error, Interrupted) or not isinstance(error, Exception)
    report: dict[str, Any] = {
        "ended": INTERRUPTED if interrupted else FAILED,
        "error": None if interrupted else describe_error(error),
    }
    parts = [lambda: identity(job, run), lambda: counts(job, run), lambda: planned(job)]
    if run.rollout is not None:
        parts.append(lambda: used(job, run.rollout, None))
    for part in parts:
        report |= attempt("a part of the report of a run that ended early could not be made", part)[0] or {}
    report["warnings"] = list(dict.fromkeys([*job.warnings, *(run.output.warnings if run.output else [])]))
    return report


def report_text(report: dict[str, Any]) -> str:
    """As JSON: NaN and infinity are null, and what else it has no words for is written as Python prints it."""
    return json.dumps(_plain(report), indent=1, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ReportFiles:
    """`<video>.report.json` beside each video of a run, or of the name that its first video would have got."""

    def __init__(self, output: StreamOutput) -> None:
        self.output, self.written = output, []

    def write(self, report: dict[str, Any]) -> list[str]:
        """Write them all, whole and to names that nobody has; sentences about those that could not be."""
        data, warnings = report_text(report).encode(), []
        targets, reason = attempt("a report of a run could not be named", self._targets)
        for target in targets or []:
            _, reason = attempt(f"{target.name} could not be written", lambda target=target: self._write(target, data))
            if reason:
                warnings.append(f"{target.path.name} could not be written ({reason}); REPORT says the same")
        return warnings

    def _write(self, target: Target, data: bytes) -> None:
        own = self._named_here or any(each.path == target.path for each in self.written)
        try:
            with whole_file(target.path, new=not own) as file:
                file.write(data)
        except BaseException:
            if self._named_here:
                target.path.unlink(missing_ok=True)
            raise
        if target not in self.written:
            self.written.append(target)

    @property
    def _named_here(self) -> bool:
        return not self.output.targets

    def _targets(self) -> list[Target]:
        """Beside the videos; names of its own for a run that ended before they had any."""
        if self.output.targets:
            return [Target(_beside(each.path), each.subfolder, each.kind) for each in self.output.targets]
        request, settings = self.output.job.request, self.output.settings
        suffixes = [suffix.removesuffix(".mp4") + REPORT_SUFFIX for suffix in video_endings(request.batch_size)]
        return new_files(settings.filename_prefix, suffixes, request.width, request.height)


def _beside(video: Path) -> Path:
    return video.with_suffix(REPORT_SUFFIX)


def write_short(job: Prepared, run: UnderWay, error: BaseException) -> None:
    """Leave the report of a run that `error` ended; whatever goes wrong with that is logged, and `error` is what is told."""
    if run.reports is None:
        return
    with contextlib.suppress(BaseException):
        for sentence in run.reports.write(short_report(job, run, error)):
            log.warning("%s", sentence)
