"""The files of a streamed rollout: videos that grow, and the state that is saved beside them."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import torch

from ..adastate_core.rollout import Chunk, Rollout, RolloutState
from ..adastate_core.states.kept_states import StateHistory, history_folder
from ..adastate_core.states.state_file import save_state
from ..adastate_core.video.decoded_stream import VideoStream
from ..adastate_core.video.sink import VideoSink
from .host import model as host_model
from .host.output_files import STATE_SUFFIX, NewVideos, Target, output_file, video_endings
from .host.progress import Progress, check_interrupt
from .host.safely import at_the_end, attempt, free_memory
from .preflight import Prepared
from .stream_settings import StreamSettings

RUN_ID = "adastate_run"
FRAMES_A_STEP = 256  # copied frames that count as much as a pass
Made = TypeVar("Made")


@dataclass(frozen=True)
class _Due:
    """A state that waits for its video to be whole, and what for."""

    state: RolloutState = field(repr=False)
    autosave: bool
    keep: bool


@dataclass
class _Failures:
    """How often something about the states failed, and why the last time."""

    count: int
    reason: str


class _Copied:
    """Progress over frames that are copied; every one of them lets an interrupt through."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._frames = progress, 0

    def frame(self) -> None:
        self._frames += 1
        if self._frames % FRAMES_A_STEP:
            check_interrupt()
        else:
            self._progress.step()


