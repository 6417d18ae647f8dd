"""The one door through which videos are read: a file of a known kind, opened alone; its pictures upright, in RGB.

A file is opened by Python and handed over as a stream, and only containers that hold their pictures themselves are let in:
no playlist, pattern of names or address leads from it to another file or to the network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy
import torch
from av.stream import Disposition
from PIL import Image

from .colour import rgb
from .torn_file import Beginning, whole_fragments

log = logging.getLogger("adastate")
Source = str | os.PathLike | IO[bytes]
# Names of FFmpeg's readers; they are compared name by name, on every version, before a file's header is read.
CONTAINERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "nut", "ivf", "rm", "dv", "wtv", "gif", "apng",
    "webp", "yuv4mpegpipe", "h264", "hevc", "vvc", "av1", "obu", "m4v", "mpegvideo", "mjpeg", "h261", "h263", "vc1", "dirac",
    "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "mp3", "flac", "wav", "aac",
)  # fmt: skip
# For the container alone: what PyAV is to give to every track too makes it crash where a file, as FLV, tells its tracks late.
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
_LISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0", b"[playlist]", b"<smil", b"<ASX", b"<asx")
_ADVICE = "connect a VIDEO of a file that plays, such as MP4, MOV, MKV, WebM, AVI or MPEG-TS"
# The coarsest clock in common use (Matroska, WebM, FLV) counts milliseconds, so frame times are this far from the truth.
CLOCK = Fraction(1, 1000)
_NO_RATE, _SLOWEST = Fraction(16), Fraction(1, 1000)
# Shapes nearer to a square are rounding of whoever wrote the file; beyond the limit, a damaged header.
_SQUARE, _LONGEST = Fraction(1, 50), 8
_NAME = 80
# A picture of 8192 x 8192, twice what 8K has. A few bytes can say that it is larger, and each picture takes 20 bytes a pixel.
MOST_PIXELS = 2**26
# Matrices of quarter turns against the clock.
_QUARTERS = ((1, 0, 0, 0, 1), (0, -1, 0, 1, 0), (-1, 0, 0, 0, -1), (0, 1, 0, -1, 0))


class UnreadableVideo(ValueError):
    """A video that cannot be read; its words are one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Shot:
    """A decoded picture. `aspect` is the width of one of its pixels over the height."""

    frame: av.VideoFrame
    aspect: Fraction = Fraction(1)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as it is to be shown."""
        width, height = _stretched(self.frame.width, self.frame.height, self.aspect)
        return (height, width) if _turn(self.frame)[0] else (width, height)

    def rgb(self, size: tuple[int, int] | None = None) -> numpy.ndarray:
        """uint8 [height, width, 3], its pixels square, upright; scaled to `size` (width, height) where it is another."""
        pixels = _resized(rgb(self.frame), _stretched(self.frame.width, self.frame.height, self.aspect))
        swapped, left, up = _turn(self.frame)
        pixels = pixels.swapaxes(0, 1) if swapped else pixels
        pixels = pixels[:: -1 if up else 1, :: -1 if left else 1]
        return numpy.ascontiguousarray(_resized(pixels, size or self.size))


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether rows and columns are to be swapped, then left and right, then top and bottom, by the display matrix.

    Its numbers (a, b, u, c, d, v, ...) take a point (p, q) to (a p + c q, b p + d q). An angle between is taken for the
    nearest quarter turn.
    """
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
        numbers = (1, 0, 0, 0, 1) if found is None else numpy.frombuffer(bytes(found), numpy.int32)[:5].tolist()
    except ValueError:  # beside it lies a kind of data that this PyAV has no name for
        numbers = _QUARTERS[round(frame.rotation / 90) % 4]
    a, b, _, c, d = numbers
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _stretched(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """The size with square pixels, nothing made smaller."""
    if abs(aspect - 1) <= _SQUARE or not Fraction(1, _LONGEST) <= aspect <= _LONGEST:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _resized(pixels: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    if pixels.shape[1::-1] == tuple(size):
        return pixels
    return numpy.asarray(Image.fromarray(numpy.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC))


@contextlib.contextmanager
def opened(source: Source, what: str = "the video") -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video's container and its track of pictures. Raises UnreadableVideo, also for what FFmpeg says while it is open."""
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, (str, os.PathLike)):
                source = stack.enter_context(_file(source, what))
            source.seek(0)
            container = stack.enter_context(
                av.open(source, container_options=dict(_OPTIONS), metadata_errors="replace")
            )
            track = _track(container, source, what)
            _bound(track, source, what)
            yield container, track
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise UnreadableVideo(f"{what} cannot be read: {name(source)} {_reason(source)}; {_ADVICE}") from error


def opened_alone(path: Path) -> av.container.InputContainer:
    """A file of a known kind for reading, opened alone, to be closed by who called; FFmpeg's errors where it is none. Of a growing
    one whose end a power cut tore, what is before that."""
    options = _OPTIONS | {"protocol_whitelist": "file"}
    try:
        return av.open(str(path), container_options=options, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.EOFError):
        if not (size := whole_fragments(path)):
            raise
        return av.open(Beginning(path, size), container_options=_OPTIONS, metadata_errors="replace")


def name(source: Source) -> str:
    """A source's name in a sentence, without its folder."""
    path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    if not isinstance(path, (str, os.PathLike)):
        return "it"
    plain = os.fsdecode(os.path.basename(os.fspath(path)))
    plain = "".join(c if c.isprintable() else "?" for c in plain)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 1]}…"


