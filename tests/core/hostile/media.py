"""Videos and sounds that mean harm: whole ones of every container, and what bytes, boxes and headers make of them."""

from __future__ import annotations

import io
import random
import struct
from fractions import Fraction

import av
import numpy
from PIL import Image

from .damage import NUMBERS, damaged, damaged_boxes, number

SIDE, FRAMES = 32, 20
# container's ending, FFmpeg's name of it, codec, format of pixels
VIDEOS = (
    ("mp4", "mp4", "libx264", "yuv420p"),
    ("mkv", "matroska", "libx264", "yuv420p"),
    ("webm", "webm", "libvpx-vp9", "yuv420p"),
    ("mov", "mov", "mjpeg", "yuvj420p"),
    ("mov", "mov", "prores_ks", "yuv422p10le"),
    ("avi", "avi", "mpeg4", "yuv420p"),
    ("ts", "mpegts", "mpeg2video", "yuv420p"),
    ("flv", "flv", "flv", "yuv420p"),
    ("gif", "gif", "gif", "rgb8"),
    ("mkv", "matroska", "ffv1", "yuv420p"),
)
SOUNDS = (
    ("wav", "wav", "pcm_s16le"),
    ("wav", "wav", "pcm_f32le"),
    ("wav", "wav", "pcm_s24le"),
    ("flac", "flac", "flac"),
    ("mp3", "mp3", "libmp3lame"),
    ("ogg", "ogg", "flac"),
    ("opus", "ogg", "libopus"),
    ("m4a", "ipod", "aac"),
    ("aac", "adts", "aac"),
    ("mka", "matroska", "libopus"),
    ("mp4", "mp4", "aac"),
)
RATES = (0, 1, 2, 7, 99, 999, 8_000, 44_100, 48_000, 192_001, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def video(form: str, codec: str, pixels: str, side: int = SIDE, frames: int = FRAMES) -> bytes:
    """A small video of a moving bar."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = side, side, pixels
        stream.codec_context.gop_size = 8
        for i in range(frames):
            picture = numpy.full((side, side, 3), 90, numpy.uint8)
            picture[:, i % side] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def sound(form: str, codec: str, rate: int = 16_000, seconds: float = 0.5) -> bytes:
    """A tone of one channel."""
    out, rate = io.BytesIO(), 48_000 if codec == "libopus" else rate
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        planes = 0.4 * numpy.sin(numpy.arange(round(rate * seconds)) * 0.05)
        resampler = av.AudioResampler(
            format=stream.format.name, layout="mono", rate=rate, frame_size=stream.codec_context.frame_size or 1024
        )
        frame = av.AudioFrame.from_ndarray(planes.astype(numpy.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for each in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(each))
        container.mux(stream.encode(None))
    return out.getvalue()


def animation(kind: str, frames: int = 6) -> bytes:
    """An animated picture."""
    out = io.BytesIO()
    pictures = [Image.new("RGB", (SIDE, SIDE), (40 * i, 90, 0)) for i in range(frames)]
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:], duration=60)
    return out.getvalue()


def hostile_video(ending: str, whole: bytes, chance: random.Random) -> tuple[bytes, str]:
    """(a file made of a whole one, what was done)."""
    if ending in ("mp4", "mov", "m4a") and chance.random() < 0.65:
        return damaged_boxes(whole, chance)
    if chance.random() < 0.12:
        name = chance.choice(list(_FALSE))
        return _FALSE[name](), name
    return damaged(whole, chance, head=0.7)


def hostile_sound(ending: str, whole: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The same of a sound."""
    if chance.random() < 0.35:
        name = chance.choice(list(_FALSE_SOUNDS))
        data, what = _FALSE_SOUNDS[name](chance)
        return data, f"{name} {what}"
    if ending == "flac" and chance.random() < 0.5:
        return _flac(whole, chance)
    return hostile_video(ending, whole, chance)


def large_gif(side: int = 65_535) -> bytes:
    """One picture of that side in few bytes."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00;"


def large_png(side: int) -> bytes:
    """The same as PNG: a header that says so, and no more than a few rows."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99_999))) + chunk(b"IEND", b"")


def large_video(side: int = 16_384, frames: int = 4) -> bytes:
    """A plain video of one colour, of few bytes and very many pixels."""
    return video("matroska", "libx264", "yuv420p", side, frames)


def _list() -> bytes:
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/etc/passwd\n#EXT-X-ENDLIST\n"


_FALSE = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(5000),
    "text": lambda: b"no video " * 99,
    "list": _list,
    "concat": lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "dash": lambda: (
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>'
    ),
    "sdp": lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "gif of 65535": large_gif,
    "gif of 12000": lambda: large_gif(12_000),
    "png of 30000": lambda: large_png(30_000),
    "png of 12000": lambda: large_png(12_000),
    "png of 2^31": lambda: large_png(2**31 - 1),
    "zip": lambda: b"PK\x03\x04" + bytes(99),
    "pickle": lambda: b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "y4m of 60000": lambda: b"YUV4MPEG2 W60000 H60000 F16:1 Ip C420\nFRAME\n" + bytes(9000),
    "y4m of rate 0": lambda: b"YUV4MPEG2 W32 H32 F0:0 Ip C420\n" + (b"FRAME\n" + bytes(32 * 32 * 3 // 2)) * 3,
    "y4m of a fast rate": lambda: (
        b"YUV4MPEG2 W32 H32 F2147483647:1 Ip C420\n" + (b"FRAME\n" + bytes(32 * 32 * 3 // 2)) * 3
    ),
    "y4m of a slow rate": lambda: (
        b"YUV4MPEG2 W32 H32 F1:2147483647 Ip C420\n" + (b"FRAME\n" + bytes(32 * 32 * 3 // 2)) * 3
    ),
}


def _wav(chance: random.Random) -> tuple[bytes, str]:
    """A WAV whose header lies: channels, rate, bits, kind and sizes."""
    channels, rate = chance.choice([0, 1, 2, 3, 64, 255, 65_535]), chance.choice(RATES)
    bits, kind = chance.choice([0, 1, 8, 16, 24, 32, 64, 255]), chance.choice([0, 1, 1, 1, 3, 6, 7, 0x11, 0x55, 0xFFFE])
    size, align = (
        chance.choice([4000, 4000, *NUMBERS]) % 2**32,
        chance.choice([0, 1, 2, 4, channels * bits // 8 % 65_536]),
    )
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align % 2**32, align, bits)
    data = (
        b"RIFF"
        + struct.pack("<I", chance.choice([4036, *NUMBERS]) % 2**32)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
    )
    return data + b"data" + struct.pack("<I", size) + chance.randbytes(
        4000
    ), f"{channels} {rate} {bits} {kind} {size} {align}"


def _slow_wav(chance: random.Random) -> tuple[bytes, str]:
    """A WAV of a rate that makes it last for days, or for no time."""
    rate, channels, count = (
        chance.choice([1, 2, 10, 100, 999, 2**24, 2**31 - 1]),
        chance.choice([1, 2, 9]),
        chance.choice([900, 400_000]),
    )
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels % 2**32, channels, 8)
    data = b"RIFF" + struct.pack("<I", 36 + count) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return data + b"data" + struct.pack("<I", count) + bytes(count), f"{rate} {channels}"


def _rf64(chance: random.Random) -> tuple[bytes, str]:
    size = chance.choice(NUMBERS) % 2**64
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    table = b"ds64" + struct.pack("<IQQQI", 28, size, size, size, chance.choice([0, 2**32 - 1]))
    return b"RF64\xff\xff\xff\xffWAVE" + table + form + b"data\xff\xff\xff\xff" + chance.randbytes(3000), str(size)


def _long_flac(chance: random.Random) -> tuple[bytes, str]:
    """A sound of nothing, of few bytes and very many samples."""
    seconds = chance.choice([600, 4000])
    with_rate = chance.choice([48_000, 655_350])
    out = io.BytesIO()
    with av.open(out, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=with_rate, layout="stereo")
        stream.codec_context.format = "s16"
        silence = numpy.zeros((1, 2 * 4608), numpy.int16)
        packets = []
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = with_rate, 4608 * i
            packets += stream.encode(frame)
        for packet in packets:
            container.mux(packet)
        container.mux(stream.encode(None))
    whole = out.getvalue()
    at = whole.index(b"\xff\xf8")
    frames = whole[at:]
    return whole[:at] + frames * (seconds * 48_000 // 4608 // 4), f"{seconds} s at {with_rate}"


def _late(chance: random.Random) -> tuple[bytes, str]:
    """A track that begins hours after the file does: what comes first is silence."""
    out, rate, late = io.BytesIO(), 48_000, chance.choice([100, 5000, 40_000, 10**7])
    with av.open(out, "w", format="matroska") as container:
        pictures = container.add_stream("mpeg4", rate=16)
        pictures.width = pictures.height = 32
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        picture = av.VideoFrame.from_ndarray(numpy.zeros((32, 32, 3), numpy.uint8), format="rgb24")
        container.mux(pictures.encode(picture))
        container.mux(pictures.encode(None))
        packet = av.Packet(bytes(2000))
        packet.stream, packet.time_base = stream, Fraction(1, rate)
        packet.pts = packet.dts = late * rate
        container.mux(packet)
    return out.getvalue(), f"{late} s"


def _flac(whole: bytes, chance: random.Random) -> tuple[bytes, str]:
    """STREAMINFO, 34 bytes from the eighth on: block sizes, rate, channels, bits and how many samples."""
    out = bytearray(whole)
    at = chance.choice([8, 10, 18, 18, 18, 21, 26])
    size = chance.choice([2, 4, 8])
    out[at : at + size] = number(size, chance)
    return bytes(out), f"STREAMINFO {at}"


_FALSE_SOUNDS = {
    "wav": _wav,
    "wav ": _wav,
    "slow wav": _slow_wav,
    "rf64": _rf64,
    "long flac": _long_flac,
    "late": _late,
}
