"""What a rollout says of itself at its end: REPORT, and the file of the same content beside its videos. Keys: docs/api.md."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..adastate_core.files.whole_file import whole_file
from ..adastate_core.rollout import Chunk, Rollout, RolloutState
from .absorption_advice import afterwards
from .builder import ON_DEMAND
from .host.error_types import describe_error
from .host.output_files import Target, new_files
from .host.rerun import Place
from .host.safely import Interrupted, attempt
from .memory_plan import peak_report
from .output import StreamOutput
from .preflight import Prepared

log = logging.getLogger("adastate")
REPORT_SUFFIX = ".report.json"
_TIMED_CHUNKS = 4096
WHOLE, STOPPED, INTERRUPTED, FAILED = ENDS = ("whole", "stopped", "interrupted", "failed")
UNLINKED = (
    "{0} was not linked when the rollout ran, so it was not made; queue the graph again with {0} linked: the rollout then runs "
    "again from the newest state that is kept beside its video, else from the start"
)


@dataclass
class Made:
    """What is remembered while a rollout runs: the seconds that each newest chunk took, and all latents if they are wanted."""

    count: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED_CHUNKS))
    latents: list[torch.Tensor] = field(default_factory=list)

    def go_back(self, count: int, frames: int) -> None:
        """Only the first `count` chunks count, and of the latents that are kept the first `frames` frames."""
        self.count = count
        if self.latents:
            self.latents = [torch.cat(self.latents, dim=2)[:, :, :frames]]

    def add(self, chunk: Chunk, keep: bool) -> None:
        self.count += 1
        if not chunk.given:
            self.seconds.append(chunk.seconds)
        if keep:
            self.latents.append(chunk.latents)


class Steered(Protocol):
    """What a run was asked on the way (steering.py)."""

    def report(self) -> dict[str, Any]:
        """What of it belongs into the report."""
        ...

    def notes(self) -> list[str]:
        """Sentences for its warnings."""
        ...


@dataclass
class UnderWay:
    """One run as far as it is; `start` is the clock (perf_counter) when its models were loaded. `stopped_by`: what ended it after a
    chunk, as the report's `stopped` says; empty where nothing did."""

    place: Place | None
    output: StreamOutput | None
    rollout: Rollout | None = None
    made: Made = field(default_factory=Made)
    start: float | None = None
    seconds: float | None = None
    stopped_by: str = ""
    reports: ReportFiles | None = None
    steering: Steered | None = None

    def __post_init__(self) -> None:
        self.reports = ReportFiles(self.output) if self.output else None

    @property
    def rolled_for(self) -> float:
        """Seconds since the models were loaded, or until the run was over."""
        if self.start is None:
            return 0.0
        return max(0.0, time.perf_counter() - self.start) if self.seconds is None else self.seconds


