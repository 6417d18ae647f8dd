"""The encoders that the pack's videos are made with: their settings, and what of a file must agree for packets to be joined.

No encoder holds a frame back for what comes after it (no B-frames, no lookahead), and each begins anew with every write.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy
from av.video.reformatter import VideoReformatter

from .colour import BT709, frame_of
from .deep_frames import deep_frame
from .frame_formats import has_encoder

_LIMITED = 1


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg's and the pixels that it is given; `named` is what FFmpeg calls what it makes.

    `chroma`: how many pixels across and down share a colour. `mime` is what a page asks its browser about. `to_start_codes`: the
    filter that brings packets of a file into the form that the encoder's have. `since`: the first PyAV whose encoder of it keeps
    every frame.
    """

    encoder: str
    pixels: str
    named: str
    mime: str
    suffix: str = ".mp4"
    chroma: tuple[int, int] = (2, 2)
    to_start_codes: str = ""
    least_side: int = 2
    since: int = 14

    @property
    def container(self) -> str:
        return {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}[self.suffix]

    @property
    def takes(self) -> str:
        """The form of the pictures that it is made of."""
        return "bytes" if self.pixels == "yuv420p" else "float"


_ALL = {
    "h264": Codec("libx264", "yuv420p", "h264", 'video/mp4; codecs="avc1.64001f"', to_start_codes="h264_mp4toannexb"),
    "hevc": Codec(
        "libx265", "yuv420p", "hevc", 'video/mp4; codecs="hvc1.1.6.L93.B0"', to_start_codes="hevc_mp4toannexb"
    ),
    "hevc_10bit": Codec(
        "libx265", "yuv420p10le", "hevc", 'video/mp4; codecs="hvc1.2.4.L93.B0"', to_start_codes="hevc_mp4toannexb"
    ),
    "av1": Codec("libsvtav1", "yuv420p", "av1", 'video/mp4; codecs="av01.0.05M.08"', least_side=64, since=16),
    "av1_10bit": Codec("libsvtav1", "yuv420p10le", "av1", 'video/mp4; codecs="av01.0.05M.10"', least_side=64, since=16),
    "prores": Codec("prores_ks", "yuv422p10le", "prores", 'video/quicktime; codecs="apch"', ".mov", (2, 1)),
    "ffv1": Codec("ffv1", "gbrp16le", "ffv1", 'video/x-matroska; codecs="ffv1"', ".mkv", (1, 1)),
}
_PYAV = int(av.__version__.split(".")[0])
# the AV1 encoder of PyAV 14 and 15 ends a file with a packet that shows nothing, in the place of the last frame
CODECS = {name: codec for name, codec in _ALL.items() if _PYAV >= codec.since and has_encoder(codec.encoder)}


