"""What a streamed run writes, one part after the other: a video, folders of frames; each with its files and its sinks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av

from ..adastate_core.audio.placed import PlacedSound
from ..adastate_core.states.disk_room import Growing, size_of
from ..adastate_core.video.encoder import CODECS
from ..adastate_core.video.frame_folder import FrameFolder, FrameSequence, missing_frame, read_sequence
from ..adastate_core.video.frame_formats import FRAME_FORMATS
from ..adastate_core.video.frames import opened_alone
from ..adastate_core.video.sink import VideoSink
from ..adastate_core.video.sound_track import EarlierSound
from .builder import Request
from .enlarged_stream import FileForm
from .host.frame_folders import NewFolders
from .host.names import FRAMES_SUFFIX
from .host.output_files import NewVideos, Target, output_file, video_endings
from .stream_settings import FrameSettings, StreamSettings

RUN_ID = "adastate_run"


class _Files:
    """What parts have in common."""

    def __init__(self, request: Request, endings: list[str], form: FileForm) -> None:
        self.request, self.endings, self.form = request, endings, form
        self.files: Any = None
        # what may surprise about it, a sentence each
        self.told: list[str] = []
        self.sinks: list[Any] = []
        # files that have taken over and do not have the names yet (take_back.py)
        self.fresh: Any = None

    @property
    def targets(self) -> list[Target]:
        """The files; none before they have their names, since another server may still take their number."""
        return self.files.targets if self.files is not None and self.files.named else []

    @property
    def room(self) -> int | None:
        """Bytes that each of the files may still grow by, where their format sets a bound."""
        return None

    def name(self) -> None:
        """Give the files their names, once something is in them. OSError if the folder does not take them."""
        if not self.files.named:
            self.files.name()
        if self.fresh is None:
            for sink, target in zip(self.sinks, self.targets, strict=True):
                sink.path = target.path

    def place(self, last: bool) -> None:
        """Give those that have taken over the names, if that can be done by now. `last`: nothing more will be in them; OSError if
        it cannot be done."""
        if self.fresh is not None and self.fresh.place(last):
            self.fresh = None

    def _open(self, make: Callable[[int, Path], Any]) -> None:
        try:
            for item, path in enumerate(self.files.paths):
                self.sinks.append(make(item, path))
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """End and remove what there is of it."""
        for sink in self.sinks:
            with contextlib.suppress(Exception):
                sink.stop()
        if self.files is not None:
            self.files.remove()


class VideoPart(_Files):
    """A video an item. ValueError if those that are to be joined are not there."""

    def __init__(self, request: Request, settings: StreamSettings, form: FileForm, first: int) -> None:
        """`first`: the place, among the video's file frames, of the first one that this run makes."""
        super().__init__(request, video_endings(request.batch_size, CODECS[settings.codec].suffix), form)
        self.settings, self._first = settings, first
        self._sources = self._joined() if settings.join else [(None, 0)] * request.batch_size
        for source, _ in self._sources:
            self.told += self._of_sound(source) if source else []

    @property
    def copied(self) -> int:
        return sum(frames for _, frames in self._sources)

    def open(self, run_id: str, copied: Callable[[], None]) -> None:
        request, settings, form = self.request, self.settings, self.form
        self.files = NewVideos(settings.filename_prefix, self.endings, form.width, form.height)

        def sink(item: int, path: Path) -> VideoSink:
            source, frames = self._sources[item]
            return VideoSink(
                path,
                form.width,
                form.height,
                form.rate,
                codec=settings.codec,
                quality=settings.quality,
                metadata=request.metadata | {RUN_ID: run_id},
                prefix=source,
                prefix_frames=frames,
                on_copied=copied,
                sound=sound_from(settings, self._first - frames, form),
            )

        self._open(sink)

    def _of_sound(self, source: Path) -> list[str]:
        """What becomes of the sound of an old file that is joined to, where it does not simply go on."""
        earlier = EarlierSound(source)
        if not earlier.told:
            return []
        if self.settings.sound is None:
            return [
                f"{source.name} carries sound and this run has none: it is kept as far as the old frames go; connect audio to go "
                "on with sound"
            ]
        if earlier.form is None:
            return [
                f"the sound of {source.name} ({earlier.told}) cannot be gone on with, so the file carries the given sound from its "
                "beginning"
            ]
        return []

    def _joined(self) -> list[tuple[Path | None, int]]:
        """Each item's old file and how many of its frames the state stands for; ValueError if it is not the state's."""
        resume, batch = self.request.resume, self.request.batch_size
        if resume is None or not resume.emitted:  # there is nothing to put in front
            return [(None, 0)] * batch
        files, frames = resume.stream.get("files", []), resume.stream.get("file_frames", [])
        if len(files) != batch or len(frames) != len(files):
            raise ValueError("join is on, but the state names no video to join to; turn join off")
        sources = []
        for name, count in zip(files, frames, strict=True):
            path = output_file(str(name))
            if not path.is_file() or run_id_of(path) != resume.stream.get("run_id"):
                raise ValueError(
                    f"join is on, but {name} in the output folder is missing or is not the video that the state belongs to; "
                    "put it back, or turn join off to write the new frames alone"
                )
            sources.append((path, int(count)))
        return sources

    def needs(self, ahead: int) -> Iterator[Growing]:
        picture = self.form.width * self.form.height * 3 // 2
        for sink, (_, joined) in zip(self.sinks, self._sources, strict=True):
            yield Growing(size_of(sink.path), sink.frames, max(0, joined + ahead - sink.frames), picture)