class StreamOutput:
    """The files of a streamed run: a video an item, and the state that is saved beside the first."""

    def __init__(self, job: Prepared, settings: StreamSettings) -> None:
        """ValueError if the videos that are to be joined are not there; nothing is written before `open`."""
        self.job, self.settings = job, settings
        request, self.run_id = job.request, uuid.uuid4().hex
        joins = settings.join and request.resume is not None
        self._sources = self._joined() if joins else [(None, 0)] * request.batch_size
        self.files: NewVideos | None = None
        self.stream: VideoStream | None = None
        self.history: StateHistory | None = None
        self._unfinished: list[str] = []
        self._failed: dict[str, _Failures] = {}
        self._due: _Due | None = None

    def steps(self) -> int:
        """Steps of progress that `open` takes: one for each latent frame that is decoded again, and for FRAMES_A_STEP copied."""
        resume, copied = self.job.request.resume, sum(frames for _, frames in self._sources)
        again = 0 if resume is None else resume.emitted - self._decoded_from(resume)
        return again + copied // FRAMES_A_STEP

    def open(self, progress: Progress) -> None:
        """Bring the decoder to where the state ends, then make the files, the old frames in front. It can be interrupted
        between two frames, and leaves no file if it is."""
        request, prefix = self.job.request, self.settings.filename_prefix
        before = 0 if request.resume is None else self._restore(request.resume, progress)
        self.files = NewVideos(prefix, video_endings(request.batch_size), request.width, request.height)
        sinks: list[VideoSink] = []
        try:
            copied = _Copied(progress)
            for path, (source, frames) in zip(self.files.paths, self._sources, strict=True):
                sinks.append(self._sink(path, source, frames, copied.frame))
        except BaseException:
            for sink in sinks:
                with contextlib.suppress(Exception):
                    sink.stop()
            self.files.remove()
            raise
        self.stream = VideoStream(self.job.decoder, sinks, frames_before=before)
        self._saved = time.monotonic()

    @property
    def targets(self) -> list[Target]:
        """The videos; none before the first chunk is in them, since another server may still take their number."""
        return self.files.targets if self.files is not None and self.files.named else []

    def _name(self) -> None:
        """Give the files their names, once something is in them. OSError if the folder does not take them."""
        if not self.files.named:
            self.files.name()
        for sink, target in zip(self.stream.sinks, self.targets, strict=True):
            sink.path = target.path
        self.stream.names = [target.name for target in self.targets]
        every = self.settings.history_chunks
        if every and self.history is None:
            self.history = StateHistory(history_folder(self.state_path), every, self.settings.history_states)

    def _restore(self, resume: RolloutState, progress: Progress) -> int:
        """Take the decoder's cache from the state, or rebuild it from the newest latents that it keeps; frames so far."""
        decoder, first = self.job.decoder, self._decoded_from(resume)
        if first == resume.emitted:
            if "vae_latents_seen" in resume.stream:
                decoder.restore(resume.stream)
            return self.job.space.pictures(resume.emitted)
        decoder.skip(first)
        for frame in range(first, resume.emitted):
            progress.step()
            decoder.step(host_model.to_vae_space(self.job.request.model, resume.latents[:, :, frame : frame + 1]))
        return self.job.space.pictures(resume.emitted)

    def _decoded_from(self, resume: RolloutState) -> int:
        """The first latent frame of a state that is decoded again, its length if its decoder's cache is taken as it is.

        A decoder looks back over so many frames and no further: those before change no bit of what comes."""
        decoder = self.job.decoder
        if resume.latents is None or ("vae_latents_seen" in resume.stream and not decoder.foreign(resume.stream)):
            return resume.emitted
        reach = decoder.reach
        return 0 if reach is None else max(0, resume.emitted - reach)

    def _sink(self, path: Path, source: Path | None, frames: int, copied: Callable[[], None]) -> VideoSink:
        request = self.job.request
        return VideoSink(
            path,
            request.width,
            request.height,
            Fraction(self.settings.fps).limit_denominator(1001),
            codec=self.settings.codec,
            quality=self.settings.quality,
            metadata=request.metadata | {RUN_ID: self.run_id},
            prefix=source,
            prefix_frames=frames,
            on_copied=copied,
        )

    def _joined(self) -> list[tuple[Path, int]]:
        """Each item's old file and how many of its frames the state stands for; ValueError if it is not the state's."""
        stream = self.job.request.resume.stream
        files, frames = stream.get("files", []), stream.get("file_frames", [])
        if len(files) != self.job.request.batch_size or len(frames) != len(files):
            raise ValueError("join is on, but the state names no video to join to; turn join off")
        sources = []
        for name, count in zip(files, frames, strict=True):
            path = output_file(str(name))
            if not path.is_file() or run_id_of(path) != stream.get("run_id"):
                raise ValueError(
                    f"join is on, but {name} in the output folder is missing or is not the video that the state belongs to; "
                    "put it back, or turn join off to write the new frames alone"
                )
            sources.append((path, int(count)))
        return sources

    @property
    def videos(self) -> list[Target]:
        """The files, once there is a frame in them."""
        return self.targets if self.stream is not None and self.stream.frames else []

    @property
    def state_path(self) -> Path:
        return self.targets[0].path.with_suffix(STATE_SUFFIX)

    def step(self, chunk: Chunk, rollout: Rollout) -> torch.Tensor:
        """Decode and write a chunk; saves the state when it is due, for a resume or to keep it.

        A growing file keeps its newest frame back until the next one comes, so a state is taken after one chunk and
        written after the next: what it calls written then survives a kill.
        """
        try:
            pictures = self.stream.step(host_model.to_vae_space(self.job.request.model, chunk.latents))
        except BaseException:
            rollout.put_back(chunk.latents)
            raise
        self._name()
        self._write_due()
        self._take_due(rollout)
        return pictures

    def _take_due(self, rollout: Rollout) -> None:
        """Take the state that is due; one that cannot be taken is left for the next time, and the video goes on."""
        every = self.settings.autosave_seconds
        autosave = every > 0 and time.monotonic() - self._saved >= every
        keep = self.history is not None and self.history.wants(rollout.generated)
        if not autosave and not keep:
            return
        state = self._try(lambda: rollout.snapshot(self.snapshot()), "on the way")
        if state is not None:
            self._due = _Due(state, autosave, keep)
        elif autosave:
            self._saved = time.monotonic()

    def _write_due(self, autosave: bool = True) -> None:
        due, self._due = self._due, None
        if due is None:
            return
        if due.keep:
            self._try(self._synced(lambda: self.history.keep(due.state)), "into its history")
        if due.autosave and autosave:
            self._write(lambda: due.state)

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps of these files."""
        return self.stream.snapshot() | {"run_id": self.run_id}

    def finish(self, rollout: Rollout, whole: bool) -> None:
        """Finish the files; after an early end, or where states were saved on the way, save the last one.

        A run that wrote nothing leaves nothing. What could not be done is in `warnings`; only an interrupt is raised, and
        not while another failure is under way.
        """
        with at_the_end("the end of a stream"):
            if self.stream.frames:
                attempt("the videos could not be named", self._name)
            try:
                self._unfinished += self.stream.close()
            finally:
                attempt("the end of a stream", lambda: self._save_last(rollout, whole))

    def _save_last(self, rollout: Rollout, whole: bool) -> None:
        if not self.stream.frames or not self.targets:
            self.files.remove()
            return
        self.files.forget()
        self._write_due(autosave=False)
        if self.history is not None:
            self.history.tidy()
        if not whole or self.history is not None or self.state_path.exists():
            free_memory()
            self._write(lambda: rollout.snapshot(self.snapshot()), again=True)

    @property
    def warnings(self) -> list[str]:
        """Sentences about what of the files and states could not be done, without the run having ended for it."""
        video, left = self.targets[0].name if self.targets else "", self.history.left if self.history else []
        return [
            *self._unfinished,
            *(f"{path.parent.name}/{path.name} could not be removed: another program may hold it" for path in left[:1]),
            *(
                f"{'a state' if failed.count == 1 else f'{failed.count} states'} of {video} could not be saved {where} "
                f"({failed.reason}); the video lost no frame by it"
                for where, failed in self._failed.items()
            ),
        ]

    def saved(self) -> dict[str, Any]:
        """JSON-able: the last state's name as Load Rollout State lists it, or None, and after which chunks others are kept."""
        if not self.videos:
            return {"state": None, "kept": []}
        name = self.targets[0].name.removesuffix(".mp4") + STATE_SUFFIX
        kept = self.history.kept if self.history is not None else []
        return {"state": f"{name} [output]" if self.state_path.is_file() else None, "kept": kept}

    def _write(self, state: Callable[[], RolloutState], again: bool = False) -> None:
        """Write `<video>.state.safetensors`; the next one is due as long after one that failed."""
        save = self._synced(lambda: save_state(state(), self.state_path))
        self._try(save, f"beside it as {self.state_path.name}", again)
        self._saved = time.monotonic()

    def _synced(self, write: Callable[[], Made]) -> Callable[[], Made]:
        """`write`, once the disk holds the frames that its state counts."""

        def written() -> Made:
            self.stream.sync()
            return write()

        return written

    def _try(self, make: Callable[[], Made], where: str, again: bool = False) -> Made | None:
        """What `make` gives; a failure is logged and counted, never raised, so that the video goes on, and None."""
        made, reason = attempt(f"a state of {self.targets[0].name} could not be saved {where}", make, again)
        if reason:
            self._failed[where] = _Failures(self._failed.get(where, _Failures(0, "")).count + 1, reason)
        return made


def run_id_of(path: Path) -> str | None:
    """The id that a stream gave its file, or None for a file that is not one of ours or cannot be read."""
    try:
        with av.open(str(path)) as container:
            return container.metadata.get(RUN_ID)
    except (av.error.FFmpegError, OSError):
        return None
