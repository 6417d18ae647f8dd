"""Frames to an mp4 as they come, so that a killed process leaves a file that plays.

While it grows, the file is a fragmented mp4 with one fragment a frame, each flushed as it is written, from an
encoder that holds nothing back (no B-frames, no lookahead): all frames but at most the last decode. `close` remuxes
it, without re-encoding, to a plain mp4 whose index comes first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.bitstream import BitStreamFilterContext

CODECS = {"h264": "libx264"}
_GROWING = {
    "movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags",
    "flush_packets": "1",
}
_FINISHED = {"movflags": "faststart+use_metadata_tags"}


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[..., 3] float in 0..1 to uint8 on the CPU, as the host's own savers do it (cut off, not rounded)."""
    return (pictures.float() * 255).clamp(0, 255).to(torch.uint8).cpu()


class VideoSink:
    """One growing video. `write` chunks of frames, `close` at the end; also a context manager.

    `quality` is the encoder's constant rate factor (0 best .. 51). `metadata` is written before the first packet:
    strings as they are, all else as JSON, as the host's savers embed `workflow` and `prompt`. `prefix` is a video of
    the same encoder whose first `prefix_frames` frames are copied in front.
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
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec is {codec!r}; it must be one of {', '.join(CODECS)}")
        if width % 2 or height % 2:
            raise ValueError(f"the video is {width}x{height}; H.264 needs even sides")
        rate = Fraction(fps).limit_denominator(1001)
        if rate <= 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        self.path, self.frames, self._sent = Path(path), 0, 0
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
                self._copy(Path(prefix), prefix_frames)
            except BaseException:
                self._container.close()
                raise

    def __enter__(self) -> VideoSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, source: Path, frames: int) -> None:
        """Put the first `frames` packets of another file of ours in front, without re-encoding."""
        self._container.start_encoding()
        with av.open(str(source)) as container:
            stream = container.streams.video[0]
            mine, other = (f"{s.width}x{s.height} at {s.average_rate} fps" for s in (self._stream, stream))
            own_sets = parameter_sets(self._stream.codec_context.extradata)
            if mine != other or own_sets != parameter_sets(stream.codec_context.extradata):
                raise ValueError(
                    f"{source.name} ({other}) cannot be joined to a video of {mine}, or it has other encoder settings; "
                    "use the same size and fps, or turn join off"
                )
            # An mp4 holds NAL units by length; an encoder's packets, which this stream expects, by start code.
            to_start_codes = BitStreamFilterContext("h264_mp4toannexb", stream)
            for packet in _packets(container, frames):
                for converted in to_start_codes.filter(packet):
                    self._mux(converted)
        self._sent = self.frames
        if self.frames < frames:
            raise ValueError(f"{source.name} holds {self.frames} frames of the {frames} that were to be joined")

    def _mux(self, packet: av.Packet) -> None:
        packet.stream = self._stream
        packet.time_base = self._stream.codec_context.time_base
        packet.pts = packet.dts = self.frames
        packet.duration = 1
        self._container.mux(packet)
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

    def stop(self) -> None:
        """End the file as it is, fragmented: it plays, and nothing is rewritten."""
        if self._container is None:
            return
        for packet in self._stream.encode(None):
            self._mux(packet)
        self._container.close()
        self._container = None

    def close(self) -> Path:
        """End the file and remux it to a plain mp4 with its index in front."""
        if self._container is not None:
            self.stop()
            if self.frames:
                remux(self.path)
        return self.path


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


def remux(path: Path) -> None:
    """Rewrite a fragmented mp4 in place as a plain one with its index first, packets and metadata unchanged."""
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.mp4")
    try:
        with (
            av.open(str(path)) as source,
            av.open(str(temporary), "w", format="mp4", options=dict(_FINISHED)) as target,
        ):
            for name, value in source.metadata.items():
                target.metadata[name] = value
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in _packets(source):
                packet.stream = stream
                target.mux(packet)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
