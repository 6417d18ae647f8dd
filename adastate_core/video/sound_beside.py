"""The sound of a folder of frames: a WAV file that is whole after every frame.

24 bits a sample. The header is rewritten last, so a reader takes what it counts; beyond 4 GiB it is the RF64 form (EBU Tech 3306),
whose table takes the place that was kept for it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from fractions import Fraction
from pathlib import Path

from ..audio.placed import PlacedSound
from .sound_track import SoundForm, in_24_bits

NAME = "sound.wav"
_MOST = 2**32 - 1
_TABLE = 28  # bytes of RF64's table of sizes, which is a block of nothing in a smaller file
_HEAD = 12 + 8 + _TABLE + 8 + 16 + 8  # RIFF, the table, fmt, and what is before the samples
_PIECE = 2**16  # samples that are written at once


class SoundBeside:
    """A growing WAV. `until` so many frames; `go_back` to fewer.

    `joined` is the folder of an earlier video whose sound before frame `kept` of this one is put in front, where it has the same
    form; else the given sound stands there, too. FileExistsError if there is one, OSError if the disk does not take it.
    """

    def __init__(
        self, folder: Path, placed: PlacedSound, frame_rate: Fraction, joined: Path | None = None, kept: int = 0
    ) -> None:
        self.form = SoundForm.of("wav", placed)
        self._placed, self._frame_rate = placed.in_form(self.form.rate, self.form.channels), frame_rate
        self._file = open(folder / NAME, "x+b")  # noqa: SIM115
        try:
            self._file.write(self._header(0))
            self._samples = self._copied(joined / NAME, self._until(kept)) if joined is not None else 0
            self._tell()
        except BaseException:
            self._file.close()
            raise

    @property
    def nbytes(self) -> int:
        return self._samples * self._width

    @property
    def _width(self) -> int:
        """Bytes of a sample of all channels."""
        return 3 * self.form.channels

    def _until(self, frames: int) -> int:
        """Samples of so many frames."""
        return round(frames * self.form.rate / self._frame_rate)

    def until(self, frames: int) -> None:
        """Have the sound of the first `frames` frames in it."""
        self._file.seek(_HEAD + self.nbytes)
        while (left := self._until(frames) - self._samples) > 0:
            count = min(left, _PIECE)
            self._file.write(in_24_bits(self._placed.samples(self._samples, count)))
            self._samples += count
        self._tell()

    def go_back(self, frames: int) -> None:
        """Only the sound of the first `frames` frames stays."""
        self._samples = min(self._samples, self._until(frames))
        self._tell()
        self._file.truncate(_HEAD + self.nbytes)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _tell(self) -> None:
        """Write the header that counts all samples, once they are written."""
        self._file.flush()
        self._file.seek(0)
        self._file.write(self._header(self._samples))
        self._file.flush()

    def _header(self, samples: int) -> bytes:
        data = samples * self._width
        whole, large = _HEAD - 8 + data, _HEAD - 8 + data > _MOST
        kind, table = (b"RF64", b"ds64") if large else (b"RIFF", b"JUNK")
        sizes = struct.pack("<QQQI", whole, data, samples, 0) if large else bytes(_TABLE)
        rate, channels = self.form.rate, self.form.channels
        return (
            kind + struct.pack("<I", min(whole, _MOST)) + b"WAVE" + table + struct.pack("<I", _TABLE) + sizes
            + b"fmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * self._width, self._width, 24)
            + b"data" + struct.pack("<I", min(data, _MOST))
        )  # fmt: skip

    def _copied(self, old: Path, samples: int) -> int:
        """How many samples, of the first ones, were copied from an older file of the same form."""
        done, after = 0, _HEAD - 8 - 24
        with contextlib.suppress(FileNotFoundError), open(old, "rb") as file:
            head = file.read(_HEAD)
            if head[after:-4] != self._header(0)[after:-4]:
                return 0
            while done < samples and (piece := file.read(min(samples - done, _PIECE) * self._width)):
                whole = len(piece) // self._width
                self._file.write(piece[: whole * self._width])
                done += whole
        return done
