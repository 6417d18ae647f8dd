"""A decoder's pictures made larger, with in-betweens of neighbours, on their way to the files: one at a time, across chunks too.

The pictures of a file are numbered so that the decoder's picture i is number i * multiplier, and the in-betweens of i - 1 and i
stand before it. So a chunk brings `multiplier` pictures for each of its own, and a video's first picture brings one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from .picture_forms import in_form

# in what a state keeps of its stream: the picture that the next chunk needs, what its files are, by which models, and what of
# their way changes the last bits: a tile that memory made smaller, and in-betweens that it had made singly
HELD, SIZE, MULTIPLIER, MODELS = "enlarged_held", "enlarged_size", "enlarged_multiplier", "enlarged_models"
TILE, SINGLY = "enlarged_tile", "enlarged_singly"


class Enlarger(Protocol):
    """What makes one picture larger, and in-betweens of two; both are told nothing of the pictures before."""

    # pictures in the file for each of the decoder's: in-betweens and itself
    multiplier: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """What pictures of this size become."""
        ...

    def enlarge(self, picture: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] float in 0..1 to [H2, W2, 3] float32 in 0..1, on any device."""
        ...

    def between(self, before: torch.Tensor, after: torch.Tensor) -> Iterator[torch.Tensor]:
        """The multiplier - 1 in-betweens, in order, of two pictures [H2, W2, 3] that were enlarged."""
        ...

    def rest(self) -> None:
        """Nothing is asked for until the next chunk: give back what is held for neighbours."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """JSON-able: what of its way changes the pictures' last bits."""
        ...

    def restore(self, saved: Mapping[str, Any]) -> None: ...


def file_frames(pictures: int, multiplier: int) -> int:
    """How many pictures a file holds of a video whose decoder gave so many since frame 0."""
    return (pictures - 1) * multiplier + 1 if pictures else 0


class FilePictures:
    """The pictures of one stream's files, chunk by chunk, all of its items.

    Of what was decoded before it holds one picture an item, where in-betweens are made. Without it the first chunk begins with the
    decoder's first picture itself.
    """

    def __init__(self, enlarger: Enlarger) -> None:
        self.enlarger = enlarger
        self._held: torch.Tensor | None = None  # [B, H, W, 3] float32 on the CPU, as decoded
        self._large: Sequence[torch.Tensor] | None = None  # the same enlarged, once that is known
        self._looked_back = False

    @property
    def looks_back(self) -> bool:
        """Whether in-betweens of the picture before and the next one can be made."""
        return self._held is not None

    @property
    def begins_again(self) -> bool:
        """Whether the picture before the next chunk was enlarged, and has to be once more."""
        return self.looks_back and self._large is None

    def begin_after(self, pictures: torch.Tensor) -> None:
        """The newest decoded pictures [B, t, H, W, 3] are in the files before: the next chunk is to go on from the last one."""
        if self.enlarger.multiplier > 1:
            self._held, self._large = _last(pictures), None
            self._looked_back = True

    def step(self, pictures: torch.Tensor, form: str) -> torch.Tensor:
        """Decoded pictures [B, t, H, W, 3] float in 0..1 to those of the files [B, n, H2, W2, 3] in `form`, on the CPU.

        If it raises, it stands where it stood.
        """
        count, (width, height) = pictures.shape[1], self.enlarger.size(pictures.shape[3], pictures.shape[2])
        multiplier = self.enlarger.multiplier
        made = count * multiplier if self.looks_back or multiplier == 1 else file_frames(count, multiplier)
        out, large = None, []
        try:
            for item, decoded in enumerate(pictures):
                at = 0
                for picture in self._of_item(item, decoded, large):
                    part = in_form(picture, form)
                    if out is None:
                        out = torch.empty((len(pictures), made, height, width, 3), dtype=part.dtype)
                    out[item, at].copy_(part)
                    at += 1
        finally:
            self.enlarger.rest()
        if multiplier > 1:
            self._held, self._large = _last(pictures), large
        return out

    def _of_item(self, item: int, decoded: torch.Tensor, last: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The file's pictures of [t, H, W, 3]; the last decoded one, enlarged, is added to `last`."""
        enlarger = self.enlarger
        between = enlarger.multiplier > 1
        before = self._before(item) if between and self.looks_back else None
        for picture in decoded:
            large = enlarger.enlarge(picture)
            if before is not None:
                yield from enlarger.between(before, large)
            yield large
            before = large if between else None
        if between:
            last.append(before.cpu())

    def _before(self, item: int) -> torch.Tensor:
        """The item's held picture, enlarged."""
        return self.enlarger.enlarge(self._held[item]) if self._large is None else self._large[item]

    def decoded(self, frames: int) -> int:
        """How many of the decoder's pictures stand behind so many pictures of this stream's files."""
        multiplier = self.enlarger.multiplier
        return frames // multiplier if self._looked_back else -(-frames // multiplier)

    def mark(self) -> Any:
        """As it stands, for `rewind`; nothing is copied."""
        return self._held, self._large

    def rewind(self, mark: Any) -> None:
        self._held, self._large = mark

    def snapshot(self) -> dict[str, Any]:
        """What a state keeps, for a stream that goes on."""
        held = {} if self._held is None else {HELD: self._held}
        return held | self.enlarger.snapshot()

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Stand again where a snapshot of this very stream was taken."""
        looked_back = self._looked_back
        self.restore(saved)
        self._looked_back = looked_back

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken, as far as it was taken of such a stream."""
        self.enlarger.restore(saved)
        if HELD in saved:
            self.begin_after(saved[HELD][:, None])


def _last(pictures: torch.Tensor) -> torch.Tensor:
    """The last of [B, t, H, W, 3], as a state holds it."""
    return pictures[:, -1].float().to("cpu", copy=True)