def _file(path: str | os.PathLike, what: str) -> IO[bytes]:
    """The file, opened; a pipe or device, which might never answer, is not."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableVideo(f"{what} cannot be read: {name(path)} is a folder or device; {_ADVICE}")
        return open(path, "rb")  # noqa: SIM115  closed by who called
    except FileNotFoundError as error:
        raise UnreadableVideo(f"{what} cannot be read: {name(path)} is not there; {_ADVICE}") from error
    except (PermissionError, ValueError) as error:
        if isinstance(error, UnreadableVideo):
            raise
        raise UnreadableVideo(
            f"{what} cannot be read: {name(path)} may not be opened by the server; {_ADVICE}"
        ) from error


def _reason(source: Source) -> str:
    """Why a file was not let in, by a look at its beginning."""
    try:
        if isinstance(source, (str, os.PathLike)):
            return "did not open"
        if not source.closed:
            source.seek(0)
            head = source.read(512)
        else:
            with open(source.name, "rb") as file:
                head = file.read(512)
    except (OSError, ValueError, AttributeError, TypeError):
        return "cannot be read to its end"
    if not head:
        return "is empty"
    if head.lstrip(b"\xef\xbb\xbf \r\n").startswith(_LISTS):
        return "is a list of other files, and no other file is opened"
    if not set(head) - set(b"\t\n\r\x1b") - set(range(32, 256)):
        return "holds text"
    return "is damaged or of a kind that is not known"


def _track(container: av.container.InputContainer, source: Source, what: str) -> av.VideoStream:
    """The first track of pictures that is no cover; a cover where there is nothing else."""
    tracks = sorted(container.streams.video, key=lambda each: bool(each.disposition & Disposition.attached_pic))
    if not tracks:
        raise UnreadableVideo(f"{what} has no picture track: {name(source)} holds sound alone or nothing; {_ADVICE}")
    decodable = [each for each in tracks if each.codec_context is not None]
    if not decodable:  # PyAV ends the process where such packets are decoded
        raise UnreadableVideo(f"{what} cannot be read: {name(source)} is of a codec that is not known; {_ADVICE}")
    return decodable[0]


def _bound(track: av.VideoStream, source: Source, what: str) -> None:
    """Hold a track to pictures that memory takes, also where it says another size further on."""
    if track.width * track.height > MOST_PIXELS:
        raise UnreadableVideo(
            f"{what} cannot be read: {name(source)} is {track.width}x{track.height}, and a picture may have {MOST_PIXELS} pixels "
            f"(8192x8192); {_ADVICE}"
        )
    track.codec_context.options = {"max_pixels": str(MOST_PIXELS)}


def no_frames(source: Source, what: str = "the video") -> UnreadableVideo:
    """The error of a video in which no picture was found."""
    return UnreadableVideo(f"{what} has no frame in it: no picture of {name(source)} decodes; {_ADVICE}")


def rate_of(stream: av.VideoStream) -> Fraction:
    """Frames a second, 16 where the file does not say, or says that one lasts longer than a quarter of an hour."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate and rate > _SLOWEST else _NO_RATE


def decoded(
    source: Source,
    at: Fraction | None,
    since: Fraction | float = 0,
    until: Fraction | float | None = None,
    what: str = "the video",
) -> Iterator[tuple[Fraction, Shot]]:
    """(time in seconds, picture) in the order they are shown, from the keyframe before `at`, None from the first frame.

    Only pictures from `since` on and before `until`, both to the tick of the file's clock as the host counts them.
    """
    with opened(source, what) as (container, stream):
        stream.thread_type = "AUTO"
        since, until = _ticks(since, stream), None if until is None else _ticks(until, stream)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        gap, last = 1 / rate_of(stream), None
        try:
            first = None if at is None else _seek(container, stream, at)
        except av.error.FFmpegError:  # a file that cannot be searched
            yield from decoded(source, None, since, until, what)
            return
        for frame in _sound(container, stream, name(source), searched=at is not None):
            if first is not None and frame.pts is not None and frame.pts < first:
                continue  # shown before the keyframe and made from frames that were not decoded
            time = None if frame.pts is None else frame.pts * stream.time_base
            if time is None or (last is not None and time <= last):
                time = Fraction(0) if last is None else last + gap
            last = time
            if until is not None and time >= until:
                return
            if time >= since:
                yield time, Shot(frame, aspect)


