"""Which features of a sound a pass over some latent frames is driven by, and how its encoder reads them.

The encoder of Wan 2.2 S2V reads video frames 4j - 8 .. 4j of what it is given for its output j, and takes what lies before the
first for as loud as that one. So two ways are one convolution over a few frames, of which the first outputs are left out:

"host": latent frame f reads video frames 4f - 8 .. 4f, those of the chunks before among them (ComfyUI's wan_sound_to_video). It
fits a video whose first latent frame is one picture.
"chunk": the four pictures of each latent frame begin at 4f, and a chunk hears nothing of what was before it (LiveAvatar). Its
decoder drops the first LEAD pictures, so pictures are that much ahead of the frames by which they were driven.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .track import AudioTrack

ALIGNMENTS = HOST, CHUNK = ("host", "chunk")
STRIDE = 4  # video frames a latent one
LEAD = STRIDE - 1
# how far back an output reads, in latent frames; and copies of a chunk's first frame that stand for all that was before it
_BACK, _COPIES = 2, 9


@dataclass(frozen=True)
class Heard:
    """What an encoder is given, [n, C] float32 on the CPU; its first `dropped` outputs are nobody's."""

    features: torch.Tensor
    dropped: int


@dataclass(frozen=True, eq=False)
class DrivingSound:
    """The sound of one rollout: `track` (None: silence, which is zeros, as they are beyond a sound's end), video frames a second,
    and one of ALIGNMENTS. ValueError for an alignment that is none."""

    track: AudioTrack | None
    fps: float
    alignment: str = HOST

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"audio is {self.alignment!r}; it must be one of {', '.join(ALIGNMENTS)}")

    @property
    def ahead(self) -> float:
        """Seconds of the sound before what is heard at the video's first picture, beside the track's own offset."""
        return LEAD / self.fps if self.alignment == CHUNK else 0.0

    def of(self, weights: torch.Tensor, first: int, frames: int, channels: int) -> Heard:
        """For a pass over latent frames `first` .. `first + frames`: the encoder then gives one output a latent frame.

        `weights` [layers] are the normalised ones of the track's layers, `channels` is C.
        """
        if self.alignment == HOST:
            begin = STRIDE * (first - _BACK)
            return Heard(self._rows(weights, begin, STRIDE * (frames + _BACK - 1) + 1, channels), _BACK)
        rows = self._rows(weights, STRIDE * first, STRIDE * frames, channels)
        return Heard(torch.cat([rows[:1].expand(_COPIES, -1), rows]), (_COPIES + LEAD) // STRIDE)

    def _rows(self, weights: torch.Tensor, first: int, count: int, channels: int) -> torch.Tensor:
        if self.track is None:
            return torch.zeros(count, channels)
        return self.track.folded(weights, self.fps, first, count)
