"""The sound of a growing video, packet by packet beside its pictures.

All packets stand on one grid that begins with the file, of 1024 samples in AAC and of 10 ms else, so that a track is gone on
with wherever it was left: whole packets are copied, and those behind them are made of the sound at the same places. AAC's packet
k is heard as samples (k - 1) * 1024 .. k * 1024, since its encoder is a packet late, and half of it overlaps its neighbours: an
encoder that begins in the middle is given some packets more in front, which are not written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy
import torch

from ..audio.placed import PlacedSound
from .frames import opened_alone

_AAC_PACKET = 1024
_WARM_UP = 16  # packets
_AAC_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)
_PCM_RATES = (192_000, 176_400, 96_000, 88_200, 64_000, *_AAC_RATES)
_OTHERWISE = 48_000
_BITS, _BITS_A_SAMPLE = 96_000, 5  # a second and channel; the latter bounds it for low rates
_STEPS = 2**23  # of 24 bits
_LAYOUTS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True)
class SoundForm:
    """What a track of sound is: `encoder` is FFmpeg's name, aac or pcm_s24le."""

    encoder: str
    rate: int
    channels: int

    @staticmethod
    def of(container: str, placed: PlacedSound) -> SoundForm:
        """What a sound becomes in a container: AAC in an mp4, which all players take, and else 24 bits a sample as they are."""
        encoder = "aac" if container == "mp4" else "pcm_s24le"
        rate = placed.sound.rate
        known = rate in (_AAC_RATES if encoder == "aac" else _PCM_RATES)
        return SoundForm(encoder, rate if known else _OTHERWISE, min(2, placed.sound.waveform.shape[0]))

    @property
    def size(self) -> int:
        """Samples of a packet."""
        return _AAC_PACKET if self.encoder == "aac" else max(1, self.rate // 100)

    @property
    def late(self) -> int:
        """Samples that its encoder is late."""
        return _AAC_PACKET if self.encoder == "aac" else 0

    def begin(self, packet: int) -> Fraction:
        """Where a packet stands in the file, in seconds."""
        return Fraction(packet * self.size - self.late, self.rate)

    def end(self, packet: int) -> Fraction:
        """Where it ends."""
        return self.begin(packet + 1)

    def add_to(self, container: av.container.OutputContainer) -> av.AudioStream:
        """A new stream of a container for it."""
        stream = container.add_stream(self.encoder, rate=self.rate, layout=_LAYOUTS[self.channels])
        stream.time_base = stream.codec_context.time_base = Fraction(1, self.rate)
        if self.encoder == "aac":
            stream.bit_rate = self.channels * min(_BITS, self.rate * _BITS_A_SAMPLE)
        return stream


def in_24_bits(samples: torch.Tensor) -> bytes:
    """float32 [C, n] in -1..1 as whole numbers of three bytes, lowest first, channels side by side; beyond that it is cut off."""
    steps = (samples.double() * _STEPS).round().clamp(-_STEPS, _STEPS - 1).to(torch.int32).T.contiguous()
    return steps.numpy().astype("<i4").view(numpy.uint8).reshape(-1, 4)[:, :3].tobytes()


class EarlierSound:
    """The sound of an earlier video: `form` is what it is, None where it cannot be gone on with; `told` is it in words, empty where
    there is none."""

    def __init__(self, source: Path) -> None:
        self.source, self.form, self.told = source, None, ""
        try:
            self._look()
        except (av.error.FFmpegError, UnicodeError):
            self.form, self.told = None, self.told or "damaged"

    def _look(self) -> None:
        with opened_alone(self.source) as container:
            if not container.streams.audio:
                return
            stream = container.streams.audio[0]
            if (context := stream.codec_context) is None:
                self.told = "unknown"
                return
            self.told = f"{context.name}, {context.sample_rate} Hz, {context.channels} channels"
            if context.name in ("aac", "pcm_s24le") and context.channels in _LAYOUTS:
                form = SoundForm(context.name, context.sample_rate, context.channels)
                first = next((packet for packet in container.demux(stream) if packet.pts is not None), None)
                in_time = (
                    first is not None and abs(first.pts * stream.time_base - form.begin(0)) <= stream.time_base / 2
                )
                on_grid = form.encoder != "aac" or _is_plain_aac(form, stream)
                self.form = form if in_time and on_grid else None

    def packets(self, end: Fraction) -> Iterator[bytes]:
        """Those on the grid, from the first one on and without a gap, that are heard to their ends before `end` seconds."""
        with opened_alone(self.source) as container:
            stream = container.streams.audio[0]
            found = _readable(packet for packet in container.demux(stream) if packet.pts is not None and packet.size)
            made = self._cut(found) if self.form.encoder != "aac" else self._in_place(found)
            for number, data in enumerate(made):
                if self.form.end(number) > end:
                    return
                yield data

    def _in_place(self, found: Iterator[av.Packet]) -> Iterator[bytes]:
        for number, packet in enumerate(found):
            if packet.pts * packet.time_base != self.form.begin(number):
                return
            yield bytes(packet)

    def _cut(self, found: Iterator[av.Packet]) -> Iterator[bytes]:
        """Samples as they follow each other, in packets of the grid: a container joins and parts them."""
        size, held = self.form.size * self.form.channels * 3, b""
        for packet in found:
            held += bytes(packet)
            while len(held) >= size:
                yield held[:size]
                held = held[size:]


def _readable(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Those up to where a file is damaged."""
    try:
        yield from packets
    except av.error.FFmpegError:
        return


def _is_plain_aac(form: SoundForm, stream: av.AudioStream) -> bool:
    """Whether a track's AudioSpecificConfig says what our encoder makes, AAC-LC in frames of 1024, of this rate and layout, and its
    clock counts samples."""
    tables = (96_000, 88_200, 64_000, *_AAC_RATES)
    wanted = (2 << 11) | (tables.index(form.rate) << 7) | (form.channels << 3) if form.rate in tables else -1
    told = int.from_bytes((stream.codec_context.extradata or b"")[:2], "big")
    return told == wanted and stream.time_base == Fraction(1, form.rate)


def ends_by(packet: av.Packet, end: Fraction) -> bool:
    """Whether a packet belongs into a file that ends at `end` seconds: one of sound that begins earlier, which then lasts no longer
    than until there, or any other."""
    if packet.stream.type != "audio":
        return True
    left = int(end / packet.time_base) - packet.pts
    packet.duration = max(0, min(packet.duration or left, left))
    return left > 0


class SoundTrack:
    """A stream of sound in a container whose pictures are being written: `after` each picture, `finish` behind the last one.

    `earlier` is the sound of the video whose pictures are copied in front, up to `joined` seconds: where it has a form that can be
    gone on with, that is this track's, and its packets are copied. ValueError, OSError or PyAV's if it cannot be read.
    """

    def __init__(
        self,
        container: av.container.OutputContainer,
        placed: PlacedSound,
        earlier: EarlierSound | None = None,
        joined: Fraction = Fraction(0),
    ) -> None:
        copied = earlier if earlier is not None and earlier.form is not None else None
        self.form = copied.form if copied else SoundForm.of(container.format.name, placed)
        self._placed = placed.in_form(self.form.rate, self.form.channels)
        self._container, self.stream, self._number = container, self.form.add_to(container), 0
        self._coming, self._broken = self._packets(copied, joined), False

    def after(self, seconds: Fraction) -> None:
        """A picture that stands at `seconds` is written: what begins until then, and a packet that begins later, since until one
        comes the container holds the picture back. Once the container has refused a packet nothing more is written."""
        while not self._broken and (not self._number or self.form.begin(self._number - 1) <= seconds):
            self._mux(next(self._coming))

    def finish(self, end: Fraction) -> None:
        """What begins before `end` seconds, where the last picture ends."""
        while not self._broken and self.form.begin(self._number) < end:
            self._mux(next(self._coming))

    def _mux(self, data: bytes) -> None:
        packet = av.Packet(data)
        packet.stream, packet.time_base = self.stream, Fraction(1, self.form.rate)
        packet.pts = packet.dts = self._number * self.form.size - self.form.late
        packet.duration, packet.is_keyframe = self.form.size, True
        self._broken = True
        self._container.mux(packet)
        self._broken = False
        self._number += 1

    def _packets(self, earlier: EarlierSound | None, joined: Fraction) -> Iterator[bytes]:
        """All there are; they do not end."""
        first = 0
        for data in earlier.packets(joined) if earlier else ():
            yield data
            first += 1
        yield from self._encoded(first) if self.form.encoder == "aac" else self._plain(first)

    def _encoded(self, first: int) -> Iterator[bytes]:
        begin = made = max(0, first - _WARM_UP)
        for number in itertools.count(begin):
            samples = self._placed.samples(number * self.form.size, self.form.size).numpy()
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_LAYOUTS[self.form.channels])
            frame.sample_rate, frame.pts = self.form.rate, number * self.form.size
            frame.time_base = Fraction(1, self.form.rate)
            for packet in self.stream.encode(frame):
                if made >= first:
                    yield bytes(packet)
                made += 1

    def _plain(self, first: int) -> Iterator[bytes]:
        for number in itertools.count(first):
            yield in_24_bits(self._placed.samples(number * self.form.size, self.form.size))
