"""Frames to an mp4 as they come, so that a killed process leaves a file that plays.

While it grows, the file is a fragmented mp4 with one fragment a frame, each flushed as it is written, from an
encoder that holds nothing back (no B-frames, no lookahead): all frames but at most the last decode. `close` remuxes
it, without re-encoding, to a plain mp4 whose index comes first; where that fails, the fragmented file stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.bitstream import BitStreamFilterContext

from .files.whole_file import HIDDEN, not_written, sync_file, whole_file

log = logging.getLogger("adastate")
CODECS = {"h264": "libx264"}
_GROWING = {
    "movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags",
    "flush_packets": "1",
}
_FINISHED = {"movflags": "faststart+use_metadata_tags"}
# How far apart two rates may be and still be one: PyAV 17.0 finished files on a clock of 90,000 ticks a second, on which
# the frames of 59.94 fps fall beside their times. 23.976 and 24 are three times as far apart.
_SAME_RATE = Fraction(1, 3000)


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[..., 3] float in 0..1 to uint8 on the CPU, as the host's own savers do it (cut off, not rounded)."""
    return (pictures.float() * 255).clamp(0, 255).to(torch.uint8).cpu()


class VideoSink:
    """One growing video. `write` chunks of frames, `close` at the end; also a context manager, which after an exception
    only stops. `warning` is a sentence about what `close` could not do, or empty.

    `quality` is the encoder's constant rate factor (0 best .. 51). `metadata` is written before the first packet:
    strings as they are, all else as JSON, as the host's savers embed `workflow` and `prompt`. `prefix` is a video of
    the same encoder whose first `prefix_frames` frames are copied in front, with `on_copied`, which may raise, after each.
    """

    def __init__(
        self,
        path: Path | str,
        width: int,
        height: int,
        fps: float | Fraction,
        codec: str = "h264",
        quality: int = 18,
        metadata: Mapping[str, Any] | None = None,
        prefix: Path | str | None = None,
        prefix_frames: int = 0,
        on_copied: Callable[[], None] | None = None,
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec is {codec!r}; it must be one of {', '.join(CODECS)}")
        if width % 2 or height % 2:
            raise ValueError(f"the video is {width}x{height}; H.264 needs even sides")
        rate = Fraction(fps).limit_denominator(1001)
        if rate <= 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        self.path, self.frames, self._sent, self.warning = Path(path), 0, 0, ""
        self._container = av.open(str(self.path), "w", format="mp4", options=dict(_GROWING))
        for name, value in (metadata or {}).items():
            self._container.metadata[name] = value if isinstance(value, str) else json.dumps(value)
        self._stream = self._container.add_stream(CODECS[codec], rate=rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = 1 / rate
        self._stream.options = {
            "crf": str(quality),
            "preset": "veryfast",
            "tune": "zerolatency",
            "bf": "0",
            "sc_threshold": "0",
            "forced-idr": "1",
            "g": "100000",
        }
        if prefix is not None:
            try:
                self._copy(Path(prefix), prefix_frames, on_copied)
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is what is told
                    self._container.close()
                raise

    def __enter__(self) -> VideoSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # what went wrong first is what is told
            self.stop()

    def _copy(self, source: Path, frames: int, on_copied: Callable[[], None] | None) -> None:
        """Put the first `frames` packets of another file of ours in front, without re-encoding."""
        self._container.start_encoding()
        with av.open(str(source)) as container:
            stream = container.streams.video[0]
            mine, other = (f"{s.width}x{s.height} at {s.average_rate} fps" for s in (self._stream, stream))
            own_sets = parameter_sets(self._stream.codec_context.extradata)
            if not _alike(self._stream, stream) or own_sets != parameter_sets(stream.codec_context.extradata):
                raise ValueError(
                    f"{source.name} ({other}) cannot be joined to a video of {mine}, or it has other encoder settings; "
                    "use the same size and fps, or turn join off"
                )
            # An mp4 holds NAL units by length; an encoder's packets, which this stream expects, by start code.
            to_start_codes = BitStreamFilterContext("h264_mp4toannexb", stream)
            for packet in _packets(container, frames):
                for converted in to_start_codes.filter(packet):
                    self._mux(converted)
                if on_copied is not None:
                    on_copied()
        self._sent = self.frames
        if self.frames < frames:
            raise ValueError(f"{source.name} holds {self.frames} frames of the {frames} that were to be joined")

    def _mux(self, packet: av.Packet) -> None:
        packet.stream = self._stream
        packet.time_base = self._stream.codec_context.time_base
        packet.pts = packet.dts = self.frames
        packet.duration = 1
        try:
            self._container.mux(packet)
        except OSError as error:
            name = "the video" if self.path.name.startswith(HIDDEN) else self.path.name
            raise not_written(f"frame {self.frames + 1} of {name}", error) from error
        self.frames += 1

    def write(self, pictures: torch.Tensor) -> None:
        """Append uint8 [t, height, width, 3]; the first of them becomes a keyframe."""
        for i, picture in enumerate(pictures.numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = self._sent, self._stream.codec_context.time_base
            self._sent += 1
            frame.pict_type = av.video.frame.PictureType.I if i == 0 else av.video.frame.PictureType.NONE
            for packet in self._stream.encode(frame):
                self._mux(packet)

    def sync(self) -> None:
        """Have the system put on the disk what has been written, as far as it can."""
        sync_file(self.path)

    def stop(self) -> None:
        """End the file as it is, fragmented: it plays, and nothing is rewritten."""
        if self._container is None:
            return
        try:
            for packet in self._stream.encode(None):
                self._mux(packet)
        finally:
            container, self._container = self._container, None
            container.close()
        self.sync()

    def close(self) -> Path:
        """End the file and remux it to a plain mp4 with its index in front; a failure becomes `warning`."""
        if self._container is None:
            return self.path
        try:
            self.stop()
        except Exception as error:  # noqa: BLE001  the frames before are in the file
            self._warn(
                f"the end of {self.path.name} could not be written ({_why(error)}), so its last frame may be missing"
            )
            return self.path
        try:
            if self.frames:
                remux(self.path)
        except Exception as error:  # noqa: BLE001  the file is whole and plays without it
            if self.path.exists():
                left = "it is left as it grew, in fragments, and plays"
            else:
                left = "it was moved or removed while it was written; its frames are where it is now, in fragments"
            self._warn(f"{self.path.name} could not be rewritten with its index in front ({_why(error)}): {left}")
        return self.path

    def _warn(self, sentence: str) -> None:
        self.warning = sentence
        log.warning("%s", sentence)


def _why(error: Exception) -> str:
    """What an exception says, without the path of a temporary file."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def parameter_sets(extradata: bytes) -> list[bytes]:
    """The H.264 parameter sets (NAL types 7 and 8) in an encoder's or an mp4's extradata."""
    if extradata[:1] != b"\x01":
        units = re.split(b"\x00{2,3}\x01", extradata)
        return [u for u in units if u and u[0] & 31 in (7, 8)]
    units, at = [], 5
    for _ in range(2):
        count, at = extradata[at] & 31, at + 1
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return units


def _packets(container: av.container.InputContainer, frames: int | None = None) -> Iterator[av.Packet]:
    for i, packet in enumerate(p for p in container.demux(container.streams.video[0]) if p.dts is not None):
        if frames is not None and i >= frames:
            return
        yield packet


def _alike(own: av.VideoStream, other: av.VideoStream) -> bool:
    """Whether two streams have one size and one frame rate."""
    rates = own.average_rate, other.average_rate
    if (own.width, own.height) != (other.width, other.height) or not all(rates):
        return False
    return abs(rates[1] / rates[0] - 1) < _SAME_RATE


def remux(path: Path) -> None:
    """Rewrite a fragmented mp4 in place as a plain one with its index first, packets, clock and metadata unchanged.

    The new file takes the old one's place only when it was opened again and its first and its last frames decoded. Else
    an OSError, a ValueError or one of PyAV's says why, and the old file is as it was.
    """
    with whole_file(path) as file:
        count = _rewrite(path, Path(file.name))
        _require_whole(Path(file.name), count)


def _rewrite(path: Path, new: Path) -> int:
    """Copy a file's packets to a plain mp4; how many."""
    count = 0
    with av.open(str(path)) as source:
        template = source.streams.video[0]
        clock = {"video_track_timescale": str(template.time_base.denominator)}
        with av.open(str(new), "w", format="mp4", options=_FINISHED | clock) as target:
            for name, value in source.metadata.items():
                target.metadata[name] = value
            # Opaque: the parameters as they are. PyAV 14 would else open an encoder, which writes its own into the file.
            stream = target.add_stream_from_template(template, opaque=True)
            for packet in _packets(source):
                packet.stream = stream
                target.mux(packet)
                count += 1
    return count


def _require_whole(path: Path, count: int) -> None:
    """ValueError unless the file is indexed for `count` packets and the frames at both of its ends decode."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        container.seek(stream.duration, stream=stream)
        last = [packet.decode() for packet in container.demux(stream)]  # from the last keyframe on
        if stream.frames != count or first is None or not any(last):
            raise ValueError(f"the rewritten file does not hold {count} frames that decode")
