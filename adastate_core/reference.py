"""The picture that a video driven by sound shows: tokens that every pass attends to (Wan 2.2 S2V; LiveAvatar).

A latent frame of the picture is one frame of tokens, and the 19 latent frames before the video, in which it is taken to have stood
still, are one and a half more: the newest as it is, the two before in patches twice as large, the 16 before those in patches four
times as large. They go through the model once, at timestep 0 and among themselves. Their keys are kept as they were before the
rotation, and every pass turns them to places in time of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

# latent frames that are taken to lie before the video
MOTION_FRAMES = 19
# the least that a side of a latent is: a patch of the oldest frames
LEAST_SIDE = 8
# where the picture stands at least, and how far beyond a chunk's first frame
EARLIEST, NEAREST, FARTHEST = 30, 4, 30
# the times of the 19 frames' tokens: the newest, the two before, and the 16 before those by fours
_MOTION_TIMES = (-1, -3, -19, -14, -9, -4)


@dataclass(frozen=True)
class ReferenceRule:
    """How a system uses the picture. `rolls_at`: for chunks from this latent frame on the video's first latent frame stands in its
    place, but not in that of the frames before the video (0: never). `drawn`: how far beyond a chunk it stands is drawn anew for
    every pass, from the seed; else NEAREST."""

    rolls_at: int = 0
    drawn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rolls_at <= 10**6:
            raise ValueError(f"reference_rolls is {self.rolls_at}; it must be a latent frame, or 0 for never")

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def distance(self, seed: int, chunk: int, step: int) -> int:
        """Latent frames from a chunk's first frame to the picture at noisy pass `step` of a generated chunk, NEAREST to FARTHEST:
        the first 8 bytes of SHA-256 of "seed/chunk/step/reference", as the noise has its seed."""
        if not self.drawn:
            return NEAREST
        digest = hashlib.sha256(f"{seed}/{chunk}/{step}/reference".encode("ascii")).digest()
        return NEAREST + int.from_bytes(digest[:8], "big") % (FARTHEST - NEAREST + 1)

    def rolled(self, first_frame: int) -> bool:
        """Whether the video's first latent frame is the picture of the chunk from `first_frame` on."""
        return 0 < self.rolls_at <= first_frame


def reference_tokens(rows: int, columns: int) -> int:
    """How many tokens there are beside a latent of `rows` x `columns` tokens a frame: 2.5 frames of them."""
    return len(token_places(rows, columns)[0])


def times(content: float, distance: int) -> tuple[float, ...]:
    """The times that the tokens of `token_places` have, for a pass whose content begins at `content`."""
    return float(max(EARLIEST, content + distance)), *map(float, _MOTION_TIMES)


def token_places(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(which of `times`, which place of a frame, row by row) of every token, int64 [N]; in the order [picture | newest | two | 16].

    A larger patch stands at a row and a column of the plain ones, evenly spaced over them and rounded down (the original's; the
    host has other places).
    """
    which, places = [torch.zeros(rows * columns), torch.ones(rows * columns)], [torch.arange(rows * columns)] * 2
    for time, scale in ((2, 2), *((3 + i, 4) for i in range(4))):
        down, across = (_spaced(sides, sides // scale) for sides in (rows, columns))
        places.append((down[:, None] * columns + across).flatten())
        which.append(torch.full((len(places[-1]),), float(time)))
    return torch.cat(which).long(), torch.cat(places)


def _spaced(places: int, count: int) -> torch.Tensor:
    """`count` of so many places, from the first to the last one."""
    return torch.arange(count) * (places - 1) // max(1, count - 1)


def motion_of(picture: torch.Tensor) -> torch.Tensor:
    """The frames before the video [B, C, 19, h, w] of a latent [B, C, 1, h, w]: it stood still."""
    return picture.expand(-1, -1, MOTION_FRAMES, -1, -1)