@dataclass(frozen=True)
class Encoding:
    """What a video is encoded with. `quality` is the constant rate factor of those that have one; `matrix` BT709, tagged so, or
    UNSPECIFIED, which is BT.601 without a tag, as the pack's H.264 files were before."""

    width: int
    height: int
    rate: Fraction
    codec: str = "h264"
    quality: int = 18
    matrix: int = BT709

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}; it must be one of {', '.join(CODECS)}")
        across, down = self.kind.chroma
        if self.width % across or self.height % down:
            raise ValueError(f"the video is {self.width}x{self.height}; {_shown(self.codec)} needs even sides")
        if min(self.width, self.height) < self.kind.least_side:
            raise ValueError(
                f"the video is {self.width}x{self.height}; {_shown(self.codec)} needs sides of {self.kind.least_side} or more: "
                "choose another codec or a larger size"
            )
        if self.rate <= 0:
            raise ValueError(f"fps is {float(self.rate):g}; it must be above 0")

    @property
    def kind(self) -> Codec:
        return CODECS[self.codec]

    def add_to(self, container: av.container.OutputContainer) -> av.VideoStream:
        """A new stream of a container, with an encoder that holds no frame back."""
        stream = container.add_stream(self.kind.encoder, rate=self.rate)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, self.kind.pixels
        context = stream.codec_context
        stream.time_base = context.time_base = 1 / self.rate
        stream.options = self._options()
        if self.kind.named == "hevc":
            context.codec_tag = "hvc1"  # players of Apple's take no other
        if self.kind.encoder in ("prores_ks", "ffv1"):
            context.thread_type = "SLICE"  # threads of whole frames hold some back
        if self.kind.encoder == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # else it tells its settings on every start: errors alone
        if self.matrix == BT709 and not self.kind.pixels.startswith("gbr"):
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = _LIMITED
        return stream

    def _options(self) -> dict[str, str]:
        crf = str(self.quality)
        endless = {"g": "100000", "forced-idr": "1"}
        return {
            "libx264": {"crf": crf, "preset": "veryfast", "tune": "zerolatency", "bf": "0", "sc_threshold": "0"}
            | endless,
            "libx265": {
                "crf": crf,
                "preset": "veryfast",
                "tune": "zerolatency",
                "x265-params": "log-level=error:info=0",
            }
            | endless,
            # 0 would be its own default
            "libsvtav1": {"crf": str(max(1, self.quality)), "preset": "8", "g": "100000"}
            | {"svtav1-params": "pred-struct=1:lookahead=0:scd=0"},
            "prores_ks": {"profile": "3", "vendor": "apl0"},
            "ffv1": {"level": "3", "coder": "1", "slices": "4", "slicecrc": "1", "g": "1"},
        }[self.kind.encoder]

    def frame_of(self, picture: numpy.ndarray, converter: VideoReformatter) -> av.VideoFrame:
        """A picture [height, width, 3], in the form that the codec takes, as a frame in its pixels."""
        if self.kind.takes == "bytes":
            return frame_of(picture, self.matrix, converter)
        return deep_frame(picture, self.kind.pixels, self.kind.chroma)

    def signature(self) -> object:
        """What an encoder with these settings says of its packets; ValueError if it does not open with them."""
        try:
            with av.open(io.BytesIO(), "w", format=self.kind.container) as container:
                stream = self.add_to(container)
                container.start_encoding()
                return signature(self.kind.named, stream.codec_context.extradata)
        except av.error.FFmpegError as error:
            raise ValueError(
                f"the encoder of {_shown(self.codec)} does not take {self.width}x{self.height} at {float(self.rate):g} fps "
                f"({error.strerror}); choose another codec, or a smaller size"
            ) from error


def check_encoder(width: int, height: int, rate: Fraction, codec: str, quality: int, tried: bool = False) -> None:
    """ValueError, in a sentence, unless videos of this kind can be made: by the settings, and by trying where it is not H.264 of a
    size that models make (`tried`: by trying it, too)."""
    encoding = Encoding(width, height, rate, codec, quality)
    if codec != "h264" or tried:
        encoding.signature()


def _shown(codec: str) -> str:
    return {"h264": "H.264", "hevc": "HEVC", "hevc_10bit": "HEVC", "prores": "ProRes"}.get(codec, codec.upper())


def signature(named: str, extradata: bytes | None) -> object:
    """Of an encoder's or a file's extradata what has to agree for packets of both to follow each other in one track."""
    extradata = extradata or b""
    if named == "h264":
        return parameter_sets(extradata)
    if named == "hevc":
        return _hevc_sets(extradata)
    if named == "av1":  # in an mp4 behind four bytes of its own
        return extradata[4:] if extradata[:1] == b"\x81" else extradata
    # a file may hold one byte more, which is nothing
    return extradata.rstrip(b"\0") if named == "ffv1" else b""


def parameter_sets(extradata: bytes | None) -> list[bytes]:
    """The H.264 parameter sets (NAL types 7 and 8) in an encoder's or an mp4's extradata."""
    extradata = extradata or b""
    if extradata[:1] != b"\x01":
        return [unit for unit in _units(extradata) if unit[0] & 31 in (7, 8)]
    units, at = [], 5
    for _ in range(2):
        count, at = extradata[at] & 31, at + 1
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return units


def _hevc_sets(extradata: bytes) -> list[bytes]:
    """The same of HEVC (NAL types 32 to 34)."""
    if extradata[:1] != b"\x01":
        return [unit for unit in _units(extradata) if unit[0] >> 1 & 63 in (32, 33, 34)]
    units, at = [], 23
    for _ in range(extradata[22] if len(extradata) > 22 else 0):
        count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return [unit for unit in units if unit and unit[0] >> 1 & 63 in (32, 33, 34)]


def _units(extradata: bytes) -> list[bytes]:
    """NAL units between start codes."""
    return [unit for unit in re.split(b"\x00{2,3}\x01", extradata) if unit]


def quality_of(packet: bytes) -> str:
    """The constant rate factor that x264 wrote into a video's first packet, or an empty string."""
    found = re.search(rb"x264 - core.{0,2000}?\bcrf=([0-9.]+)", packet, re.DOTALL)
    return f"{float(found[1]):g}" if found else ""