def identity(job: Prepared, run: UnderWay) -> dict[str, Any]:
    """Whose report it is and what its files are called; nothing here can fail."""
    saved = attempt("what a rollout saved could not be listed", run.output.saved)[0] if run.output else None
    folders = [target.name for target in run.output.frame_folders] if run.output else []
    return {
        "prompt_id": run.place.prompt_id if run.place else None,
        "node_id": run.place.node_id if run.place else None,
        "videos": [target.name for target in run.output.videos] if run.output else [],
        **({"frame_folders": folders} if folders else {}),
        "state": (saved or {}).get("state"),
        "length": 0 if job.request.endless else job.space.pictures(job.latent_length),
        "width": job.request.width,
        "height": job.request.height,
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
        "video_fps": fps,
        "seconds": round(seconds, 3),
        "seconds_all": round(job.seconds_since_begin(), 3),
        "seconds_per_chunk": round(sorted(times)[len(times) // 2], 4) if times else 0.0,
        "fps": round(frames / seconds, 2) if seconds else 0.0,
        "speed": round(frames / fps / seconds, 3) if seconds else 0.0,
        "files": [target.path.name for target in output.videos] if output else [],
        **({"autosave": output.autosave()} if output and output.states else {}),
        **({"history": output.states.history.kept} if output and output.states and output.states.history else {}),
    }


def not_made(job: Prepared) -> dict[str, str]:
    """Why outputs are not to be made of a run, by their names, a sentence each."""
    found = {name: UNLINKED.format(name) for name in sorted(ON_DEMAND - job.request.linked)}
    return found | {"LATENT": job.no_latent} if job.no_latent else found


def planned(job: Prepared) -> dict[str, Any]:
    """What is known before the first chunk: planned bytes, settings, prompts."""
    return {
        "plan_bytes": job.plan.bytes(),
        "kv_bytes_planned": job.plan.kv_bytes,
        "memory_planned": job.memory,
        **({"kv_bytes_without_absorption": job.plan.plain.kv_bytes} if job.spec.absorption else {}),
        "settings": job.settings
        | {"seed": job.request.seed, "anchor": job.spec.anchor.describe(), "sigmas": list(job.schedule.sigmas)}
        | {"sampler": job.schedule.sampler}
        | {"cache_dtype": job.spec.cache_dtype, "cache_device": job.spec.cache_device}
        | ({"first_sigmas": list(job.schedule.first_sigmas)} if job.schedule.first_sigmas else {})
        | ({"preset": job.resolved.preset.name} if job.resolved.preset else {})
        | ({"history": job.spec.history, "audio": job.sound.alignment} if job.sound else {})
        | ({"ending": job.spec.ending} if job.spec.blocks > 1 else {})
        | job.start_told,
        "prompts": _prompts(job),
        **({"decoder": job.decoder.describe(), "decoder_way": job.decoder.described_way} if job.decoder else {}),
        **({"enlarged": _enlarged(job)} if job.enlarger else {}),
    }


def _enlarged(job: Prepared) -> dict[str, Any]:
    """What the files are of a stream that is enlarged, at the length that was asked for, and by which models."""
    upscaler, interpolator = job.enlarging_models
    models = {"upscale_model": upscaler or None, "interp_model": interpolator or None}
    pictures = None if job.request.endless else job.space.pictures(job.latent_length)
    return job.form.said(pictures) | models


def used(job: Prepared, rollout: Rollout, state: RolloutState | None) -> dict[str, Any]:
    """What a run took: bytes, and where its absorption stands."""
    absorption, (kv, host_kv) = _absorption(job, rollout), rollout.past.peak_nbytes
    return {
        "kv_bytes_used": kv,
        "host_kv_bytes_used": host_kv,
        "text_kv_bytes_used": rollout.cache.text_nbytes,
        "memory_peak": peak_report(rollout, job.model.peak_bytes()),
        "blocks": _blocks(job),
        "state_bytes": None if state is None else state.nbytes,
        **({"absorption": absorption} if absorption else {}),
    }


def _blocks(job: Prepared) -> dict[str, Any]:
    """Which way the model's blocks went: through compiled functions, or plain and why."""
    blocks = job.model.fused_blocks
    return {
        "way": blocks.way,
        "compiled": len(blocks.compiled_layers),
        "of": job.spec.geometry.layers,
        "why_plain": list(blocks.why),
    }


def _prompts(job: Prepared) -> list[dict[str, Any]]:
    """Where the prompt changes: the latent frame, the text if it is known, and how."""
    if job.prompts is None:
        return []
    pairs = zip(job.request.positive.worded, job.prompts.changes, strict=True)
    return [
        {"seconds": entry.seconds, "latent_frame": change.frame, "text": entry.text, "transition": change.transition}
        for entry, change in pairs
    ]


def _absorption(job: Prepared, rollout: Rollout) -> dict[str, Any] | None:
    """The absorber's report, with a warning for what may surprise."""
    if rollout.absorber is None:
        return None
    report = rollout.absorber.report()
    if rollout.absorber.ends.never:
        job.warnings.append(f"nothing was absorbed: {report['switch']['why']}")
    elif report["phase"] == "nothing to absorb" and job.spec.absorption.layers(job.spec.geometry.layers):
        job.warnings.append(
            "nothing was absorbed: within the warm-up no layer held more than the sink and the local window; give a larger "
            "window_frames or warmup_frames, or a smaller local_window_frames"
        )
    job.warnings.extend(afterwards(job.spec, report))
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
    if run.steering is not None:
        parts.append(run.steering.report)
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
            elif not own and _holds(
                target.path, data
            ):  # interrupted when it had its name: the next one takes its place
                self.written.append(target)
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
        form, prefix = self.output.job.form, self.output.settings.prefixes[0]
        suffixes = [f"{ending.rpartition('.')[0]}{REPORT_SUFFIX}" for ending in self.output.endings]
        return new_files(prefix, suffixes, form.width, form.height)


def _holds(path: Path, data: bytes) -> bool:
    with contextlib.suppress(OSError):
        return path.read_bytes() == data
    return False


def _beside(video: Path) -> Path:
    return video.with_suffix(REPORT_SUFFIX)


def write_short(job: Prepared, run: UnderWay, error: BaseException) -> None:
    """Leave the report of a run that `error` ended; whatever goes wrong with that is logged, and `error` is what is told."""
    if run.reports is None:
        return
    with contextlib.suppress(BaseException):
        for sentence in run.reports.write(short_report(job, run, error)):
            log.warning("%s", sentence)
