"""An earlier video of the pack in front of a new one: whether it can be, and its tracks, packet by packet."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
from av.bitstream import BitStreamFilterContext

from .colour import BT709, UNSPECIFIED
from .encoder import CODECS, Encoding, quality_of, signature
from .frames import opened_alone

# Enough frames to tell 23.976 from 24 on a clock of a thousand ticks a second.
_LOOKED_AT = 32


class Prefix:
    """The first `frames` frames of a video, and what else its file holds up to then.

    `encoding` is the wanted one, in the colours that the video began with: its own parameter sets decide. `has_others`: the
    file has more tracks than the pictures, its sound not counted `with_sound`, where another takes its place; `left_out`: the
    kinds of those that this PyAV cannot copy. ValueError, in a sentence that names both values, for a video of another size,
    rate or quality, or of another encoder.
    """

    def __init__(self, source: Path, frames: int, wanted: Encoding, with_sound: bool = False) -> None:
        self.source, self.frames, self.rate, self._with_sound = source, frames, wanted.rate, with_sound
        with self._readable(), opened_alone(source) as container:
            self.encoding = self._checked(container, wanted)
            others = self._others(container)
            self.has_others = bool(others)
            self.left_out = [track.type for track in others if not can_be_copied(track)]

    def _checked(self, container: av.container.InputContainer, wanted: Encoding) -> Encoding:
        if not container.streams.video:
            raise self._refused("has no picture track", "join to the video that the state belongs to")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise self._refused("is of a codec that is not known", "put the whole video back")
        named, pixels = _decoders_name(stream.codec_context.name), stream.codec_context.pix_fmt
        ours = {(codec.named, codec.pixels): name for name, codec in CODECS.items()}
        other = ours.get((named, pixels), wanted.codec)
        if other != wanted.codec:
            raise self._refused(f"was made with codec {other} and codec is {wanted.codec}", "use the same codec")
        if named != wanted.kind.named:
            raise self._refused("was made by another encoder", "keep its settings")
        if (stream.width, stream.height) != (wanted.width, wanted.height):
            raise self._refused(
                f"is {stream.width}x{stream.height} and the new frames are {wanted.width}x{wanted.height}",
                "use the same size",
            )
        looked_at = [packet for _, packet in zip(range(_LOOKED_AT), packets(container, stream), strict=False)]
        if rate := self._other_rate(looked_at):
            raise self._refused(f"has {rate:.6g} fps and fps is {float(wanted.rate):.6g}", "use the same fps")
        own = signature(wanted.kind.named, stream.codec_context.extradata)
        for matrix in (BT709, UNSPECIFIED) if wanted.codec == "h264" else (BT709,):
            encoding = replace(wanted, matrix=matrix)
            if encoding.signature() == own:
                return encoding
        quality = quality_of(bytes(looked_at[0])) if looked_at else ""
        if quality and float(quality) != wanted.quality:
            raise self._refused(
                f"was made with quality {quality} and quality is {wanted.quality}", "use the same quality"
            )
        raise self._refused("was made by another encoder, or by one with other settings", "keep its settings")

    def _others(self, container: av.container.InputContainer) -> list[av.stream.Stream]:
        pictures = container.streams.video[0].index
        return [
            track
            for track in container.streams
            if track.index != pictures and not (self._with_sound and track.type == "audio")
        ]

    def _refused(self, why: str, remedy: str) -> ValueError:
        return ValueError(f"{self.source.name} cannot be joined to: it {why}; {remedy}, or turn join off")

    def _other_rate(self, looked_at: list[av.Packet]) -> float:
        """The rate that the times of some frames show, where they are not those of the wanted rate; otherwise 0.

        By the frames' own times, since a reader's estimate of the rate differs between PyAV's versions.
        """
        if all(self._in_time(i, packet, looked_at[0].pts) for i, packet in enumerate(looked_at)):
            return 0.0
        first, last = looked_at[0].pts, looked_at[-1].pts
        if first is None or last is None:
            raise self._refused("is damaged: its frames have no times", "put the whole video back")
        span = (last - first) * looked_at[0].time_base
        return float((len(looked_at) - 1) / span) if span > 0 else 0.0

    def _in_time(self, number: int, packet: av.Packet, first: int) -> bool:
        """Whether a frame stands where the rate puts it, to a tick of the file's clock; `first` is the first one's time."""
        if packet.pts is None or first is None:
            return False
        return abs((packet.pts - first) * packet.time_base - number / self.rate) <= packet.time_base

    def copy(self, picture: Callable[[av.Packet], None]) -> None:
        """Hand over the frames' packets, with start codes as an encoder's have."""
        seen = 0
        with contextlib.closing(self._frames()) as frames:
            for packets_of_it in itertools.islice(frames, self.frames):
                for packet in packets_of_it:
                    picture(packet)
                seen += 1
        if seen < self.frames:
            raise ValueError(f"{self.source.name} holds {seen} frames of the {self.frames} that were to be joined")

    def _frames(self) -> Iterator[list[av.Packet]]:
        """Each frame's packets as an encoder would have given them. ValueError where the file is damaged, or out of step."""
        with self._readable(), opened_alone(self.source) as container:
            stream, first = container.streams.video[0], None
            # An mp4 holds NAL units by length; an encoder's packets, which the target expects, by start code.
            name = self.encoding.kind.to_start_codes
            to_start_codes = BitStreamFilterContext(name, stream) if name else None
            for number, packet in enumerate(packets(container, stream)):
                first = packet.pts if first is None else first
                if not self._in_time(
                    number, packet, first
                ):  # before the filter, which takes the packet's times with it
                    raise self._refused(f"changes its speed at frame {number}", "keep the video as it was written")
                yield list(to_start_codes.filter(packet)) if to_start_codes else [packet]

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """What FFmpeg says of a file that it cannot read, in words."""
        try:
            yield
        except (av.error.FFmpegError, OSError, UnicodeError) as error:
            raise self._refused("is damaged", "put the whole video back") from error

    @contextlib.contextmanager
    def other_tracks(self) -> Iterator[tuple[list[av.stream.Stream], Iterator[av.Packet]]]:
        """The tracks beside the pictures, sound above all, and their packets that begin before the last joined frame ends."""
        with opened_alone(self.source) as container:
            others, end = [t for t in self._others(container) if can_be_copied(t)], self.frames / self.rate
            yield others, (p for p in packets(container, *others) if p.dts * p.time_base < end)


def _decoders_name(name: str) -> str:
    """What a decoder decodes: AV1 has several."""
    return "av1" if "av1" in name or "dav1d" in name else name


def packets(container: av.container.InputContainer, *streams: av.stream.Stream) -> Iterator[av.Packet]:
    """The packets of some streams, of all where none is given, in the file's order."""
    return (packet for packet in container.demux(*streams) if packet.dts is not None)


def can_be_copied(track: av.stream.Stream) -> bool:
    """Whether PyAV can make a track with another's parameters; before 16 one without a codec ended the process."""
    return track.codec_context is not None or int(av.__version__.split(".")[0]) >= 16


def copied_track(target: av.container.OutputContainer, track: av.stream.Stream) -> av.stream.Stream:
    """A track of the target with another's parameters and metadata, for packets that are copied. ValueError if it cannot be."""
    if not can_be_copied(track):
        raise ValueError(f"PyAV {av.__version__} cannot copy its {track.type} track; PyAV 16 can")
    # Opaque: the parameters as they are. PyAV 14 would else open an encoder, which writes its own into the file.
    made = target.add_stream_from_template(track, opaque=True)
    made.metadata.update(track.metadata)
    return made
