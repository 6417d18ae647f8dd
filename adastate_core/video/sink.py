"""Frames to a video file as they come, so that a killed process leaves a file that plays.

While it grows, the file is a fragmented mp4 or mov with one fragment a frame, each flushed as it is written, from an
encoder that holds nothing back (no B-frames, no lookahead): all frames but at most the last decode. Sound goes in beside the
frames as they come. `close` remuxes it, without re-encoding, to a plain one whose index comes first; where that fails, the
fragmented file stays. A Matroska file grows by a cluster a frame, and is finished where it is.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import VideoReformatter

from ..audio.placed import PlacedSound
from ..files.whole_file import HIDDEN, not_written, sync_file, sync_folder, whole_file
from .encoder import CODECS, Encoding
from .join import Prefix, copied_track, packets
from .sound_track import EarlierSound, SoundTrack, ends_by

__all__ = ["CODECS", "VideoSink", "remux"]

log = logging.getLogger("adastate")
# Nothing is kept of a frame that is written: for a table of them at the end (skip_trailer: none) the muxer would hold 40 bytes
# of each, half a kilobyte a chunk. The file that takes this one's place has an index of its own.
_GROWING = {
    "movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags+skip_trailer",
    "flush_packets": "1",
}
# A fragment ends where a second packet of a track comes: ended with every packet, it is told a wrong time of the sound behind the
# last frame. The index in front waits for a packet of each track, since it says how late the sound's encoder is.
_GROWING_WITH_SOUND = {
    "movflags": "empty_moov+default_base_moof+use_metadata_tags+delay_moov+skip_trailer",
    "frag_duration": "1",
    "flush_packets": "1",
}
# no cluster is larger than a frame
_GROWING_MATROSKA = {"flush_packets": "1", "cluster_time_limit": "1", "cluster_size_limit": "1"}
_FINISHED = {"movflags": "faststart+use_metadata_tags"}


class VideoSink:
    """One growing video. `write` chunks of frames, `close` at the end; also a context manager, which after an exception
    only stops. `warning` is a sentence about what `close` could not do, or empty.

    `quality` is the encoder's constant rate factor (0 best .. 51), where it has one. `metadata` is written before the first packet:
    strings as they are, all else as JSON, as the host's savers embed `workflow` and `prompt`. `prefix` is a video of
    the same encoder whose first `prefix_frames` frames are copied in front, with `on_copied`, which may raise, after each. `sound`
    is what the file carries from its first frame on: its packets of the copied part are those of the earlier video, where they
    can be gone on with.
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
        sound: PlacedSound | None = None,
    ) -> None:
        encoding = Encoding(width, height, Fraction(fps).limit_denominator(1001), codec, quality)
        before = None if prefix is None else Prefix(Path(prefix), prefix_frames, encoding, sound is not None)
        earlier = EarlierSound(before.source) if before and sound else None
        self._encoding, self._metadata = before.encoding if before else encoding, metadata
        self.takes, container = encoding.kind.takes, encoding.kind.container
        self.path, self.frames, self._sent, self.warning = Path(path), 0, 0, ""
        self._beside = before if before and before.has_others else None
        growing = _GROWING if sound is None else _GROWING_WITH_SOUND
        growing = _GROWING_MATROSKA if container == "matroska" else growing
        try:
            self._container = av.open(str(self.path), "w", format=container, options=dict(growing))
        except OSError as error:
            raise not_written(self._shown_name, error) from error
        for name, value in (metadata or {}).items():
            self._container.metadata[name] = value if isinstance(value, str) else json.dumps(value)
        self._stream = self._encoding.add_to(self._container)
        self._converter, self._placed = VideoReformatter(), sound
        joined = prefix_frames / self._encoding.rate
        self._sound = None if sound is None else SoundTrack(self._container, sound, earlier, joined)
        if before is not None:
            try:
                self._container.start_encoding()
                before.copy(partial(self._copied, on_copied))
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong first is what is told
                    self._container.close()
                raise
        self._sent = self.frames

    def again(self, path: Path | str, frames: int, on_copied: Callable[[], None] | None = None) -> VideoSink:
        """Another file like this one over its first `frames` frames, which are copied out of it while it is open; this one stays
        as it is. ValueError where they are not all on the disk yet."""
        of, metadata = self._encoding, self._metadata
        made = VideoSink(
            path,
            of.width,
            of.height,
            of.rate,
            of.codec,
            of.quality,
            metadata,
            self.path,
            frames,
            on_copied,
            self._placed,
        )
        made._beside = self._beside
        return made

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
            if self._sound is not None:
                self._sound.after(self.frames / self._encoding.rate)
        except OSError as error:
            raise not_written(f"frame {self.frames + 1} of {self._shown_name}", error) from error
        self.frames += 1

    @property
    def _shown_name(self) -> str:
        """What an error calls it: a file that is still hidden has no name that anybody knows."""
        return "the video" if self.path.name.startswith(HIDDEN) else self.path.name

    def write(self, pictures: torch.Tensor) -> None:
        """Append [t, height, width, 3] in the form that it takes; the first of them becomes a keyframe."""
        for i, picture in enumerate(pictures.numpy()):
            frame = self._encoding.frame_of(picture, self._converter)
            frame.pts, frame.time_base = self._sent, self._stream.codec_context.time_base
            self._sent += 1
            frame.pict_type = av.video.frame.PictureType.I if i == 0 else av.video.frame.PictureType.NONE
            try:
                packets = self._stream.encode(frame)
            except (OSError, av.error.FFmpegError) as error:
                raise not_written(f"frame {self._sent} of {self._shown_name}", error) from error
            for packet in packets:
                self._mux(packet)

    def sync(self) -> None:
        """Have the system put on the disk what has been written, as far as it can, and the file's name with it."""
        sync_file(self.path)
        sync_folder(self.path.parent)

    def stop(self) -> None:
        """End the file as it is, fragmented: it plays, and nothing is rewritten."""
        if self._container is None:
            return
        try:
            for packet in self._stream.encode(None):
                self._mux(packet)
            if self._sound is not None and self.frames:
                self._sound.finish(self._end)
        finally:
            container, self._container = self._container, None
            container.close()
        self.sync()

    def close(self) -> Path:
        """End the file and remux it to a plain one with its index in front; a failure becomes `warning`."""
        if self._container is None:
            return self.path
        try:
            self.stop()
        except Exception as error:  # noqa: BLE001  the frames before are in the file
            self._warn(
                f"the end of {self.path.name} could not be written ({_why(error)}), so its last frame may be missing"
            )
            return self.path
        self.rewrite()
        return self.path

    @property
    def _sound_end(self) -> Fraction | None:
        """Where the file's own sound is cut off, None where it has none."""
        return None if self._sound is None else self._end

    @property
    def _end(self) -> Fraction:
        """Where the last frame ends, in seconds."""
        return self.frames / self._encoding.rate

    def rewrite(self) -> None:
        """After `stop`: remux the file; a failure becomes `warning`."""
        try:
            if self._beside is not None and self.frames:
                self._rewrite_with_others()
            elif self.frames and self._encoding.kind.container != "matroska":
                remux(self.path, end=self._sound_end)
        except Exception as error:  # noqa: BLE001  the file is whole and plays without it
            if self.path.exists():
                left = "it is left as it grew, in fragments, and plays"
            else:
                left = "it was moved or removed while it was written; its frames are where it is now, in fragments"
            self._warn(f"{self.path.name} could not be rewritten with its index in front ({_why(error)}): {left}")

    def _rewrite_with_others(self) -> None:
        """Remux together with the sound and all else of the joined file; where that fails, a warning, and without."""
        source, left_out = self._beside.source.name, " and ".join(sorted(set(self._beside.left_out)))
        try:
            remux(self.path, self._beside, self._sound_end)
        except Exception as error:  # noqa: BLE001  the pictures are in the file
            if self._encoding.kind.container != "matroska":
                remux(self.path, end=self._sound_end)
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