def _ticks(seconds: Fraction | float, stream: av.VideoStream) -> Fraction:
    """A time in whole ticks of the stream's clock."""
    return int(float(seconds) / stream.time_base) * stream.time_base if seconds else Fraction(0)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, at: Fraction) -> int | None:
    """Stand at the keyframe before `at` seconds; its time in the stream's clock."""
    offset = int(at / stream.time_base)
    container.seek(offset, stream=stream)
    for packet in container.demux(stream):
        if packet.is_keyframe:
            container.seek(offset, stream=stream)
            return packet.pts
    return None


def _sound(
    container: av.container.InputContainer, stream: av.VideoStream, file: str, searched: bool
) -> Iterator[av.VideoFrame]:
    """Frames that decode, up to where the file breaks off; after a search from the first keyframe on."""
    packets, damaged = container.demux(stream), 0
    while True:
        try:
            packet = next(packets, None)
        except av.error.InvalidDataError:
            packet, damaged = None, damaged + 1
        if packet is None:
            break
        if searched and packet.dts is not None and not packet.is_keyframe:
            continue
        searched = False
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            damaged += 1
    if damaged:
        log.warning("%s is damaged: %d of its packets did not decode and were left out", file, damaged)


class FileClip:
    """A video file from `since` until `until` seconds, for reading from its beginning.

    `rate` is frames a second, `count` how many pictures it should hold (0: unknown, and no more than a guess), `sizes` the
    (width, height) that a reader may take it for: of every track as it is stored, and of its own as it is shown.
    Raises UnreadableVideo for a file without pictures; `what` names it there.
    """

    def __init__(self, source: Source, what: str = "the video", since: float = 0, until: float | None = None) -> None:
        self.source, self.what, self.since, self.until = source, what, since, until
        with opened(source, what) as (container, stream):
            self.rate = rate_of(stream)
            self.count = self._guessed(container, stream)
            self.sizes = {(each.width, each.height) for each in container.streams.video if each.codec_context}

    def _guessed(self, container: av.container.InputContainer, stream: av.VideoStream) -> int:
        if stream.frames and not self.since and self.until is None:
            return stream.frames
        end = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        end = Fraction(container.duration, av.time_base) if end is None and container.duration else end
        if end is None:
            return 0
        end = end if self.until is None else min(end, self.until)
        return max(0, round((end - Fraction(self.since)) * self.rate))

    def first(self) -> Shot:
        """Its first picture."""
        for _, shot in self._shots():
            return shot
        raise no_frames(self.source, self.what)

    def _shots(self) -> Iterator[tuple[Fraction, Shot]]:
        return decoded(self.source, Fraction(self.since) if self.since else None, self.since, self.until, self.what)

    def pictures(self, every: int = 1) -> Iterator[tuple[Fraction, numpy.ndarray]]:
        """(time, uint8 [height, width, 3]) of every `every`-th picture, all in the size of the first one."""
        size = None
        for number, (time, shot) in enumerate(self._shots()):
            size = size or shot.size
            if number % every == 0:
                yield time, shot.rgb(size)
        if size is None:
            raise no_frames(self.source, self.what)


class MemoryClip:
    """Pictures [n, height, width, 3 or more] float in 0..1 that lie in memory, as FileClip gives a file's."""

    def __init__(self, images: torch.Tensor, rate: Any, what: str = "the video") -> None:
        if not len(images):
            raise UnreadableVideo(f"{what} has no frame in it; connect a VIDEO with frames in it")
        self.images, self.rate, self.count = images, Fraction(rate or _NO_RATE), len(images)

    def pictures(self, every: int = 1) -> Iterator[tuple[Fraction, numpy.ndarray]]:
        """(time, uint8 [height, width, 3]) of every `every`-th picture."""
        for number in range(0, len(self.images), every):
            levels = (self.images[number, ..., :3].float().nan_to_num() * 255).round().clamp(0, 255)
            yield number / self.rate, levels.to(torch.uint8).cpu().numpy()


def clip(source: Source | FileClip | MemoryClip, what: str = "the video") -> FileClip | MemoryClip:
    """A clip of all of a file; a clip as it is."""
    return source if isinstance(source, (FileClip, MemoryClip)) else FileClip(source, what)
