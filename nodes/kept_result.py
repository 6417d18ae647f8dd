"""A rollout that runs again only because another of its outputs is linked now: it goes on from what is kept of the first time.

A state at the video's end has every output in it, so nothing is rolled out. From an earlier one, of the history or of a run that
was stopped, the rest is made and joined to the video. Both give the bits of a run from the start.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adastate_core.rollout import RolloutState
from ..adastate_core.states.kept_states import history_folder, kept_states
from ..adastate_core.states.state_file import load_state
from ..adastate_core.video.frame_folder import read_sequence
from .builder import Request
from .host import model as host_model
from .host.live_runs import LiveRun
from .host.output_files import STATE_SUFFIX, Target, target_of
from .job import Job, Result
from .report import REPORT_SUFFIX, WHOLE, not_made, planned
from .stream_parts import run_id_of

log = logging.getLogger("adastate")


def run(request: Request, files: Sequence[Path], view: LiveRun) -> Result:
    """What the request asks for; `files` are the videos that the same request made before, the folders where it made frames alone,
    or none. A video without an end is as long as it was when it was stopped."""
    if request.endless and (frames := _frames_of(files)):
        request = replace(request, length=frames, ends_open=True, keep_latents=False)
    job = Job(request)
    state = next(_states_of(job, files), None)
    if state is None:
        return job.run(view)
    if state.emitted >= job.latent_length:
        return _taken(job, state, list(map(target_of, files)), view)
    return _going_on(job, state).run(view)


def _going_on(job: Job, state: RolloutState) -> Job:
    """The same job from `state` on; as it is where that cannot be gone on from: the videos are not those that it names."""
    with contextlib.suppress(ValueError):
        stream = job.request.stream.joined()
        job = Job(replace(job.request, resume=state, start_latent=None, reference=None, stream=stream))
        frames = job.space.pictures(state.emitted)
        job.warnings.append(
            f"more outputs are linked than before, so this run went on from the state kept after {frames} frames"
        )
    return job


def _report_at(path: Path) -> dict[str, Any]:
    """OSError or ValueError where none can be read."""
    try:
        told = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(told, dict):
        raise ValueError("no table")
    return told


def _frames_of(files: Sequence[Path]) -> int:
    """How many frames a run's videos have in all, as the report beside the first of them says; 0 where none does."""
    with contextlib.suppress(OSError, ValueError):
        for path in files[:1]:
            frames = _report_at(path.with_suffix(REPORT_SUFFIX)).get("frames_total")
            return frames if type(frames) is int and frames > 0 else 0
    return 0


def _states_of(job: Job, files: Sequence[Path]) -> Iterator[RolloutState]:
    """The states beside the first of these files that are theirs and have all that is to be made of them, newest first."""
    request, ids = job.request, {_run_id_of(path) for path in files}
    if request.stream is None or len(ids) != 1 or None in ids or len(files) % request.batch_size:
        return
    for path in _states_beside(files[0]):
        try:
            state = load_state(path)
        except (OSError, ValueError) as error:
            log.warning("%s is passed over: %s", path.name, error)
            continue
        lacks = "LATENT" in request.linked and not job.no_latent and state.latents is None
        if state.stream.get("run_id") in ids and not job.spec.differences(state.spec) and not lacks:
            yield state


def _run_id_of(path: Path) -> str | None:
    """Of a video or a folder of frames; None where it does not say."""
    if not path.is_dir():
        return run_id_of(path)
    told = read_sequence(path)
    return None if told is None else told.run_id


def _states_beside(video: Path) -> Iterator[Path]:
    """Newest first."""
    end = video.with_suffix(STATE_SUFFIX)
    if end.is_file():
        yield end
    yield from reversed(kept_states(history_folder(end)).values())


def _taken(job: Job, state: RolloutState, files: list[Target], view: LiveRun) -> Result:
    """The outputs of a rollout that is whole, without rolling it out: from its files and the state at their end."""
    request, report, reports = job.request, {}, []
    why_not = not_made(job)
    for file in files[: request.batch_size]:  # the first folders lend their names where there are more
        beside = replace(file, path=file.path.with_suffix(REPORT_SUFFIX))
        with contextlib.suppress(OSError, ValueError):
            report = report or _report_at(beside.path)
            reports.append(beside)
    videos, folders = (files, []) if request.stream.video else ([], files)
    if not report:
        names = [video.name for video in videos]
        report = {"ended": WHOLE, "error": None, "videos": names, "length": request.length} | planned(job)
    report |= {"prompt_id": view.place and view.place.prompt_id, "node_id": view.place and view.place.node_id}
    report["state_bytes"] = state.nbytes if "STATE" in request.linked else None
    report.pop("not_made", None)
    report |= {"not_made": why_not} if why_not else {}
    took = (
        "more outputs are linked than before: they were taken from the state kept with {}, and nothing was made again"
    )
    before = report.get("warnings")
    report["warnings"] = [*(before if isinstance(before, list) else []), took.format(files[0].name)]
    latents = None if "LATENT" in why_not else host_model.to_vae_space(request.model, state.latents)
    return Result(latents, state if "STATE" in request.linked else None, report, videos, why_not, reports, folders)
