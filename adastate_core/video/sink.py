"""Frames to an mp4 as they come, so that a killed process leaves a file that plays.

While it grows, the file is a fragmented mp4 with one fragment a frame, each flushed as it is written, from an
encoder that holds nothing back (no B-frames, no lookahead): all frames but at most the last decode. `close` remuxes
it, without re-encoding, to a plain mp4 whose index comes first; where that fails, the fragmented file stays.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import VideoReformatter

from ..files.whole_file import HIDDEN, not_written, sync_file, whole_file
from .colour import frame_of
from .encoder import CODECS, Encoding
from .join import Prefix, copied_track, packets

__all__ = ["CODECS", "VideoSink", "remux", "to_bytes"]

log = logging.getLogger("adastate")
_GROWING = {
    "movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags",
    "flush_packets": "1",
}
_FINISHED = {"movflags": "faststart+use_metadata_tags"}


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
        encoding = Encoding(width, height, Fraction(fps).limit_denominator(1001), codec, quality)
        before = None if prefix is None else Prefix(Path(prefix), prefix_frames, encoding)
        self._matrix = (before.encoding if before else encoding).matrix
        self.path, self.frames, self._sent, self.warning = Path(path), 0, 0, ""
        self._beside = before if before and before.has_others else None
        self._container = av.open(str(self.path), "w", format="mp4", options=dict(_GROWING))
        for name, value in (metadata or {}).items():
            self._container.metadata[name] = value if isinstance(value, str) else json.dumps(value)
        self._stream = replace(encoding, matrix=self._matrix).add_to(self._container)
        self._converter = VideoReformatter()
        if before is not None:
            try:
                self._container.start_encoding()
                before.copy(partial(self._copied, on_copied))
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is what is told
                    self._container.close()
                raise
        self._sent = self.frames

    def __enter__(self) -> VideoSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # what went wrong first is what is told
            self.stop()

    def _copied(self, told: Callable[[], None] | None, packet: av.Packet) -> None:
        """A packet of the video that goes in front; whoever waits is told of it, and may interrupt."""
        self._mux(packet)
        if told is not None:
            told()

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
            frame = frame_of(picture, self._matrix, self._converter)
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
            if self._beside is not None and self.frames:
                self._rewrite_with_others()
            elif self.frames:
                remux(self.path)
        except Exception as error:  # noqa: BLE001  the file is whole and plays without it
            if self.path.exists():
                left = "it is left as it grew, in fragments, and plays"
            else:
                left = "it was moved or removed while it was written; its frames are where it is now, in fragments"
            self._warn(f"{self.path.name} could not be rewritten with its index in front ({_why(error)}): {left}")
        return self.path

    def _rewrite_with_others(self) -> None:
        """Remux together with the sound and all else of the joined file; where that fails, a warning, and without."""
        source, left_out = self._beside.source.name, " and ".join(sorted(set(self._beside.left_out)))
        try:
            remux(self.path, self._beside)
        except Exception as error:  # noqa: BLE001  the pictures are in the file
            remux(self.path)
            self._warn(f"sound and other tracks of {source} could not be taken along ({_why(error)})")
        else:
            if left_out:
                self._warn(f"the {left_out} track of {source} could not be taken along; PyAV 16 or newer can copy it")

    def _warn(self, sentence: str) -> None:
        self.warning = sentence
        log.warning("%s", sentence)


def _why(error: Exception) -> str:
    """What an exception says, without the path of a temporary file."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def remux(path: Path, beside: Prefix | None = None) -> None:
    """Rewrite a fragmented mp4 in place as a plain one with its index first, all tracks, clocks and metadata unchanged.

    `beside`: the other tracks of an earlier video are put beside those of the file. The new file takes the old one's place
    only when it was opened again and its first and its last frames decoded. Else an OSError, a ValueError or one of PyAV's
    says why, and the old file is as it was.
    """
    with whole_file(path) as file:
        counts = _rewrite(path, Path(file.name), beside)
        _require_whole(Path(file.name), counts)


def _rewrite(path: Path, new: Path, beside: Prefix | None) -> list[int]:
    """Copy all tracks' packets to a plain mp4; how many of each."""
    others = contextlib.nullcontext(([], ())) if beside is None else beside.other_tracks()
    with av.open(str(path)) as source, others as (tracks_beside, packets_beside):
        clock = {"video_track_timescale": str(source.streams.video[0].time_base.denominator)}
        with av.open(str(new), "w", format="mp4", options=_FINISHED | clock) as target:
            for name, value in source.metadata.items():
                target.metadata[name] = value
            own = [copied_track(target, track) for track in source.streams]
            more = {track.index: copied_track(target, track) for track in tracks_beside}
            counts = [0] * (len(own) + len(more))
            streams = (
                ((own[p.stream.index], p) for p in packets(source)),
                ((more[p.stream.index], p) for p in packets_beside),
            )
            for stream, packet in heapq.merge(*streams, key=lambda pair: pair[1].dts * pair[1].time_base):
                counts[stream.index] += 1
                packet.stream = stream
                target.mux(packet)
    return counts


def _require_whole(path: Path, counts: list[int]) -> None:
    """ValueError unless the file is indexed for so many packets a track and the frames at both of its ends decode."""
    with av.open(str(path)) as container:
        stream, held_frames = container.streams.video[0], [track.frames for track in container.streams]
        first = next(container.decode(stream), None)
        container.seek(stream.duration, stream=stream)
        last = [packet.decode() for packet in container.demux(stream)]  # from the last keyframe on
        # a subtitle's track has more: the pauses between its lines
        short = [held for held, count in zip(held_frames, counts, strict=True) if held < count]
        if stream.frames != counts[stream.index] or short or first is None or not any(last):
            raise ValueError(f"the rewritten file does not hold {counts[stream.index]} frames that decode")
