"""A video as a folder of pictures, or as an animation in a folder: a sink that writes whole files only.

Every picture is a file of its own, `000000.png`, numbered by its place in the video, so that runs that go on from each other number
on. `sequence.json` says whose they are. An animation is named by its first picture. Sound lies beside them, as `sound.wav`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..audio.placed import PlacedSound
from ..files.whole_file import WholeFiles, not_written, sync_file, sync_folder, whole_file
from .animation import MOST_BYTES, GrowingAnimation
from .frame_formats import FRAME_FORMATS, PictureEncoder, text_blocks, with_text
from .sound_beside import SoundBeside

ABOUT = "sequence.json"


@dataclass(frozen=True)
class FrameSequence:
    """What is said of a folder of frames: the run that wrote it, what its files are, and its first frame's place in the video."""

    run_id: str
    format: str
    width: int
    height: int
    fps: str
    first_frame: int

    def refused(self, wanted: FrameSequence) -> str:
        """Why frames as `wanted` cannot be put behind these, or an empty string; whose they are is not asked."""
        for what, own, other in (
            ("format", self.format, wanted.format),
            ("size", f"{self.width}x{self.height}", f"{wanted.width}x{wanted.height}"),
            ("fps", f"{float(Fraction(self.fps)):g}", f"{float(Fraction(wanted.fps)):g}"),
        ):
            if own != other:
                return f"its {what} is {own} and the new frames' {other}; use the same {what}"
        return ""


def read_sequence(folder: Path) -> FrameSequence | None:
    """What a folder says of its frames; None where it says nothing, or what is no such thing."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError, ZeroDivisionError):
        values = json.loads((folder / ABOUT).read_bytes())
        found = FrameSequence(**{name: kind(values[name]) for name, kind in _KINDS.items()})
        if found.format in FRAME_FORMATS and Fraction(found.fps) > 0:
            return found
    return None


_KINDS: dict[str, Callable[[Any], Any]] = {
    "run_id": str, "format": str, "width": int, "height": int, "fps": str, "first_frame": int,
}  # fmt: skip


def frame_name(number: int, form: str) -> str:
    """The file of the video's frame `number`, counted from 0."""
    return f"{number:06}{FRAME_FORMATS[form].suffix}"


def missing_frame(folder: Path, sequence: FrameSequence, until: int) -> str:
    """The first of the files before the video's frame `until` that is not in a folder; an empty string if all are."""
    there = set(os.listdir(folder))
    last = sequence.first_frame + 1 if FRAME_FORMATS[sequence.format].animated else until
    wanted = (frame_name(number, sequence.format) for number in range(sequence.first_frame, last))
    return next((name for name in wanted if name not in there), "")