def remux(path: Path, beside: Prefix | None = None, end: Fraction | None = None) -> None:
    """Rewrite a growing file in place as a plain one with its index first, all tracks, clocks and metadata unchanged.

    `beside`: the other tracks of an earlier video are put beside those of the file. `end`: the file's own sound ends there, in
    seconds. The new file takes the old one's place
    only when it was opened again and its first and its last frames decoded. Else an OSError, a ValueError or one of PyAV's
    says why, and the old file is as it was.
    """
    with whole_file(path) as file:
        counts = _rewrite(path, Path(file.name), beside, end)
        _require_whole(Path(file.name), counts)


def _rewrite(path: Path, new: Path, beside: Prefix | None, end: Fraction | None = None) -> list[int]:
    """Copy all tracks' packets to a plain file of the same container; how many of each."""
    others = contextlib.nullcontext(([], ())) if beside is None else beside.other_tracks()
    with av.open(str(path)) as source, others as (tracks_beside, packets_beside):
        with av.open(str(new), "w", format=_container_of(source), options=_finished(source)) as target:
            for name, value in source.metadata.items():
                target.metadata[name] = value
            own = [copied_track(target, track) for track in source.streams]
            more = {track.index: copied_track(target, track) for track in tracks_beside}
            counts = [0] * (len(own) + len(more))
            lasting = own[source.streams.video[0].index].index, _frame_ticks(source.streams.video[0])
            streams = (
                ((own[p.stream.index], p) for p in packets(source) if end is None or ends_by(p, end)),
                ((more[p.stream.index], p) for p in packets_beside),
            )
            for stream, packet in heapq.merge(*streams, key=lambda pair: pair[1].dts * pair[1].time_base):
                counts[stream.index] += 1
                if not packet.duration and stream.index == lasting[0]:
                    packet.duration = lasting[1]
                packet.stream = stream
                target.mux(packet)
    return counts


