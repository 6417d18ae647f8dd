"""Streaming statistics of one layer: everything that the least-squares fit and its error need to know of the rows.

Rows are query tokens. A row of `local` is the layer's attention output over the local keys. The same row of `full` is
its output over all keys. Both are taken before the output projection. `r = full - local`. Sums are float32, in blocks:
one block of d channels, or one for each head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIELDS = ("rows", "local", "missing", "gram", "cross", "missing_energy", "full_energy")


@dataclass
class Moments:
    """`rows` m, `local` and `missing` [d] sums, `gram` sum of local^T local and `cross` of local^T missing, both
    [blocks, c, c], and the energies sum ||missing||^2 and sum ||full||^2, all float32."""

    rows: torch.Tensor
    local: torch.Tensor
    missing: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    missing_energy: torch.Tensor
    full_energy: torch.Tensor

    @staticmethod
    def empty(width: int, blocks: int, device: torch.device | str = "cpu") -> Moments:
        """Of no rows; `width` d = blocks * c."""
        size = width // blocks
        shapes = ((), (width,), (width,), (blocks, size, size), (blocks, size, size), (), ())
        return Moments(*(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes))

    @staticmethod
    def nbytes_of(width: int, blocks: int) -> int:
        """Bytes of one layer's moments."""
        return 4 * (3 + 2 * width + 2 * width * width // blocks)

    def add(self, local: torch.Tensor, full: torch.Tensor) -> None:
        """Add rows [m, d] of `local` and `full`, in any float dtype."""
        local, full = local.float(), full.float()
        missing = full - local
        self.rows += len(local)
        self.local += local.sum(0)
        self.missing += missing.sum(0)
        blocks = [t.unflatten(1, (len(self.gram), -1)).transpose(0, 1) for t in (local, missing)]
        self.gram.baddbmm_(blocks[0].mT, blocks[0])
        self.cross.baddbmm_(blocks[0].mT, blocks[1])
        self.missing_energy += missing.square().sum()
        self.full_energy += full.square().sum()

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both."""
        return Moments(*(getattr(self, name) + getattr(other, name) for name in FIELDS))

    def to(self, device: torch.device) -> Moments:
        """The same moments on `device`. Tensors that lie there already are shared, not copied."""
        return Moments(*(getattr(self, name).to(device) for name in FIELDS))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field, on the CPU."""
        return {name: getattr(self, name).cpu().clone() for name in FIELDS}
