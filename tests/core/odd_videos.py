"""Videos that are broken, odd or no videos at all, made from small whole ones; the same on every run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy
from PIL import Image

# container's ending, codec, format of pixels
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mkv": ("libx264", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "mov": ("mjpeg", "yuvj420p"),
    "ts": ("mpeg2video", "yuv420p"),
    "flv": ("flv", "yuv420p"),
    "gif": ("gif", "rgb8"),
}
SIDE, FRAMES = 64, 24


def write(path: Path, codec: str, pixels: str, frames: int = FRAMES, width: int = SIDE, height: int = SIDE) -> Path:
    """A small video of a moving bar."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size = 8
        for i in range(frames):
            picture = numpy.full((height, width, 3), 90, numpy.uint8)
            picture[:, i % width] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> Path:
    """Half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def broken(folder: Path) -> Iterator[Path]:
    """Files that are damaged: cut, turned over, emptied and overwritten. Some of them still hold pictures."""
    random = numpy.random.default_rng(7)
    for kind, (codec, pixels) in KINDS.items():
        whole = write(folder / f"whole.{kind}", codec, pixels).read_bytes()
        half, places = len(whole) // 2, random.integers(0, len(whole), 40)
        spotted, zeros, noise = (bytearray(whole) for _ in range(3))
        for place in places:
            spotted[place] ^= 0xFF
        zeros[: len(whole) // 3] = bytes(len(whole) // 3)
        noise[half:] = random.integers(0, 256, len(whole) - half, numpy.uint8).tobytes()
        for what, data in {
            "head": whole[:48],
            "half": whole[:half],
            "cut": whole[:-100],
            "tail": whole[half:],
            "spotted": bytes(spotted),
            "zeros": bytes(zeros),
            "noise": bytes(noise),
            "back": whole[::-1],
            "empty": b"",
        }.items():
            path = folder / f"{what}.{kind}"
            path.write_bytes(data)
            yield path


def no_videos(folder: Path) -> Iterator[Path]:
    """Files that hold no picture at all, under names of videos and under their own."""
    for kind in ("mp4", "mkv", "webm", "avi", "ts", "gif"):
        (folder / f"text.{kind}").write_text("no video " * 60)
        yield folder / f"text.{kind}"
        (folder / f"random.{kind}").write_bytes(numpy.random.default_rng(3).bytes(4000))
        yield folder / f"random.{kind}"
    yield sound(folder / "sound.mp4")
    yield sound(folder / "sound.mkv")
    with zipfile.ZipFile(folder / "archive.mp4", "w") as archive:
        archive.writestr("a.txt", "a" * 500)
    yield folder / "archive.mp4"
    (folder / "folder.mp4").mkdir()
    yield folder / "folder.mp4"
    yield folder / "missing.mp4"
    whole = write(folder / "known.mp4", "libx264", "yuv420p").read_bytes()
    (folder / "codec.mp4").write_bytes(whole.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    yield folder / "codec.mp4"


def lists(folder: Path, other: Path) -> Iterator[Path]:
    """Files that lead a player to `other`: playlists, scripts and patterns of names."""
    where, name = str(other), other.name
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{where}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        f'bandwidth="1" width="64" height="64"><BaseURL>{where}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )
    texts = {
        "list.m3u8": hls,
        "list.m3u": hls,
        "near.m3u8": hls.replace(where, name),
        "web.m3u8": hls.replace(where, "http://127.0.0.1:9/a.ts"),
        "hls.mp4": hls,
        "hls.ts": hls,
        "concat.txt": f"ffconcat version 1.0\nfile '{where}'\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{name}'\n",
        "concat.ffconcat": f"ffconcat version 1.0\nfile '{name}'\n",
        "old.txt": f"file '{name}'\n",
        "dash.mpd": dash,
        "dash.mp4": dash,
        "call.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "list.pls": f"[playlist]\nFile1={where}\nNumberOfEntries=1\n",
        "list.asx": f'<asx version="3.0"><entry><ref href="{where}"/></entry></asx>',
        "picture.svg": f'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><image href="{where}"/></svg>',
    }
    for file, text in texts.items():
        (folder / file).write_text(text)
        yield folder / file
    for i in range(3):
        Image.new("RGB", (SIDE, SIDE), (80 * i, 0, 0)).save(folder / f"row{i}.png")
    yield folder / "row%d.png"
    yield Path(f"concat:{where}")
    yield Path(f"file:{where}")


def picture(kind: str) -> bytes:
    """One picture in a file of its own."""
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 40, 40)).save(out, kind)
    return out.getvalue()


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose track is shown by the display matrix (a, b, c, d), each -1, 0 or 1."""
    out, at = bytearray(data), data.index(b"tkhd") + 4
    at += 52 if data[at] else 40
    for place, value in zip((0, 1, 3, 4), matrix, strict=True):
        out[at + 4 * place : at + 4 * place + 4] = (value * 65536 % 2**32).to_bytes(4, "big")
    return bytes(out)