def _frame_ticks(track: av.VideoStream) -> int:
    """How long a frame lasts, in the track's time base. PyAV before 16 reads no duration in fragments of ProRes, and a last frame
    that lasts for nothing is behind the end of the finished file."""
    return round(1 / (track.guessed_rate * track.time_base)) if track.guessed_rate else 0


def _container_of(source: av.container.InputContainer) -> str:
    """The name of its container for a writer; a reader's is a list of all that it reads."""
    if "matroska" in source.format.name:
        return "matroska"
    # of the two brands that are written, "qt" is the one of mov
    return "mov" if source.metadata.get("major_brand", "").strip() == "qt" else "mp4"


def _finished(source: av.container.InputContainer) -> dict[str, str]:
    if _container_of(source) == "matroska":
        return {}
    return _FINISHED | {"video_track_timescale": str(source.streams.video[0].time_base.denominator)}


def _require_whole(path: Path, counts: list[int]) -> None:
    """ValueError unless the file is indexed for so many packets a track and the frames at both of its ends decode."""
    with av.open(str(path)) as container:
        stream, held_frames = container.streams.video[0], [track.frames for track in container.streams]
        first = next(container.decode(stream), None)
        if stream.duration is None:  # Matroska, which counts neither
            return
        container.seek(stream.duration, stream=stream)
        last = [packet.decode() for packet in container.demux(stream)]  # from the last keyframe on
        # a subtitle's track has more: the pauses between its lines
        short = [held for held, count in zip(held_frames, counts, strict=True) if held < count]
        if stream.frames != counts[stream.index] or short or first is None or not any(last):
            raise ValueError(f"the rewritten file does not hold {counts[stream.index]} frames that decode")
