"""Single pictures as files: PNG, TIFF, EXR and WebP, encoded from the decoder's own values by FFmpeg, through imageio.

imageio is imported when the first encoder is made. Its own writers refuse 16-bit RGB in PNG, and EXR; its pyav plugin hands the
pictures to the FFmpeg that PyAV carries, and fetches nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import numpy
from PIL.PngImagePlugin import PngInfo, putchunk

# a PNG's signature and its first block, IHDR: what follows may be text
_PNG_HEAD = 33


@dataclass(frozen=True)
class FrameFormat:
    """How a picture becomes a file. `encoder` is FFmpeg's; `given` and `encoded` are its names of the pixels that the encoder is
    handed and that it writes; `value_bytes`, what a value takes before it is compressed. `animated`: one file holds them all."""

    suffix: str
    encoder: str
    given: str
    encoded: str
    value_bytes: int
    packed: Callable[[numpy.ndarray], numpy.ndarray]
    animated: bool = False
    most_side: int = 2**30


def levels(picture: numpy.ndarray, most: int) -> numpy.ndarray:
    """float32 in 0..1 to the nearest of 0..most, float64: the product of a float32 and 16 bits is exact there."""
    return numpy.rint(picture.astype(numpy.float64) * most).clip(0, most)


def _bytes(picture: numpy.ndarray) -> numpy.ndarray:
    return levels(picture, 255).astype(numpy.uint8)


def _planes(picture: numpy.ndarray) -> numpy.ndarray:
    """Green, blue and red, as FFmpeg's planar RGB has them."""
    return picture.transpose(2, 0, 1)[[1, 2, 0]].astype("<f4")


_ALL = {
    "png": FrameFormat(".png", "png", "rgb24", "rgb24", 1, _bytes),
    "png16": FrameFormat(".png", "png", "rgb48be", "rgb48be", 2, lambda x: levels(x, 65535).astype(">u2")),
    "tiff16": FrameFormat(".tiff", "tiff", "rgb48le", "rgb48le", 2, lambda x: levels(x, 65535).astype("<u2")),
    "exr": FrameFormat(".exr", "exr", "gbrpf32le", "gbrpf32le", 4, _planes),
    "webp": FrameFormat(".webp", "libwebp", "rgb24", "bgra", 1, _bytes, animated=True, most_side=16383),
}


def check_format(width: int, height: int, name: str) -> None:
    """ValueError, in a sentence, for pictures that the format cannot hold."""
    if max(width, height) > (most := FRAME_FORMATS[name].most_side):
        raise ValueError(
            f"the frames are {width}x{height}, and {name} holds at most {most} across and down; choose png"
        )


@cache
def has_encoder(name: str) -> bool:
    """Whether the FFmpeg that PyAV was built with has an encoder of this name."""
    try:
        av.codec.Codec(name, "w")
    except Exception:  # noqa: BLE001  PyAV's versions raise different ones
        return False
    return True


FRAME_FORMATS = {name: form for name, form in _ALL.items() if has_encoder(form.encoder)}


def require_imageio() -> None:
    """RuntimeError, in a sentence, where imageio is missing or too old for frames."""
    try:
        from imageio.plugins.pyav import PyAVPlugin
    except ImportError as error:
        raise RuntimeError(
            "writing frames needs the package imageio (2.38 or newer), which is not installed here; run pip install -r "
            "requirements.txt in the pack's folder, with ComfyUI's Python"
        ) from error
    if not hasattr(PyAVPlugin, "write_frame"):
        raise RuntimeError(
            "writing frames needs imageio 2.38 or newer; run pip install -U imageio with ComfyUI's Python"
        )


class PictureEncoder:
    """Pictures of one size to the bytes of their files, one after another: `encode`, and `close` at the end."""

    def __init__(self, form: FrameFormat, fps: float) -> None:
        from imageio.v3 import imopen

        self.form, self._data = form, io.BytesIO()
        self._plugin = imopen(
            self._data,
            "w",
            plugin="pyav",
            extension=form.suffix,
            container="image2pipe",
            options={"flush_packets": "1"},
        )
        self._plugin.init_video_stream(form.encoder, fps=fps, pixel_format=form.encoded)

    def encode(self, picture: numpy.ndarray) -> bytes:
        """float32 [height, width, 3] in 0..1 as a file."""
        self._plugin.write_frame(self.form.packed(picture), pixel_format=self.form.given)
        data = self._data.getvalue()
        self._data.seek(0)
        self._data.truncate()
        if not data:
            raise RuntimeError(f"the encoder {self.form.encoder} held a picture back; take another format")
        return data

    def close(self) -> None:
        """Let the encoder go; what was encoded stays."""
        self._plugin.close()


def text_blocks(metadata: Mapping[str, Any]) -> bytes:
    """Blocks of a PNG with `metadata` as JSON, each value under its name, as the host's Save Image writes them. A name beyond
    Latin-1, which a PNG cannot have, is left out with its value."""
    info, out = PngInfo(), io.BytesIO()
    for name, value in metadata.items():
        if all(ord(character) < 256 for character in name):
            info.add_text(name, json.dumps(value))
    for kind, data, *_ in info.chunks:
        putchunk(out, kind, data)
    return out.getvalue()


def with_text(png: bytes, blocks: bytes) -> bytes:
    """A PNG with blocks of text before its pixels."""
    return png[:_PNG_HEAD] + blocks + png[_PNG_HEAD:]