class FrameFolder:
    """A growing folder of frames; a sink as VideoSink is one. The folder is there, and empty.

    `sequence` says what is written. `joined` is a folder whose frames before `until` (counted in the video) are put in front:
    linked, or copied where the disk knows no links; `on_copied`, which may raise, is called after each. `metadata` goes into every
    PNG, as JSON. `sound` is what is heard with the folder's frames. ValueError, in a sentence, for frames that cannot be joined to,
    RuntimeError where imageio is missing.
    """

    takes = "float"

    def __init__(
        self,
        path: Path,
        sequence: FrameSequence,
        metadata: Mapping[str, Any] | None = None,
        joined: Path | None = None,
        until: int = 0,
        on_copied: Callable[[], None] = lambda: None,
        sound: PlacedSound | None = None,
    ) -> None:
        self.path, self.sequence, self.frames, self.warning = path, sequence, 0, ""
        self.form = FRAME_FORMATS[sequence.format]
        self._told, self.nbytes, self._synced = on_copied, 0, 0
        with whole_file(path / ABOUT, beside=path.parent) as file:
            file.write(json.dumps(asdict(sequence), indent=1).encode())
        self._files = WholeFiles(path.parent)
        self._text = text_blocks(metadata or {}) if self.form.encoder == "png" else b""
        self._animation: GrowingAnimation | None = None
        self._encoder: PictureEncoder | None = None
        self._sound: SoundBeside | None = None
        if self.form.animated:
            self._animation = GrowingAnimation(
                path / frame_name(sequence.first_frame, sequence.format),
                sequence.width,
                sequence.height,
                Fraction(sequence.fps),
            )
        try:
            if joined is not None:
                self._join(joined, until)
            if sound is not None:
                self._sound = SoundBeside(path, sound, Fraction(sequence.fps), joined, self.frames)
                self._sound.until(self.frames)
            self._encoder = PictureEncoder(self.form, float(Fraction(sequence.fps)))
        except BaseException:
            self.stop()
            raise

    def _join(self, source: Path, until: int) -> None:
        if self._animation is not None:
            old = source / frame_name(self.sequence.first_frame, self.sequence.format)
            for frames in self._animation.copy(old, until - self.sequence.first_frame):
                self.frames = frames
                self._told()
            return
        copied = False
        for number in range(self.sequence.first_frame, until):
            name = frame_name(number, self.sequence.format)
            try:
                os.link(source / name, self.path / name)
                self._synced += not copied  # the same file as the old one's, which is on the disk
            except FileNotFoundError as error:
                raise ValueError(f"{name} of {source.name} is missing; put it back, or turn join off") from error
            except (OSError, NotImplementedError, AttributeError):
                shutil.copyfile(source / name, self.path / name)
                copied = True
            self.frames += 1
            self._told()

    @property
    def next_frame(self) -> int:
        """The place in the video of the frame that comes next."""
        return self.sequence.first_frame + self.frames

    @property
    def room(self) -> int | None:
        """Bytes that its file has room for; None where every picture has a file of its own."""
        return None if self._animation is None else MOST_BYTES - self._animation.nbytes

    def write(self, pictures: torch.Tensor) -> None:
        """Append float32 [t, height, width, 3] in 0..1. OSError, naming the frame, if the disk does not take one."""
        for picture in pictures.numpy():
            data = self._encoder.encode(picture)
            try:
                if self._animation is not None:
                    self._animation.add(data)
                else:
                    data = with_text(data, self._text) if self._text else data
                    self._files.write(self.path / frame_name(self.next_frame, self.sequence.format), data)
                if self._sound is not None:
                    self._sound.until(self.frames + 1)
            except OSError as error:
                raise not_written(f"frame {self.next_frame} of {self.path.name}", error) from error
            self.nbytes += len(data)
            self.frames += 1

    def go_back(self, frames: int) -> None:
        """Only the first `frames` frames stay; what comes is numbered on from there. Not for an animation."""
        for number in range(self.sequence.first_frame + frames, self.next_frame):
            path = self.path / frame_name(number, self.sequence.format)
            with suppress(OSError):  # what is held is written over
                self.nbytes -= path.stat().st_size
                path.unlink()
        self.frames, self._synced = frames, min(self._synced, frames)
        if self._sound is not None:
            self._sound.go_back(frames)

    def sync(self) -> None:
        """Have the system put on the disk what has been written since the last time, as far as it can."""
        if self._animation is not None:
            with suppress(OSError, ValueError):  # closed
                self._animation.sync()
        else:
            for number in range(self.sequence.first_frame + self._synced, self.next_frame):
                sync_file(self.path / frame_name(number, self.sequence.format))
        if self._sound is not None:
            with suppress(OSError, ValueError):
                self._sound.sync()
        self._synced = self.frames
        sync_folder(self.path)

    def stop(self) -> None:
        """End it; every file is whole."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()
        if self._animation is not None:
            self._animation.close()
        if self._sound is not None:
            self._sound.close()

    def close(self) -> Path:
        """The same, and on the disk."""
        if self._encoder is not None:
            self.sync()
        self.stop()
        return self.path