class FramesPart(_Files):
    """A folder of frames an item. ValueError if those that are to be joined are not there."""

    def __init__(
        self, request: Request, stream: StreamSettings, settings: FrameSettings, form: FileForm, first: int
    ) -> None:
        """`first`: the place, among the video's file frames, of the first one that this run makes."""
        super().__init__(request, video_endings(request.batch_size, FRAMES_SUFFIX), form)
        self._stream, self.settings, self._first = stream, settings, first
        joins = settings.join and first
        self._sources = self._joined() if joins else [(None, self._first)] * request.batch_size

    @property
    def copied(self) -> int:
        return sum(self._first - begin for _, begin in self._sources)

    @property
    def room(self) -> int | None:
        rooms = [sink.room for sink in self.sinks]
        return None if None in rooms else min(rooms)

    def _sequence(self, run_id: str, first_frame: int) -> FrameSequence:
        form = self.form
        return FrameSequence(run_id, self.settings.format, form.width, form.height, str(form.rate), first_frame)

    def open(self, run_id: str, copied: Callable[[], None]) -> None:
        request = self.request
        self.files = NewFolders(self.settings.filename_prefix, self.endings, self.form.width, self.form.height)

        def sink(item: int, path: Path) -> FrameFolder:
            source, begin = self._sources[item]
            sound, about = sound_from(self._stream, begin, self.form), self._sequence(run_id, begin)
            return FrameFolder(path, about, request.metadata, source, self._first, copied, sound)

        self._open(sink)

    def _joined(self) -> list[tuple[Path | None, int]]:
        """Each item's old folder and its first frame; ValueError if it is not the state's, or of other frames."""
        stream, wanted, sources = self.request.resume.stream, self._sequence("", 0), []
        found = [(str(name), output_file(str(name))) for name in stream.get("frame_folders", [])]
        told = [(name, path, read_sequence(path)) for name, path in found]
        fitting = [one for one in told if one[2] is None or not one[2].refused(wanted)]
        if told and not fitting:
            name, _, about = told[0]
            raise ValueError(
                f"{name} cannot be joined to: {about.refused(wanted)}, or turn join of Stream To Frames off"
            )
        if not told:
            raise ValueError("join is on, but the state names no frames to join to; turn join of Stream To Frames off")
        for name, path, about in fitting:
            if about is None or about.run_id != stream.get("run_id"):
                raise ValueError(
                    f"join is on, but {name} in the output folder is missing or holds frames of another run than the state's; put "
                    "it back, or turn join of Stream To Frames off to write the new frames alone"
                )
            if missing := missing_frame(path, about, self._first):
                raise ValueError(f"{missing} of {name} is missing; put it back, or turn join of Stream To Frames off")
            sources.append((path, about.first_frame))
        return sources[: self.request.batch_size]

    def needs(self, ahead: int) -> Iterator[Growing]:
        picture = self.form.width * self.form.height * 3 * FRAME_FORMATS[self.settings.format].value_bytes
        for sink, (_, begin) in zip(self.sinks, self._sources, strict=True):
            own = sink.frames - (self._first - begin)
            yield Growing(sink.nbytes, own, max(0, ahead - own), picture, rewritten=False)


def parts_of(request: Request, settings: StreamSettings, first: int) -> list[VideoPart | FramesPart]:
    """What a run with these settings writes, from the video's file frame `first` on; the first one's name is that of its states and
    its report."""
    form = settings.form(request.width, request.height)
    video = [VideoPart(request, settings, form, first)] if settings.video else []
    return [*video, *(FramesPart(request, settings, frames, form, first) for frames in settings.frames)]


def sound_from(settings: StreamSettings, frame: int, form: FileForm) -> PlacedSound | None:
    """The sound of a file whose first frame is the video's file frame `frame`."""
    if settings.sound is None:
        return None
    return PlacedSound.at(settings.sound, settings.sound_offset, frame, form.rate)


def run_id_of(path: Path) -> str | None:
    """The id that a stream gave its file, or None for a file that is not one of ours or cannot be read."""
    try:
        with opened_alone(path) as container:
            # Matroska writes names in capitals
            return next((value for name, value in container.metadata.items() if name.lower() == RUN_ID), None)
    except (av.error.FFmpegError, OSError, UnicodeError):
        return None
