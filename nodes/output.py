"""The files of a streamed rollout: videos that grow, and the state that is saved beside them."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..adastate_core.rollout import Chunk, Rollout, RolloutState
from ..adastate_core.states.disk_room import free_bytes, shown_bytes, video_needs
from ..adastate_core.states.state_file import load_state
from ..adastate_core.video.animation import MOST_BYTES
from ..adastate_core.video.decoded_stream import VideoStream
from ..adastate_core.video.enlarging import FilePictures
from ..adastate_core.video.page_locked import Landed
from ..adastate_core.video.sink_group import SinkGroup
from .endless import chunks_ahead, kept_room
from .enlarged_stream import holds_frame, kept_of
from .host import model as host_model
from .host.output_files import Target
from .host.progress import Progress, check_interrupt
from .host.safely import at_the_end, attempt
from .preflight import Prepared
from .saved_states import SavedStates
from .stream_parts import FramesPart, VideoPart, parts_of
from .stream_settings import StreamSettings
from .take_back import again

FRAMES_A_STEP = 256  # copied frames that count as much as a pass


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
    """The files of a streamed run: a video an item, folders of frames, or both, and the state that is saved beside the first."""

    def __init__(self, job: Prepared, settings: StreamSettings) -> None:
        """ValueError if the files that are to be joined are not there; nothing is written before `open`."""
        self.job, self.settings = job, settings
        request, self.run_id = job.request, uuid.uuid4().hex
        before = 0 if request.resume is None else job.space.pictures(request.resume.emitted)
        self._parts = parts_of(request, settings, job.form.first(before, job.looks_back))
        job.warnings += [told for part in self._parts for told in part.told]
        self._enlarged = FilePictures(job.enlarger) if job.enlarger is not None else None
        self.stream: VideoStream | None = None
        self.states: SavedStates | None = None
        # the latents of the newest chunks, at least of all that are not written yet
        self._under_way: deque[torch.Tensor] = deque()
        self._unfinished: list[str] = []
        self._decoded = 0 if request.resume is None else request.resume.emitted  # latents since frame 0
        self.full_note = ""

    def steps(self) -> int:
        """Steps of progress beside the rollout's: one for each latent frame that is decoded again, for FRAMES_A_STEP copied, and
        for each picture that is enlarged."""
        job, copied = self.job, sum(part.copied for part in self._parts)
        resume, done = job.request.resume, copied // FRAMES_A_STEP
        if resume is not None:
            done += resume.emitted - job.decoded_from(resume)
        if job.enlarger is not None and not job.request.endless:
            before = 0 if resume is None else job.space.pictures(resume.emitted)
            pictures = job.space.pictures(job.latent_length) - before
            done += job.request.batch_size * (pictures + (job.looks_back and job.form.multiplier > 1))
        return done

    def steps_left(self, latents: int, until: int) -> int:
        """Those of latent frames `latents` to `until`, once the files are open."""
        if self._enlarged is None:
            return 0
        pictures = self.job.space.pictures(until) - self.job.space.pictures(latents)
        return self.job.request.batch_size * (pictures + self._enlarged.begins_again)

    def open(self, progress: Progress) -> None:
        """Bring the decoder to where the state ends, then make the files, the old frames in front. It can be interrupted
        between two frames, and leaves no file if it is."""
        request = self.job.request
        if self.job.enlarger is not None:
            self.job.enlarger.told = progress.step
        before = 0 if request.resume is None else self._restore(request.resume, progress)
        if request.resume is None or not request.resume.emitted:
            self._warm()
        copied = _Copied(progress)
        try:
            for part in self._parts:
                part.open(self.run_id, copied.frame)
        except BaseException:
            for part in self._parts:
                part.abandon()
            raise
        self.stream = VideoStream(
            self.job.decoder,
            self._sinks(),
            frames_before=before,
            most=self.job.chunk_bytes,
            enlarged=self._enlarged,
        )
        self.states = SavedStates(self.settings, lambda: self.stream.sync(), self._needed)

    def _sinks(self) -> list[Any]:
        """One an item."""
        items = zip(*(part.sinks for part in self._parts), strict=True)
        return [one[0] if len(one) == 1 else SinkGroup(one) for one in items]

    def go_back(self, rollout: Rollout, chunk: int, copied: Callable[[], None]) -> RolloutState:
        """Between two chunks: go on from the kept state after `chunk` chunks, which is returned, and so do the files. Whenever the
        process is killed, there are files that play and a state that fits them. If it fails, all goes on as it was."""
        self.settle(rollout)
        self.states.rest()
        state, mark = load_state(self.states.history.at(chunk)), self.stream.mark()
        first = self.job.form.first(self.job.space.pictures(state.emitted), holds_frame(state.stream))
        fresh = again(self._parts, state, first, copied)
        undo: Callable[[], None] = lambda: None  # noqa: E731
        try:
            undo = rollout.go_back(state)
            self.stream.go_back(state.stream)
            self.states.go_back(state)
            fresh.take_over()
        except BaseException:
            fresh.discard()
            self.stream.rewind(mark)
            undo()
            raise
        self._took_over(state)
        self.job.renewal.join(rollout, state)
        return state

    def _took_over(self, state: RolloutState) -> None:
        before = self.stream
        before.leave()
        self._under_way.clear()
        self.states.forget_due()
        self._decoded = state.emitted
        self.stream = VideoStream(
            self.job.decoder,
            self._sinks(),
            before.names,
            before.frames_before,
            self.job.chunk_bytes,
            self._enlarged,
            before.own_frames(state.stream),
        )

    @property
    def targets(self) -> list[Target]:
        """What lends its name to the states and the report: the videos, or without any the first folders of frames. None before the
        first chunk is in them, since another server may still take their number."""
        return self._parts[0].targets

    @property
    def endings(self) -> list[str]:
        """What follows the number in these names."""
        return self._parts[0].endings

    def _name(self, last: bool = False) -> None:
        """Give the files their names, once something is in them. OSError if the folder does not take them."""
        for part in self._parts:
            part.name()
            part.place(last)
        self.stream.names = [target.name for target in self._targets_of(VideoPart)]
        self.states.named(self.targets[0])

    def _targets_of(self, kind: type) -> list[Target]:
        return [target for part in self._parts if isinstance(part, kind) for target in part.targets]

    def _restore(self, resume: RolloutState, progress: Progress) -> int:
        """Take the decoder's cache from the state, or rebuild it from the newest latents that it keeps; frames so far."""
        decoder, first, enlarged = self.job.decoder, self.job.decoded_from(resume), self._enlarged
        if enlarged:
            enlarged.restore(resume.stream)
        if first == resume.emitted:
            if "vae_latents_seen" in resume.stream and resume.emitted:
                decoder.restore(resume.stream)
            return self.job.space.pictures(resume.emitted)
        decoder.skip(first)
        if not first:
            self._warm()
        for frame in range(first, resume.emitted):
            progress.step()
            latent = host_model.to_vae_space(self.job.request.model, resume.latents[:, :, frame : frame + 1])
            pictures = decoder.step(latent)
        if enlarged:
            enlarged.begin_after(pictures)
        return self.job.space.pictures(resume.emitted)

    def _warm(self) -> None:
        """Before the video's first latent frame: let the decoder see what was there before."""
        if (still := self.job.still()) is not None:
            self.job.decoder.warm(still)

    @property
    def videos(self) -> list[Target]:
        """The video files, once there is a frame in them."""
        return self._targets_of(VideoPart) if self.stream is not None and self.stream.frames else []

    @property
    def frame_folders(self) -> list[Target]:
        """The folders of frames, once there is one in them."""
        return self._targets_of(FramesPart) if self.stream is not None and self.stream.frames else []

    def step(self, chunk: Chunk, rollout: Rollout) -> Landed:
        """Decode a chunk and have it written, beside the next one; saves the state when it is due, for a resume or to keep it.

        What writing an earlier chunk failed with is raised here, by `settle` or in `finish`. All latents that are in no file are
        then the rollout's again, as after a decode that fails.

        A growing file keeps its newest frame back until the next one comes, so a state is taken after one chunk and written after
        the next: what it calls written then survives a kill. Both are done with nothing under way: `states.take_due` is called for
        a state when all its chunks are written, and `states.write_due` when the chunk behind them is, too, so that a `sync` puts
        all frames that the waiting state counts on the disk.
        """
        self.job.renewal.watch(rollout)
        try:
            pictures = self.stream.step(host_model.to_vae_space(self.job.request.model, chunk.latents))
        except BaseException:
            rollout.put_back(chunk.latents)
            self._put_back(rollout)
            raise
        self._under_way.append(chunk.latents)
        self._decoded = rollout.emitted
        if not self.stream.frames or self.states.waits:  # a file gets its name once something is in it
            self.settle(rollout)
        self._name()
        self.states.write_due()
        last = rollout.emitted >= self.job.latent_length
        if not rollout.ends:
            self.states.take_due(
                rollout.generated, last, lambda: rollout.snapshot(self.snapshot()), lambda: self.settle(rollout)
            )
        while len(self._under_way) > self.stream.under_way:
            self._under_way.popleft()
        return pictures

    def _needed(self) -> int:
        """Bytes that the files still take of the disk; of a video without an end, those that it takes if it ends here."""
        job, before, form = self.job, self.stream.frames_before, self.job.form
        latents = self._decoded if job.request.endless else job.latent_length
        ahead = form.frames(job.space.pictures(latents)) - form.first(before, job.looks_back)
        needed = video_needs(growing for part in self._parts for growing in part.needs(ahead))
        return needed + kept_room(job) if job.request.endless else needed

    def full(self) -> str:
        """For what a video without an end has to end now, as the report's `stopped` says; `full_note` then is a sentence. Empty
        where its disk and its files have room for more than its end."""
        folders = {target.path.parent for part in self._parts for target in part.targets}
        free = [room for room in map(free_bytes, folders) if room is not None]
        needed = self._needed()
        if free and min(free) <= needed:
            self.full_note = (
                f"its disk has {shown_bytes(min(free))} left, of which {shown_bytes(needed)} are kept for finishing its files and "
                "saving its state (free some room on the disk)"
            )
            return "disk"
        rooms = [part.room for part in self._parts if part.room is not None]
        if rooms and min(rooms) <= chunks_ahead(self.job):
            self.full_note = f"an animated WebP may have {shown_bytes(MOST_BYTES)} and has no room for more chunks"
            return "file"
        return ""

    def settle(self, rollout: Rollout) -> None:
        """Wait until all chunks are written. What writing one failed with is raised, once, and the latents that are in no file are
        the rollout's again."""
        try:
            self.stream.drain()
        except BaseException:
            self._put_back(rollout)
            raise

    def _put_back(self, rollout: Rollout) -> None:
        """If writing has failed: what is not written is pending again, and the decoder stands before it."""
        for _ in range(self.stream.take_back()):
            rollout.put_back(self._under_way.pop())

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps of these files."""
        folders = [target.name for target in self._targets_of(FramesPart)]
        kept = self.stream.snapshot() | self.job.renewal.snapshot() | {"run_id": self.run_id}
        if self._enlarged:
            kept |= kept_of(self.job.form, self.job.enlarging_models)
        return kept | ({"frame_folders": folders} if folders else {})

    def settled(self, rollout: Rollout) -> dict[str, Any]:
        """The same once all chunks are written; what writing one failed with is raised."""
        self.settle(rollout)
        return self.snapshot()

    def finish(self, rollout: Rollout, whole: bool) -> None:
        """Write what is under way and finish the files; after an early end, or where somebody asked for it, save the last state.

        A run that wrote nothing leaves nothing. What could not be done is in `warnings`; only an interrupt is raised, and
        not while another failure is under way.
        """
        with at_the_end("the end of a stream"):
            try:
                self.settle(rollout)
            finally:
                self._close(rollout, whole)

    def _close(self, rollout: Rollout, whole: bool) -> None:
        if self.stream.frames:
            attempt("the videos could not be named", lambda: self._name(last=True))
        finished = False
        try:
            self._unfinished += self.stream.close()
            finished = not self._unfinished
        except BaseException:
            whole = False  # nothing is returned of a run that is interrupted here
            raise
        finally:
            self._put_back(rollout)  # if waiting was interrupted, writing may have failed since
            attempt("the end of a stream", lambda: self._save_last(rollout, whole, finished))

    def _save_last(self, rollout: Rollout, whole: bool, finished: bool) -> None:
        if not self.stream.frames or not self.targets:
            for part in self._parts:
                part.files.remove()
            return
        for part in self._parts:
            part.files.forget()
        self.states.save_last(whole, finished, lambda: rollout.snapshot(self.snapshot()))

    def let_go(self) -> None:
        """After everything else: nothing that takes memory stays alive for what is still asked of the files' names. A state that is
        still being written, since waiting for it was interrupted, is written to its end."""
        if self.states is not None and self.states.busy:
            return
        if self.stream is not None:
            self.stream.release()
        self.stream = self.states = self._enlarged = self.job = None
        self._under_way.clear()

    @property
    def warnings(self) -> list[str]:
        """Sentences about what of the files and states could not be done, without the run having ended for it."""
        return [*self._unfinished, *(self.states.warnings if self.states is not None else [])]

    def autosave(self) -> dict[str, Any]:
        """JSON-able: how far apart states are saved on the way, how many were, and what share of the time they took."""
        return self.states.spacing.describe() if self.states is not None else {}

    def saved(self) -> dict[str, Any]:
        """JSON-able: the last state's name as Load Rollout State lists it, or None, and after which chunks others are kept."""
        if not (self.videos or self.frame_folders):
            return {"state": None, "kept": []}
        return self.states.saved()
