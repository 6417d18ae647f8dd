"""The H.264 encoder that the pack's videos are made with: its settings, and the parameter sets that follow from them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from fractions import Fraction

import av

from .colour import BT709

CODECS = {"h264": "libx264"}
_LIMITED = 1


@dataclass(frozen=True)
class Encoding:
    """What a video is encoded with. `quality` is the constant rate factor; `matrix` BT709, tagged so, or UNSPECIFIED,
    which is BT.601 without a tag, as the pack's files were before."""

    width: int
    height: int
    rate: Fraction
    codec: str = "h264"
    quality: int = 18
    matrix: int = BT709

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}; it must be one of {', '.join(CODECS)}")
        if self.width % 2 or self.height % 2:
            raise ValueError(f"the video is {self.width}x{self.height}; H.264 needs even sides")
        if self.rate <= 0:
            raise ValueError(f"fps is {float(self.rate):g}; it must be above 0")

    def add_to(self, container: av.container.OutputContainer) -> av.VideoStream:
        """A new stream of a container, with an encoder that holds no frame back."""
        stream = container.add_stream(CODECS[self.codec], rate=self.rate)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        stream.time_base = context.time_base = 1 / self.rate
        stream.options = {
            "crf": str(self.quality),
            "preset": "veryfast",
            "tune": "zerolatency",
            "bf": "0",
            "sc_threshold": "0",
            "forced-idr": "1",
            "g": "100000",
        }
        if self.matrix == BT709:
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = _LIMITED
        return stream

    def parameter_sets(self) -> list[bytes]:
        """The H.264 parameter sets that an encoder with these settings writes."""
        with av.open(io.BytesIO(), "w", format="mp4") as container:
            stream = self.add_to(container)
            container.start_encoding()
            return parameter_sets(stream.codec_context.extradata)


def parameter_sets(extradata: bytes | None) -> list[bytes]:
    """The H.264 parameter sets (NAL types 7 and 8) in an encoder's or an mp4's extradata."""
    extradata = extradata or b""
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


def quality_of(packet: bytes) -> str:
    """The constant rate factor that the encoder wrote into a video's first packet, or an empty string."""
    found = re.search(rb"x264 - core.{0,2000}?\bcrf=([0-9.]+)", packet, re.DOTALL)
    return f"{float(found[1]):g}" if found else ""
